"""Short Locust runs, of which no process remains, and their journals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from benchmarks.load.command import locust_command
from benchmarks.program import module_environment
from benchmarks.servers import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CLIP_S = 2
TIMEOUT_S = 100


def command(host: str, clips: Path, journal: Path, *flags: str) -> list[str]:
    """Return the command of a short run with two callers."""
    port = free_port()  # of a master, which runs in other tests at the same time have too
    ports = (f"--master-bind-port={port}", f"--master-port={port}")
    own = (*ports, "--load=2", "--seconds=1.5", "--warm-up=0", f"--mix={CLIP_S}", f"--clips-dir={clips}")
    return locust_command(host, journal, *own, *flags)


def environment(keys: str = "") -> dict[str, str]:
    """Return the environment of a run."""
    return os.environ | module_environment() | {"BENCHMARK_KEYS": keys}


@contextmanager
def running(command: list[str], clips: Path, log: Path, keys: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """Start a run in a new process group, and kill what remains of the group in the end."""
    with (
        log.open("w") as output,
        subprocess.Popen(
            command, stdout=output, stderr=output, cwd=clips, env=environment(keys), start_new_session=True
        ) as process,
    ):
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):  # the group is empty
                os.killpg(process.pid, signal.SIGKILL)


def run(host: str, clips: Path, journal: Path, *flags: str, keys: str = "") -> tuple[int, list[dict[str, Any]], str]:
    """Return the exit status, the journal, and the output."""
    log = journal.with_suffix(".log")
    with running(command(host, clips, journal, *flags), clips, log, keys) as process:
        try:
            status = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired as expired:
            raise AssertionError(f"no end within {TIMEOUT_S} s:\n{log.read_text()}") from expired
    return status, read(journal), log.read_text()


def read(journal: Path) -> list[dict[str, Any]]:
    """Return the entries of a journal."""
    return [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
