"""Locust runs with this package's user: the command line, and a run that ends."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.program import module_environment

if TYPE_CHECKING:
    from collections.abc import Sequence

LOCUSTFILE = Path(__file__).with_name("locustfile.py")


def locust_command(host: str, journal: Path, *options: str) -> list[str]:
    """Return the command; its environment needs `program.module_environment()`."""
    locust = [sys.executable, "-m", "locust", "--headless", "--only-summary", "-f", str(LOCUSTFILE)]
    return [*locust, f"--host={host}", f"--journal={journal}", *options]


TIMEOUT_S = 900
"""Default of `--timeout-s` of `users.py`."""
STOP_MARGIN_S = 50
"""Time that a user has to end after the timeout of its last request."""
START_MARGIN_S = 300
"""Time for imports, and for the sounds of clips, which are encoded before the first run."""


def run_limit_s(options: Sequence[str]) -> float:
    """Return the seconds within which a run with these options must end."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--warm-up", type=float, default=5)
    parser.add_argument("--timeout-s", type=float, default=TIMEOUT_S)
    own, _ = parser.parse_known_args(options)
    # The users, and then the answers of an open loop, are awaited for the timeout of a request.
    waits_s = 2 * own.timeout_s + STOP_MARGIN_S
    return float(START_MARGIN_S + own.warm_up + own.seconds + waits_s)


def run_locust(command: Sequence[str], limit_s: float) -> subprocess.CompletedProcess[str]:
    """Run Locust to its end, with its worker processes in one group; return its output and status.

    Whatever ends the run (its end, an exception, Ctrl-C), no process of the group remains. Raises
    `subprocess.TimeoutExpired` after `limit_s`.
    """
    # Files, not pipes: a worker that outlives a killed Locust would keep a pipe open until the limit.
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        environment = os.environ | module_environment()
        with subprocess.Popen(
            command, stdout=output, stderr=errors, env=environment, start_new_session=True
        ) as process:
            try:
                process.wait(limit_s)
            finally:
                with suppress(ProcessLookupError):  # the group is empty
                    os.killpg(process.pid, signal.SIGKILL)
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(command, process.returncode, output.read(), errors.read())
