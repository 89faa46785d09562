"""Request bodies that clients compress: gzip and deflate, inflated off the event loop within the bound of a body."""

from __future__ import annotations

import asyncio
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from serving.errors import BodyTooLarge, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from serving.scheduling.shared_capacity import Permit

_WINDOW_BITS = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
_RAW_DEFLATE = -zlib.MAX_WBITS
"""Some clients send deflate without zlib's header."""

_STEP_BYTES = 1024 * 1024
"""Bytes that one step inflates at most; then the permit grows, or the request is refused."""

_MAX_MEMBERS = 8
"""Most members of one gzip: each costs a copy of what follows it."""

_INFLATER = ThreadPoolExecutor(1, "inflate-request")


async def inflate(body: bytes, coding: str, permit: Permit, *, limit_bytes: int) -> bytes:
    """Return the body without its `content-encoding`; `permit` grows by its size.

    Raises `InvalidRequest` for another encoding and for a body that is damaged or cut, `BodyTooLarge` above
    `limit_bytes`, and `Overloaded`.
    """
    if coding == "identity":
        return body
    if coding not in _WINDOW_BITS:
        raise InvalidRequest.because(
            f"The content-encoding {coding[:32]} is not supported: send gzip, deflate or none."
        )
    steps = _inflated(body, coding)
    pieces: list[bytes] = []
    size = 0
    loop = asyncio.get_running_loop()
    while piece := await loop.run_in_executor(_INFLATER, next, steps, b""):
        size += len(piece)
        if size > limit_bytes:
            raise BodyTooLarge(f"{BodyTooLarge.message} Inflated, it has more than {limit_bytes} bytes.")
        permit.grow(len(piece))
        pieces.append(piece)
    return b"".join(pieces)


def _inflated(body: bytes, coding: str) -> Iterator[bytes]:
    """Yield the content in pieces of at most `_STEP_BYTES`, of all members of a gzip. Raises `InvalidRequest`."""
    bits = _WINDOW_BITS[coding]
    if coding == "deflate" and not _has_zlib_header(body):
        bits = _RAW_DEFLATE
    rest = body
    for _ in range(_MAX_MEMBERS):
        if not rest:
            return
        inflater = zlib.decompressobj(bits)
        try:
            while not inflater.eof:
                piece = inflater.decompress(rest, _STEP_BYTES)
                rest = inflater.unconsumed_tail
                if piece:
                    yield piece
                elif not rest and not inflater.eof:
                    raise InvalidRequest.because(f"Its {coding} is cut off.")
        except zlib.error:
            raise InvalidRequest.because(f"It is not {coding}, as its content-encoding says.") from None
        rest = inflater.unused_data if coding != "deflate" else b""
    if rest:
        raise InvalidRequest.because(f"It has more than {_MAX_MEMBERS} members of gzip.")


def _has_zlib_header(body: bytes) -> bool:
    """Return whether the body begins as RFC 1950 demands: method 8, and a multiple of 31."""
    return len(body) > 1 and body[0] & 0x0F == zlib.DEFLATED and int.from_bytes(body[:2]) % 31 == 0
