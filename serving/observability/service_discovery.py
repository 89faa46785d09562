"""How Prometheus finds and reads every process: targets of its HTTP service discovery, and a listener for metrics.

One machine: the service's own port tells all. In a cluster each process listens on a port of its own, since a request
to the service's port reaches any frontend; every frontend tells all of them (`/metrics/targets`).
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from typing import TYPE_CHECKING, TypedDict

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pydantic import SecretStr

PORTS = 32
"""So many ports from `metrics_port` are tried: processes that share a machine or a pod take one each."""

TELL_EVERY_S = 4.0
FORGET_AFTER_S = 15.0
"""How often a process tells the directory that it is there, and after how long without a word it is taken for lost."""


class Target(TypedDict):
    """One process, as Prometheus' HTTP service discovery wants it."""

    targets: list[str]
    labels: dict[str, str]


def may_scrape(token: SecretStr | None, authorization: str) -> bool:
    """Whether whoever sends this header may read metrics."""
    if token is None:
        return True
    return hmac.compare_digest(authorization.encode(), f"Bearer {token.get_secret_value()}".encode())


class MetricsListener:
    """Answers `GET /metrics` on a port of its own. `expose` makes the answer from the `accept` header."""

    def __init__(self, expose: Callable[[str], Awaitable[tuple[bytes, str]]], token: SecretStr | None) -> None:
        self._expose = expose
        self._token = token
        self._runner: web.AppRunner | None = None

    async def start(self, host: str, first_port: int) -> str:
        """Listen on the first free port (0: on any), and return `host:port`. Raises `OSError` if none is free."""
        app = web.Application()
        app.router.add_get("/metrics", self._answer)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        ports = range(first_port, first_port + PORTS) if first_port else (0,)
        for port in ports:
            try:
                await web.TCPSite(self._runner, host, port).start()
            except OSError:
                if port == ports[-1]:
                    raise
            else:
                break
        address = self._runner.addresses[0]
        return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"

    async def stop(self) -> None:
        """Hang up. Idempotent."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        if not may_scrape(self._token, request.headers.get("authorization", "")):
            return web.Response(status=401, headers={"www-authenticate": "Bearer"})
        body, content_type = await self._expose(request.headers.get("accept", ""))
        return web.Response(body=body, headers={"content-type": content_type})


class Presence:
    """One process of a cluster as Prometheus finds it: it listens, tells the directory so, and learns of the others.

    `tell` hands the directory this process's target and a name that no other process ever has, and returns what it
    knows: all targets, and how many processes of each role were lost. `leave` tells it that the process ends.
    """

    def __init__(
        self,
        listener: MetricsListener,
        tell: Callable[[Target, str], Awaitable[tuple[list[Target], dict[str, int]] | None]],
        leave: Callable[[str], Awaitable[None]],
    ) -> None:
        self.targets: list[Target] = []
        self.lost = {"frontend": 0, "engine": 0}
        self._listener = listener
        self._tell = tell
        self._leave = leave
        self._address = ""
        self._process = secrets.token_hex(8)
        self._telling: asyncio.Task[None] | None = None

    async def start(self, host: str, first_port: int, role: str) -> None:
        """Listen, and tell from now on."""
        self._address = await self._listener.start(host, first_port)
        self._telling = asyncio.create_task(self._keep_telling({"targets": [self._address], "labels": {"role": role}}))

    async def stop(self) -> None:
        """Say farewell, and hang up. Idempotent."""
        telling, self._telling = self._telling, None
        if telling is not None:
            telling.cancel()
            await self._leave(self._address)
            await self._listener.stop()

    async def _keep_telling(self, target: Target) -> None:
        while True:
            if told := await self._tell(target, self._process):
                self.targets, self.lost = told
            await asyncio.sleep(TELL_EVERY_S)


class Register:
    """What the directory of a cluster knows of those that tell their metrics."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._seen: dict[str, tuple[Target, str, float]] = {}
        self._lost = {"frontend": 0, "engine": 0}

    def note(self, target: Target, process: str) -> tuple[list[Target], dict[str, int]]:
        """A process is there; return where all are, and how many were lost so far, by role.

        One that listens where another did follows on a lost one: whoever ends as it should is struck off first.
        """
        now, address = self._now_s(), target["targets"][0]
        before = self._seen.get(address)
        if before is not None and before[1] != process:
            self._lost[before[0]["labels"]["role"]] += 1
        self._seen[address] = target, process, now
        for address, (other, _, seen) in list(self._seen.items()):
            if now - seen > FORGET_AFTER_S:
                del self._seen[address]
                self._lost[other["labels"]["role"]] += 1
        return [target for target, _, _ in self._seen.values()], dict(self._lost)

    def strike(self, address: str) -> None:
        """A process ends as it should."""
        self._seen.pop(address, None)
