"""Reading of request bodies with bounded memory, and detection of a client that disconnects."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from serving.errors import BodyTooLarge, CaptionerError, Disconnected, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.types import Receive

    from serving.scheduling.shared_capacity import Permit

IDLE_TIMEOUT_S = 30
"""Longest pause between two pieces of a body: a client that stops sending does not hold memory for ever."""

DRAIN_FACTOR = 4
"""Multiple of the limit that is read and discarded, so that the client receives the error instead of a reset."""


async def read_body(receive: Receive, limit_bytes: int, permit: Permit) -> bytes:
    """Read a complete body of at most `limit_bytes`.

    Raises `BodyTooLarge` after reading the rest (up to `DRAIN_FACTOR` times the limit), `Overloaded` when
    `permit` cannot grow, `Disconnected`, and `InvalidRequest` when the client stops sending.
    """
    body: list[bytes] = []
    size = 0
    async for piece in pieces(receive):
        size += len(piece)
        if size > limit_bytes:
            permit.release()
            body.clear()
            if size > DRAIN_FACTOR * limit_bytes:
                break
        else:
            permit.grow(len(piece))
            body.append(piece)
    if size > limit_bytes:
        raise BodyTooLarge
    return b"".join(body)


async def drain(body: AsyncIterator[bytes], limit_bytes: int) -> None:
    """Read and discard the rest, so that an early error reaches a client that is still sending (PROTOCOL 2.7).

    Stops after `DRAIN_FACTOR` times `limit_bytes`. Raises `Disconnected`, and `InvalidRequest` when the client stops
    sending.
    """
    size = 0
    async for piece in body:
        size += len(piece)
        if size > DRAIN_FACTOR * limit_bytes:
            return


async def try_drain(body: AsyncIterator[bytes], limit_bytes: int) -> None:
    """Do as `drain`, and ignore its errors. The body may have been read in part or completely."""
    with contextlib.suppress(CaptionerError):
        await drain(body, limit_bytes)


async def pieces(receive: Receive) -> AsyncIterator[bytes]:
    """Yield the body as it arrives. Raises `Disconnected`, and `InvalidRequest` when the client stops sending."""
    while True:
        try:
            async with asyncio.timeout(IDLE_TIMEOUT_S):
                message = await receive()
        except TimeoutError:
            raise InvalidRequest("The request body did not arrive: the connection was idle for too long.") from None
        if message["type"] == "http.disconnect":
            raise Disconnected
        if piece := message.get("body", b""):
            yield piece
        if not message.get("more_body", False):
            return


async def disconnected(receive: Receive) -> None:
    """Return when the client disconnects. Call only after the body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass
