"""Short Locust runs, and their journals."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

from benchmarks.load.command import locust_command
from benchmarks.program import module_environment
from benchmarks.servers import free_port

if TYPE_CHECKING:
    from pathlib import Path

CLIP_S = 2


def command(host: str, clips: Path, journal: Path, *flags: str) -> list[str]:
    """Return the command of a short run with two callers."""
    port = free_port()  # of a master, which runs in other tests at the same time have too
    ports = (f"--master-bind-port={port}", f"--master-port={port}")
    own = (*ports, "--load=2", "--seconds=1.5", "--warm-up=0", f"--mix={CLIP_S}", f"--clips-dir={clips}")
    return locust_command(host, journal, *own, *flags)


def environment(keys: str = "") -> dict[str, str]:
    """Return the environment of a run."""
    return os.environ | module_environment() | {"BENCHMARK_KEYS": keys}


def run(host: str, clips: Path, journal: Path, *flags: str, keys: str = "") -> tuple[int, list[dict[str, Any]], str]:
    """Return the exit status, the journal, and the output."""
    ended = subprocess.run(
        command(host, clips, journal, *flags),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=clips,
        env=environment(keys),
    )
    return ended.returncode, read(journal), ended.stdout + ended.stderr


def read(journal: Path) -> list[dict[str, Any]]:
    """Return the entries of a journal."""
    return [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
