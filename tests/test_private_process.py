"""Processes with secrets are closed to other processes of their user, audio workers above all."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

_NO_CAPABILITIES = "import ctypes, struct; ctypes.CDLL(None).capset(struct.pack('=Ii', 0x20080522, 0), bytes(24))\n"
"""A process of root with capabilities is closed to processes without them in any case."""

SLEEPS = f"""{_NO_CAPABILITIES}
import sys, time
from serving.private_process import forbid_inspection
print(sys.argv[1] == "visible" or forbid_inspection(), flush=True)
time.sleep(60)
"""

SERVES = f"""{_NO_CAPABILITIES}
import sys
from serving.cli.main import main
main(["serve", "--engine=fake", "--port=0", "--no-auth", "--audio-workers=1", *sys.argv[1:]])
"""

READS = f"""{_NO_CAPABILITIES}
import sys
for name in ("environ", "mem", "maps"):
    try:
        open(f"/proc/{{sys.argv[1]}}/{{name}}", "rb")
    except PermissionError:
        print("refused")
    else:
        print("open")
"""


def reads(pid: int) -> list[str]:
    """Return what another process of the same user, without capabilities, gets of a process's secrets."""
    done = subprocess.run([sys.executable, "-c", READS, str(pid)], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(("kind", "found"), [("visible", "open"), ("hidden", "refused")])
def test_a_hidden_process_is_not_read_by_its_user(kind: str, found: str) -> None:
    """Memory and environment of a hidden process are closed to other processes of its user; of others they are open."""
    with subprocess.Popen([sys.executable, "-c", SLEEPS, kind], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            assert process.stdout.readline() == "True\n"
            assert reads(process.pid) == [found] * 3
        finally:
            process.kill()


def test_a_hidden_process_reads_itself() -> None:
    """A hidden process of any user still reads what its metrics need of itself."""
    program = (
        "import os; from serving.private_process import forbid_inspection; os.geteuid() or os.setuid(65534);"
        "forbid_inspection(); os.listdir('/proc/self/fd'); open('/proc/self/stat').read(); open('/proc/self/limits')"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_service_is_hidden(tmp_path: Path) -> None:
    """The process of `captioner serve`, which has every secret, is closed to other processes of its user."""
    log = tmp_path / "log"
    flags = [f"--{name}-dir={tmp_path / name}" for name in ("data", "uploads")]
    with log.open("w") as output, subprocess.Popen([sys.executable, "-c", SERVES, *flags], stderr=output) as service:
        try:
            deadline = time.monotonic() + 60
            while "ready after" not in log.read_text() and service.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            assert "ready after" in log.read_text(), log.read_text()
            assert reads(service.pid) == ["refused"] * 3
        finally:
            service.terminate()
