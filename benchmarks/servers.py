"""PostgreSQL and Redis servers as processes, for the duration of a measurement or a test.

Missing programs are installed with apt-get, which needs root on Debian or Ubuntu.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable

_START_S = 60


class Postgres:
    """A PostgreSQL server on a free loopback port; a context manager. It can be stopped and started inside."""

    def __init__(self) -> None:
        self._bin = _postgres_programs()
        # The server refuses to run as root.
        self._user = "postgres" if os.geteuid() == 0 else None
        self._directory = Path(tempfile.mkdtemp(prefix="postgres-"))
        self.port = free_port()
        self.url = f"postgresql://captioner@127.0.0.1:{self.port}/postgres"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        if self._user:
            shutil.chown(self._directory, self._user)
        command: list[str | Path] = [self._bin / "initdb", "-D", self._directory / "data", "-U", "captioner"]
        command += ["-A", "trust", "-E", "UTF8", "--no-sync", "--locale=C"]
        subprocess.run(command, user=self._user, check=True, stdout=subprocess.DEVNULL, cwd="/")
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
        shutil.rmtree(self._directory)

    def start(self) -> None:
        """Start the server; return when it accepts connections."""
        options = {"listen_addresses": "127.0.0.1", "fsync": "off", "unix_socket_directories": self._directory}
        flags = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._bin / "postgres", "-D", self._directory / "data", "-p", str(self.port), *flags],
                user=self._user,
                stdout=log,
                stderr=log,
                cwd="/",
            )
        _wait_for(self.port, self._process, self._ready)

    def stop(self, *, how: signal.Signals = signal.SIGQUIT) -> None:
        """Stop the server: at once, like a crash, or by SIGINT, which notifies its clients first."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait()
            self._process = None

    def _ready(self) -> bool:
        """Return whether connections are accepted; a server in recovery listens and refuses them."""
        command = [str(self._bin / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(command, check=False).returncode == 0


class Redis:
    """A Redis server on a free loopback port, without persistence; a context manager."""

    def __init__(self) -> None:
        self._program = _program("redis-server", "redis-server")
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server, empty; return when it accepts connections."""
        command = [self._program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=tempfile.gettempdir())
        _wait_for(self.port, self._process, lambda: True)

    def stop(self) -> None:
        """Kill the server; its data is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def free_port() -> int:
    """Return a loopback port on which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_for(port: int, process: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
            continue
        if ready():
            return
        time.sleep(0.05)
    process.kill()
    raise RuntimeError(f"{process.args!r} did not start within {_START_S} s")


def _postgres_programs() -> Path:
    """Return the directory of PostgreSQL's programs, which Debian keeps out of the path."""
    if path := shutil.which("initdb"):
        return Path(path).resolve().parent
    _install_unless(lambda: any(Path("/usr/lib/postgresql").glob("*/bin/initdb")), "postgresql")
    return max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))


def _program(name: str, package: str) -> str:
    _install_unless(lambda: shutil.which(name) is not None, package)
    return shutil.which(name) or name


def _install_unless(installed: Callable[[], bool], package: str) -> None:
    """Install a Debian package unless it is installed; one process at a time, since apt refuses a second."""
    if installed():
        return
    with Path(tempfile.gettempdir(), "captioner-apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if installed():
            return
        if os.geteuid() != 0 or not shutil.which("apt-get"):
            raise RuntimeError(f"{package} is missing: install it, or run as root on Debian or Ubuntu")
        for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", package]):
            subprocess.run(
                command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
            )
