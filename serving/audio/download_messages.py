"""Messages between a frontend and its download process: one JSON object a line, over a Unix socket.

frontend ► Configure, then Start and End of each download
process  ► Ready, then Finished or Failed of each download, and a Status every second
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

MAX_LINE_BYTES = 256 * 1024
"""Upper bound of a message; a URL has at most 8192 characters, which JSON escapes with 12 bytes each at worst."""


@dataclass(frozen=True, slots=True)
class Configure:
    """The settings of downloads, by name; no secret is among them."""

    settings: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Start:
    """Begin a download for a tenant. `number` is unique among all of the frontend."""

    number: int
    url: str
    request_id: str
    tenant: str
    weight: float
    priority: int


@dataclass(frozen=True, slots=True)
class End:
    """Cancel a running download, or remove the file of a finished one."""

    number: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The process can download."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The file of a download; it exists until `End`."""

    number: int
    path: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The exception of our tree that ended a download, by name, with its attributes."""

    number: int
    error: str
    message: str
    attributes: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Status:
    """The use of the bounds: disk in bytes, and downloads that are not finished."""

    used_bytes: int
    running: int


Message = Configure | Start | End | Ready | Finished | Failed | Status

_KINDS: dict[str, type[Message]] = {
    kind.__name__: kind for kind in (Configure, Start, End, Ready, Finished, Failed, Status)
}


def encode(message: Message) -> bytes:
    """Return a message as a line."""
    return json.dumps({"kind": type(message).__name__, **dataclasses.asdict(message)}).encode("ascii") + b"\n"


def decode(line: bytes) -> Message:
    """Return the message of a line. Raises `ValueError`, `LookupError` and `TypeError` for anything else."""
    values = json.loads(line)
    return _KINDS[values.pop("kind")](**values)
