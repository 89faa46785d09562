"""Commands under measurement: started, awaited, and stopped with every process that they started.

`ManagedProcess` is any command; `LocalService` is this service on a free port.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import psutil

from benchmarks.processes import Family
from benchmarks.program import CAPTIONER
from benchmarks.servers import free_port

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_STOP_S = 60


class ManagedProcess(ABC):
    """A command, its log, and all processes that it started. A context manager: on entry it is ready."""

    name: str = "process"
    ready_path: ClassVar[str] = "/readyz"
    start_timeout_s: ClassVar[float] = 600
    piped: ClassVar[bool] = False
    """Connect standard input and output to this process, and log only standard error."""
    start_s: float
    """Seconds from start to readiness."""
    process: subprocess.Popen[str]
    family: Family

    def __init__(self, directory: Path, url: str = "") -> None:
        self.directory = directory
        self.url = url
        self.log = directory / "log"

    @property
    @abstractmethod
    def command(self) -> Sequence[str]:
        """Command line."""

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables in addition to those of this process."""
        return {}

    def __enter__(self) -> Self:
        self.start()
        try:
            self.start_s = self.wait_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Stop the command as an operator would; kill what is left of it after a minute."""
        members = self.family.members()
        self.process.terminate()
        psutil.wait_procs(members, timeout=_STOP_S)
        for member in {*members, *self.family.members()}:
            if member.is_running():
                member.kill()
        self.process.wait()

    def start(self) -> None:
        """Start the command, without waiting for it."""
        mark = f"CAPTIONER_BENCHMARK_MEMBER={uuid.uuid4()}"
        pipe = subprocess.PIPE if self.piped else None
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=pipe or subprocess.DEVNULL,
                stdout=pipe or log,
                stderr=log,
                text=True,
                env={**os.environ, **self.environment, **dict([mark.split("=")])},
                start_new_session=True,  # Ctrl+C ends the benchmark, which then stops the command
            )
        self.family = Family(psutil.Process(self.process.pid), mark)

    def wait_ready(self) -> float:
        """Wait until `ready`; return the seconds waited. Raises `RuntimeError` with the end of the log."""
        began = time.perf_counter()
        while not self.ready():
            waited_s = time.perf_counter() - began
            if self.process.poll() is not None or waited_s > self.start_timeout_s:
                raise RuntimeError(f"{self.name} did not start within {waited_s:.0f} s:\n{self.log_end()}")
            time.sleep(0.1)
        return time.perf_counter() - began

    def ready(self) -> bool:
        """Return whether requests are answered now."""
        return self.status(self.ready_path) == 200

    def status(self, path: str) -> int:
        """Return the status of a GET; 0 without an answer."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=5) as response:  # noqa: S310 - our own address
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def log_end(self) -> str:
        """Return the last 5,000 characters of the log."""
        return self.log.read_text()[-5000:]


class LocalService(ManagedProcess):
    """`captioner serve` with the flags given, on a free port, with its own directories. A context manager."""

    name = "captioner serve"

    def __init__(self, *flags: str, program: Sequence[str] = (str(CAPTIONER),), directory: Path | None = None) -> None:
        self._temporary = None if directory else tempfile.TemporaryDirectory(prefix="captioner-bench-")
        scratch = directory or Path(self._temporary.name if self._temporary else "")
        port = free_port()
        super().__init__(scratch, f"http://127.0.0.1:{port}")
        directories = ("data", "uploads", "download")
        self._command = [*program, "serve", f"--port={port}", *flags]
        self._command += [f"--{name}-dir={scratch / name}" for name in directories]
        (scratch / "download").mkdir(exist_ok=True)

    @property
    def command(self) -> Sequence[str]:
        return self._command

    def __exit__(self, *exc_info: object) -> None:
        super().__exit__(*exc_info)
        if self._temporary:
            self._temporary.cleanup()
