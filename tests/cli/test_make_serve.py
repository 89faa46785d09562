"""`make serve` runs the doctor if the service fails, keeps its exit status, and passes signals on."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """#!/bin/bash
if [ "$1" = doctor ]; then echo "the doctor ran"; exit 1; fi
echo "$1" > started
trap 'echo TERM >> signals; exit ${ON_STOP:-0}' TERM
trap 'echo INT >> signals; exit ${ON_STOP:-0}' INT
if [ -n "$STATUS" ]; then exit $STATUS; fi
if [ -n "$KILLED" ]; then kill -KILL $$; fi
for _ in {1..300}; do sleep 0.1; done
"""


def make(directory: Path, target: str, **variables: str) -> subprocess.Popen[str]:
    """Start `make TARGET` with a script in the place of `captioner`, as the leader of a process group."""
    program = directory / "bin" / "captioner"
    program.parent.mkdir(exist_ok=True)
    program.write_text(SCRIPT)
    program.chmod(0o755)
    stamp = directory / "serve.stamp"
    stamp.touch()
    command = ["make", "--no-print-directory", "-C", str(directory), "-f", str(ROOT / "Makefile"), target]
    # `-o`: the stamp counts as current, so that nothing is installed.
    command += [f"SERVE={directory}", f"-o{stamp}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("CAPTIONER_", "MAKE"))}
    return subprocess.Popen(command, text=True, env=clean | variables, start_new_session=True, **pipes)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("target", ["serve", "serve-cluster"])
@pytest.mark.parametrize(
    ("variables", "status"), [({"STATUS": "1"}, 1), ({"STATUS": "4"}, 4), ({"KILLED": "yes"}, 137)]
)
def test_a_failed_service_is_followed_by_the_doctor(
    tmp_path: Path, target: str, variables: dict[str, str], status: int
) -> None:
    """The doctor speaks after a failure, also of a killed process; the status is the one of the service."""
    process = make(tmp_path, target, **variables)
    output, _ = process.communicate(timeout=30)
    command = "serve" if target == "serve" else "cluster"
    assert f"captioner {command} failed with status {status}." in output
    assert "the doctor ran" in output
    assert f"Error {status}" in output
    assert process.returncode == 2  # make's own status for a failed recipe


def test_a_service_that_ends_well_needs_no_doctor(tmp_path: Path) -> None:
    """Status 0 is followed by nothing."""
    process = make(tmp_path, "serve", STATUS="0")
    output, _ = process.communicate(timeout=30)
    assert (output, process.returncode) == ("", 0)


@pytest.mark.parametrize("on_stop", ["0", "1"])
@pytest.mark.parametrize(
    ("number", "to_group"), [(signal.SIGINT, True), (signal.SIGTERM, True), (signal.SIGTERM, False)]
)
def test_a_stop_is_no_failure(tmp_path: Path, number: signal.Signals, to_group: bool, on_stop: str) -> None:  # noqa: FBT001
    """A signal to the terminal's group or to make alone reaches the service once, and no doctor runs."""
    process = make(tmp_path, "serve", ON_STOP=on_stop)
    deadline = time.monotonic() + 20
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)  # the traps are set after the start
    if to_group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert (tmp_path / "signals").read_text() == f"{number.name.removeprefix('SIG')}\n"
    assert "the doctor ran" not in output
