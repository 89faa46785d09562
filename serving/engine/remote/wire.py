"""The wire between a frontend and an engine replica: one TCP connection, frames in both directions.

A frame is two lengths (big-endian, 32 bits each), a JSON header and bytes. The frontend speaks first:

    ► hello {secret}                                        ◄ state {ready, failed, draining, load, seen}, steadily
    ► generate {id, request_id, samples, frames, sampling,  ► features {id} + a piece of the log-mel, until all is there
                share}
    ► abort {id}                                            ◄ deltas {deltas: [[id, text, tokens, finish_reason], …],
                                                                     queue_s: [[id, seconds], …],
                                                                     own: [[id, input tokens, tokens not counted], …]}
                                                            ◄ error {id, error, message}: an exception of our tree

`seen` is the last generation that had come when `load` was told. Why not Ray's own calls:
deploy/adr/0005-frontends-and-engines.md. Everything is data; nothing is unpickled.
"""

from __future__ import annotations

import struct
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

import orjson

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping

T = TypeVar("T")

PIECE_BYTES = 256 * 1024
"""Features travel in pieces of at most this size, so that a long clip does not hold up the deltas of others."""

STATE_EVERY_S = 0.25
"""How often an engine replica tells its state."""

SILENCE_S = 10.0
"""A replica that has told nothing for so long is taken for dead: forty states were due."""

_LENGTHS = struct.Struct("!II")
_HEADER_BYTES = 4 * 1024 * 1024
"""No header is longer: a text of 32,768 tokens in one delta is not."""


class LinkError(ConnectionError):
    """The other end does not speak this protocol."""


def frame(header: dict[str, Any], payload: bytes | memoryview = b"") -> tuple[bytes, bytes | memoryview]:
    """What to write for one frame: its beginning, and its bytes as they are."""
    text = orjson.dumps(header)
    return _LENGTHS.pack(len(text), len(payload)) + text, payload


async def read_frame(reader: asyncio.StreamReader) -> tuple[dict[str, Any], bytes]:
    """Read the next frame. Raises `LinkError`, `IncompleteReadError` at the end, `OSError`."""
    header_bytes, payload_bytes = _LENGTHS.unpack(await reader.readexactly(_LENGTHS.size))
    if header_bytes > _HEADER_BYTES or payload_bytes > PIECE_BYTES:
        raise LinkError(f"a frame of {header_bytes} + {payload_bytes} bytes")
    try:
        header = orjson.loads(await reader.readexactly(header_bytes))
    except orjson.JSONDecodeError as error:
        raise LinkError("a header that is no JSON") from error
    if not isinstance(header, dict):
        raise LinkError("a header that is no object")
    return header, await reader.readexactly(payload_bytes) if payload_bytes else b""


def known(kind: type[T], told: Mapping[str, Any]) -> T:
    """A dataclass from what the other end has told of it.

    During an update that may be more than this end knows: frames only ever gain fields.
    """
    return kind(**{each.name: told[each.name] for each in fields(kind) if each.name in told})  # type: ignore[arg-type]
