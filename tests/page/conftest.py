"""Chromium, driven by Playwright in Node, and a service with a tenant that has limits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx
import pytest

from serving.tenancy.admin.service import Administration
from serving.tenancy.database import connect
from serving.tenancy.key_hashing import Pepper
from tests.sdk.environments import node_environment
from tests.support.programs import program
from tests.support.service import RunningService
from tests.support.wire import wav

if TYPE_CHECKING:
    from collections.abc import Iterator

TOKEN = "an-administrators-token"  # noqa: S105

SHOTS = "PAGE_SHOTS"
"""Environment variable with a directory for pictures of the page; unset: none are made."""


class Browser:
    """A running Chromium, and the service that its pages call. A context."""

    def __init__(self, service: RunningService, key: str, clip: Path, shots: str | None) -> None:
        found = re.search(r"administration on (http://[^\s\"]+)", service.log())
        assert found
        addresses = {"url": f"{service.url}/", "admin": f"{found[1]}/"}
        self._job = {**addresses, "token": TOKEN, "key": key, "clip": str(clip), "out": shots}
        home = node_environment("playwright-core-1.65.1")
        script = Path(__file__).with_name("browser.mjs")
        self._command = ["node", str(script), str(home), program("chromium")]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version: str = self._read()["ready"]
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self._process:  # closes its pipes, by which the browser ends
            try:
                assert self._process.stdin is not None
                self._process.stdin.close()
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def run(self, scenario: str) -> Any:
        """Run a scenario of `scenarios.mjs` in a new session; return what it saw. Fails for every problem."""
        assert self._process.stdin is not None
        print(json.dumps(self._job | {"scenario": scenario}), file=self._process.stdin, flush=True)
        result = self._read()
        assert result["problems"] == [], "\n".join(result["problems"])
        return result["value"]

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the browser has ended"
        return json.loads(line)


@pytest.fixture(scope="package")
def page_service() -> Iterator[tuple[RunningService, str]]:
    """A service with a fake engine that writes slowly enough to be seen, and the key of a tenant with limits."""
    speed = ("--fake-ttft-s=0.2", "--fake-tpot-s=0.03", "--stream-flush-interval-s=0.02")
    administration = ("--admin-port=0", f"--admin-token={TOKEN}", "--auth")
    with RunningService("--engine=fake", "--audio-workers=1", *speed, *administration) as service:
        database = connect(f"sqlite:///{service.data / 'captioner.db'}")
        admin = Administration(database, Pepper((service.data / "pepper").read_bytes().strip()), "test")
        limits = {"requests_per_minute": 10_000, "tokens_per_month": 50_000, "money_per_day": "2.5"}
        admin.create_tenant("acme", limits=limits, free_tokens=100)
        _, key = admin.create_key("acme", name="laptop", limits={"concurrent_requests": 4})
        database.dispose()
        deadline = time.monotonic() + 20
        while httpx.get(f"{service.url}/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 401:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield service, key


@pytest.fixture(scope="package")
def browser(page_service: tuple[RunningService, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Chromium for the scenarios."""
    clip = tmp_path_factory.mktemp("page") / "tone.wav"
    clip.write_bytes(wav(3))
    with Browser(*page_service, clip, os.environ.get(SHOTS)) as running:
        yield running
