"""A signal while a cluster on one machine starts, which may wait for engines or the database for ever."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys, time
from contextlib import nullcontext
from types import SimpleNamespace
from ray import serve
from serving.cluster import deployments
from serving.config import Settings

def run(*_, **__):
    if sys.argv[1] == "0":
        raise RuntimeError("deploying failed")
    os.kill(os.getpid(), int(sys.argv[1]))
    time.sleep(60)

deployments._local_ray = nullcontext
deployments.build = lambda _: None
serve.status = lambda: SimpleNamespace(applications={})
serve.start, serve.run, serve.shutdown = lambda **_: None, run, lambda: print("shut down", flush=True)
began_s = time.monotonic()
deployments.up(Settings(), {}, print)
print("returned", time.monotonic() - began_s < 5)
"""


@pytest.mark.parametrize(
    ("number", "status", "output"),
    [
        (2, 0, "returned True\n"),  # SIGINT
        (15, 0, "returned True\n"),  # SIGTERM
        (0, 1, "shut down\n"),  # none: the error is raised
    ],
)
def test_a_signal_ends_a_start_that_waits(number: int, status: int, output: str) -> None:
    """The command returns at once, and does not wait for a stop in order of processes that are starting."""
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(number)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout) == (status, output), ended.stderr
