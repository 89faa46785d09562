"""Reading of request bodies with bounded memory and time, and detection of a client that disconnects."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

from serving.errors import BodyTimeout, BodyTooLarge, Disconnected

if TYPE_CHECKING:
    from starlette.types import Receive

    from serving.config import Settings
    from serving.scheduling.shared_capacity import Permit

IDLE_TIMEOUT_S = 30
"""Longest pause between two pieces of a body: a client that stops sending does not hold memory for ever."""

LEAST_RATE_BYTES_S = 8192
"""Least mean rate of a body after its first `body_timeout_s`: each received byte extends the deadline."""

DRAIN_FACTOR = 4
"""Multiple of the limit that is read and discarded, so that the client receives the error instead of a reset."""


class Body:
    """One request's body as it arrives: an iterator over its pieces, with a deadline.

    The deadline is `body_timeout_s` after the first read and a second more for each `LEAST_RATE_BYTES_S` received.
    Iteration raises `Disconnected`, and `BodyTimeout` when the client is too slow or stops sending.
    """

    def __init__(self, receive: Receive, settings: Settings, *, limit_bytes: int | None = None) -> None:
        """`limit_bytes` is the limit of a complete body, by default `max_body_bytes`."""
        self._receive = receive
        self._grace_s = settings.body_timeout_s
        self.limit_bytes = settings.max_body_bytes if limit_bytes is None else limit_bytes
        self._started: float | None = None
        self._received_bytes = 0
        self._complete = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        piece = b""
        while not piece:
            if self._complete:
                raise StopAsyncIteration
            piece = await self._next()
        return piece

    async def _next(self) -> bytes:
        now = asyncio.get_running_loop().time()
        if self._started is None:
            self._started = now
        deadline = self._started + self._grace_s + self._received_bytes / LEAST_RATE_BYTES_S
        try:
            async with asyncio.timeout_at(min(deadline, now + IDLE_TIMEOUT_S)):
                message = await self._receive()
        except TimeoutError:
            raise BodyTimeout from None
        if message["type"] == "http.disconnect":
            raise Disconnected
        piece: bytes = message.get("body", b"")
        self._received_bytes += len(piece)
        self._complete = not message.get("more_body", False)
        return piece

    async def read(self, permit: Permit) -> bytes:
        """Read a complete body of at most the limit.

        Raises `BodyTooLarge` after reading the rest (up to `DRAIN_FACTOR` times the limit), `Overloaded` when `permit`
        cannot grow, `Disconnected`, and `BodyTimeout`.
        """
        body: list[bytes] = []
        size = 0
        async for piece in self:
            size += len(piece)
            if size > self.limit_bytes:
                permit.release()
                body.clear()
                if size > DRAIN_FACTOR * self.limit_bytes:
                    break
            else:
                permit.grow(len(piece))
                body.append(piece)
        if size > self.limit_bytes:
            raise BodyTooLarge(
                f"{BodyTooLarge.message} A body may have {self.limit_bytes} bytes; audio by URL may be larger."
            )
        return b"".join(body)

    async def drain(self) -> None:
        """Read and discard the rest, so that an early error reaches a caller that is still sending (PROTOCOL 2.7).

        Stops after `DRAIN_FACTOR` times the limit. Raises `Disconnected` and `BodyTimeout`.
        """
        size = 0
        async for piece in self:
            size += len(piece)
            if size > DRAIN_FACTOR * self.limit_bytes:
                return


async def disconnected(receive: Receive) -> None:
    """Return when the client disconnects. Call only after the body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass
