"""Service discovery for Prometheus: the targets of its HTTP service discovery, and a listener for metrics.

One machine: the service's own port serves all metrics. In a cluster each process listens on a separate metrics port,
since a request to the service's port reaches any frontend. `cluster/membership.py` collects the addresses, and every
frontend lists all of them (`/metrics/targets`).
"""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING, TypedDict

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pydantic import SecretStr

PORTS = 32
"""Number of ports from `metrics_port` on that are tried: processes that share a machine or a pod use one each."""


class Target(TypedDict):
    """One process, in the form of Prometheus' HTTP service discovery."""

    targets: list[str]
    labels: dict[str, str]


def may_scrape(token: SecretStr | None, authorization: str) -> bool:
    """Return whether a caller that sends this `authorization` header may read metrics."""
    if token is None:
        return True
    return hmac.compare_digest(authorization.encode(), f"Bearer {token.get_secret_value()}".encode())


class MetricsListener:
    """HTTP server of `GET /metrics` on its own port. `expose` makes the response from the `accept` header."""

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
        """Close the port and all connections. Idempotent."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        if not may_scrape(self._token, request.headers.get("authorization", "")):
            return web.Response(status=401, headers={"www-authenticate": "Bearer"})
        body, content_type = await self._expose(request.headers.get("accept", ""))
        return web.Response(body=body, headers={"content-type": content_type})
