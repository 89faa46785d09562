"""The embedded service, started quietly for one command on a free loopback port, with a key for it, and stopped."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable

_START_TIMEOUT_S = 600
_STOP_TIMEOUT_S = 20
_POLL_S = 0.1
_READY = re.compile(r"ready after .* on (http://\S+)")


class StartError(Exception):
    """The service did not start."""


def installed() -> bool:
    """Return whether vLLM is installed, without which there is no service to start."""
    return importlib.util.find_spec("vllm") is not None


class EmbeddedService:
    """`captioner serve` with the embedded checkpoint. A context: it starts on entry. Raises `StartError`.

    Settings of the environment do not apply to it. Its state is in a temporary directory. It ends with this process,
    even if that is killed. `engine`: another engine, for tests. `on_progress` gets what it waits for.
    """

    def __init__(self, on_progress: Callable[[str], None] = lambda _: None, *, engine: str = "vllm") -> None:
        self._on_progress = on_progress
        self._engine = engine
        self.key = f"sk-{secrets.token_urlsafe(24)}"
        self.url = ""

    def __enter__(self) -> Self:
        self._directory = tempfile.TemporaryDirectory(prefix="captioner-caption-", ignore_cleanup_errors=True)
        home = Path(self._directory.name)
        flags = ["--host=127.0.0.1", "--port=0", "--shutdown-grace-s=0", f"--engine={self._engine}"]
        flags += ["--log-format=json", f"--data-dir={home / 'data'}", f"--download-dir={home}"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CAPTIONER_")}
        self._log = (home / "log").open("w+b")
        self._process = subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-m", "serving.cli.caption.child", str(os.getpid()), "serve", *flags],
            env=environment | {"CAPTIONER_API_KEYS": self.key},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C reaches this process alone, which stops the service
        )
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_STOP_TIMEOUT_S)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._log.close()
        self._directory.cleanup()

    def _wait(self) -> None:
        """Wait until the service is ready."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        doing = "loading"
        while not self.url:
            ended = self._process.poll() is not None
            for record in self._records():
                if found := _READY.match(str(record.get("message"))):
                    self.url = found[1]
                doing = str(record.get("progress") or record.get("waits_for") or doing).partition(" for ")[0]
            if ended:
                raise StartError(f"the embedded service did not start: {self._last_error()}")
            if time.monotonic() > deadline:
                raise StartError(f"the embedded service is not ready after {_START_TIMEOUT_S} s: {doing}")
            self._on_progress(doing)
            time.sleep(_POLL_S)

    def _records(self) -> list[dict[str, object]]:
        """Return the log's records so far; lines of other programs are left out."""
        found = []
        for line in Path(self._log.name).read_bytes().splitlines():
            with suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    found.append(record)
        return found

    def _last_error(self) -> str:
        """Return the most telling line of the log: an error of the service, else the last line."""
        errors = [str(each.get("message")) for each in self._records() if each.get("level") in {"error", "critical"}]
        lines = [line for line in Path(self._log.name).read_text(errors="replace").splitlines() if line.strip()]
        plain = [line.removeprefix("captioner: ") for line in lines if line.startswith("captioner: ")]
        return (plain or errors or lines or ["it printed nothing"])[0]
