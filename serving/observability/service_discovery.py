"""Service discovery for Prometheus: the targets of its HTTP service discovery, and a listener for metrics.

One machine: the port of the service serves all metrics, or the metrics port does (`metrics_port`). In a cluster each
process listens on a separate metrics port, since a request to the service's port reaches any frontend.
`cluster/membership.py` collects the addresses, and every process lists all of them (`/metrics/targets`).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, TypedDict

from aiohttp import web

from serving.observability.scrape_access import has_token
from serving.settings.types import METRICS_PORTS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiohttp.typedefs import Handler
    from pydantic import SecretStr

log = logging.getLogger(__name__)


class Target(TypedDict):
    """One process, in the form of Prometheus' HTTP service discovery."""

    targets: list[str]
    labels: dict[str, str]


class MetricsListener:
    """HTTP server of `GET /metrics` and `GET /metrics/targets` on a separate port; needs the token, if there is one.

    `expose` makes the response from the `accept` header. `targets` returns the addresses of a cluster's processes; on
    one machine the address of the request is the only one.
    """

    def __init__(
        self,
        expose: Callable[[str], Awaitable[tuple[bytes, str]]],
        token: SecretStr | None,
        targets: Callable[[], list[Target]] | None = None,
    ) -> None:
        self._expose = expose
        self._token = token
        self._targets = targets
        self._runner: web.AppRunner | None = None

    async def start(self, host: str, first_port: int) -> str:
        """Listen on the first free port (0: on any), and return `host:port`. Raises `OSError` if none is free."""
        app = web.Application(middlewares=[self._check])
        app.router.add_get("/metrics", self._scrape)
        app.router.add_get("/metrics/targets", self._list_targets)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        ports = range(first_port, first_port + METRICS_PORTS) if first_port else (0,)
        for port in ports:
            try:
                await web.TCPSite(self._runner, host, port).start()
            except OSError:
                if port == ports[-1]:
                    raise
            else:
                break
        address = self._runner.addresses[0]
        served = f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"
        log.info("metrics served", extra={"address": served})
        return served

    async def stop(self) -> None:
        """Close the port and all connections. Idempotent."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    @web.middleware
    async def _check(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        sent = [value.encode("utf-8", "surrogateescape") for value in request.headers.getall("authorization", [])]
        if self._token is not None and not has_token(self._token, sent):
            return web.Response(status=401, headers={"www-authenticate": "Bearer"})
        return await handler(request)

    async def _scrape(self, request: web.Request) -> web.Response:
        body, content_type = await self._expose(request.headers.get("accept", ""))
        return web.Response(body=body, headers={"content-type": content_type})

    async def _list_targets(self, request: web.Request) -> web.Response:
        here: list[Target] = [{"targets": [request.host], "labels": {"role": "server"}}]
        return web.json_response(here if self._targets is None else self._targets())
