"""The command line in a separate process, before the service is ready."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx

from benchmarks.servers import free_port

if TYPE_CHECKING:
    from collections.abc import Callable


class Command:
    """`captioner COMMAND …` with its data in a directory, and its log. A context, which may be entered again."""

    def __init__(self, directory: Path, command: str, *flags: str, **environment: str) -> None:
        directory.mkdir(exist_ok=True)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = directory / f"log-{self.port}"
        self._log.touch()
        self._command = [str(Path(sys.executable).with_name("captioner")), command, *flags]
        self._environment = os.environ | {"CAPTIONER_DATA_DIR": str(directory / "data")} | environment
        if command == "serve":
            self._command += [f"--port={self.port}", "--engine=fake", "--audio-workers=1"]
            self._command += [f"--download-dir={directory}", f"--uploads-dir={directory / f'uploads-{self.port}'}"]
        else:
            self._environment |= {"CAPTIONER_ADMIN_PORT": str(self.port)}

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            self._command, env=self._environment, stderr=subprocess.STDOUT, stdout=subprocess.PIPE
        )
        self._copying = threading.Thread(target=self._copy_log)
        self._copying.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.kill()
        self.process.wait()
        self._copying.join()

    def _copy_log(self) -> None:
        """Copy the log to a file: what the process may write to files does not limit it."""
        assert self.process.stdout is not None
        with self.process.stdout as log, self._log.open("ab", buffering=0) as file:
            for line in log:
                file.write(line)

    def lines(self, message: str = "") -> list[dict[str, Any]]:
        """Return the log's lines with that message, or all of them."""
        found = [json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{")]
        return [line for line in found if message in {"", line["message"]}]

    def text(self) -> str:
        """Return everything that was logged."""
        return self._log.read_text()

    def get(self, path: str, **headers: str) -> httpx.Response:
        """Return the answer to a GET."""
        return httpx.get(self.url + path, headers=headers, timeout=10)

    def wait(self, condition: Callable[[], Any], timeout_s: float = 60) -> Any:
        """Wait until the condition holds; no connection counts as not. Return its value."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                if found := condition():
                    return found
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise TimeoutError(self.text())

    def stop(self, *, within_s: float = 60) -> int:
        """Stop by SIGTERM; return the exit status. Raises `TimeoutExpired`."""
        self.process.terminate()
        status = self.process.wait(timeout=within_s)
        self._copying.join()
        return status
