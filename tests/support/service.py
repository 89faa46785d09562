"""The service in a separate process, as a user would start it."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

import httpx


class RunningService:
    """`captioner serve …` on a free loopback port, with its log and its metrics. A context.

    The service requires keys if `--api-keys` or `--auth` is among the flags.
    """

    def __init__(self, *flags: str, start_timeout_s: float = 60) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="captioner-test-")
        directory = Path(self._directory.name)
        self.downloads, self.uploads, self.data = directory / "downloads", directory / "uploads", directory / "data"
        self.downloads.mkdir()
        self._log = (directory / "log").open("w+")
        requires_keys = any(flag.startswith(("--api-keys", "--auth")) for flag in flags)
        self._flags = flags if requires_keys else ("--no-auth", *flags)
        self._start_timeout_s = start_timeout_s
        self.url = ""

    def __enter__(self) -> Self:
        command = [str(Path(sys.executable).with_name("captioner")), "serve", "--port=0"]
        command += [f"--download-dir={self.downloads}", f"--uploads-dir={self.uploads}", f"--data-dir={self.data}"]
        command += self._flags
        self.process = subprocess.Popen(command, stderr=self._log, stdout=self._log)
        deadline = time.monotonic() + self._start_timeout_s
        while not self.url:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                message = f"the service did not start:\n{self.log()}"
                self.__exit__()
                raise RuntimeError(message)
            time.sleep(0.05)
            if found := re.search(r"ready after .* on (http://[^\s\"]+)", self.log()):
                self.url = found[1]
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
        self._log.close()
        self._directory.cleanup()

    def stop(self) -> int:
        """Stop the service as an operator would, and return its exit status."""
        self.process.terminate()  # harmless if the process has already ended
        try:
            return self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def log(self) -> str:
        """Return everything logged so far."""
        self._log.flush()
        return Path(self._log.name).read_text()

    def metric(self, name: str, **labels: str) -> float:
        """Return a metric's value, summed over the series that have these labels."""
        total, found = 0.0, False
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            match = re.fullmatch(r"([\w:]+)(?:\{(.*)\})? (\S+)", line)
            if match is None or match[1] != name:
                continue
            found = True
            series = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
            if labels.items() <= series.items():
                total += float(match[3])
        if not found and not labels:
            raise KeyError(name)
        return total

    def settle(self, timeout_s: float = 10) -> None:
        """Wait until no work is in progress. Raises `TimeoutError`."""
        deadline = time.monotonic() + timeout_s
        while any(self.metric(name) for name in IN_PROGRESS):
            if time.monotonic() > deadline:
                raise TimeoutError({name: self.metric(name) for name in IN_PROGRESS})
            time.sleep(0.05)


IN_PROGRESS = (
    "captioner_requests_in_flight",
    "captioner_engine_running",
    "captioner_audio_queue_depth",
    "captioner_audio_workers_busy",
    "captioner_features_bytes",
    "captioner_body_bytes",
)
