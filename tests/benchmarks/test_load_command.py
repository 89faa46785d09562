"""Runs of Locust end: within their limit, and with every process that they started."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING

import psutil
import pytest

from benchmarks.load.command import run_limit_s, run_locust

if TYPE_CHECKING:
    from pathlib import Path

WORKER = "import sys, time; print('worker', flush=True); time.sleep(600)"
PARENT = """
import pathlib, subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", sys.argv[2]])
pathlib.Path(sys.argv[1]).write_text(str(worker.pid))
time.sleep(float(sys.argv[3]))
"""


def gone(pid: int) -> bool:
    """Return whether a process ends within 10 s."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_a_run_without_end_is_stopped_with_its_workers(tmp_path: Path) -> None:
    """A run over its limit raises `TimeoutExpired`, and its worker process is killed."""
    began = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        run_locust([sys.executable, "-c", PARENT, str(tmp_path / "pid"), WORKER, "600"], 3)
    assert time.monotonic() - began < 60
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_killed_run_takes_its_workers_along(tmp_path: Path) -> None:
    """A worker that outlives Locust neither delays the end of the run nor remains."""
    began = time.monotonic()
    ended = run_locust([sys.executable, "-c", PARENT, str(tmp_path / "pid"), WORKER, "0"], 600)
    assert ended.returncode == 0
    assert time.monotonic() - began < 60
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_run_has_its_own_group() -> None:
    """Status and output are those of the command; a Ctrl-C in the terminal reaches the suite alone."""
    code = "import os, sys; print(os.getpgid(0) == os.getpid(), os.getsid(0) == os.getpid()); sys.exit(4)"
    ended = run_locust([sys.executable, "-c", code], 60)
    assert (ended.returncode, ended.stdout) == (4, "True True\n")


@pytest.mark.parametrize(
    ("options", "limit_s"),
    [
        ((), 300 + 5 + 60 + 2 * 900 + 50),
        (("--seconds=15.0", "--warm-up", "0", "--timeout-s=10", "--load=4", "--ways=openai"), 300 + 15 + 20 + 50),
    ],
)
def test_the_limit_follows_the_options(options: tuple[str, ...], limit_s: float) -> None:
    """The limit has room for the run, for the timeout of a user's last request, and for the answers of an open loop."""
    assert run_limit_s(("python", "-m", "locust", *options)) == limit_s
