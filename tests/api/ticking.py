"""The service with the fake engine in a thread of the test, with a measure of how long its event loop is blocked."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from typing import TYPE_CHECKING, Self

import uvicorn

from serving.api.app import create_app
from serving.api.uvicorn_protocol import protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from serving.config import Settings

PERIOD_S = 0.005


class TickingService:
    """A server on a loopback port whose loop also runs a task that ticks. A context."""

    def __init__(self, settings: Settings) -> None:
        app = create_app(settings)
        connections = app.state.components.connections
        config = uvicorn.Config(app, port=0, http=protocol(settings, connections), log_config=None, ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._ticking = False
        self.longest_gap_s = 0.0
        """Longest time in which the loop did not run the tick, since `reset`."""

    @property
    def port(self) -> int:
        """Port of the listener."""
        port: int = self._server.servers[0].sockets[0].getsockname()[1]
        return port

    @property
    def url(self) -> str:
        """Origin of the service."""
        return f"http://127.0.0.1:{self.port}"

    def reset(self) -> None:
        """Measure from now on."""
        self.longest_gap_s = 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        deadline = time.monotonic() + 60
        while not self._server.started or not self._ticking:
            assert self._thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    async def _run(self) -> None:
        ticking = asyncio.create_task(self._tick())
        await self._server.serve()
        ticking.cancel()

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            await asyncio.sleep(PERIOD_S)
            self._ticking = True
            self.longest_gap_s = max(self.longest_gap_s, loop.time() - began - PERIOD_S)


def answers(port: int, request: bytes, *, timeout_s: float = 60) -> bytes:
    """Send bytes, and return everything that the service answers until it closes or has answered once."""
    return b"".join(_pieces(port, request, timeout_s))


def _pieces(port: int, request: bytes, timeout_s: float) -> Iterator[bytes]:
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as client:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(request)
        try:
            while piece := client.recv(65_536):
                yield piece
        except ConnectionResetError:
            return
