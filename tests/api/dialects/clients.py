"""Readers of streams, as strict as the official clients: a stream that breaks one of them fails here.

Rules and versions are those of PROTOCOL 2.11, 2.12, 4.2, 4.4, 5.3 and 13.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

LONGEST_LINE_BYTES = 128 * 1024


@dataclass
class Event:
    """One SSE event."""

    name: str | None = None
    id: str | None = None
    status: int | None = None
    data: list[str] = field(default_factory=list)


def check_bytes(stream: bytes) -> None:
    """Check every stream: ASCII (or a line ends where it should not), and lines that aiohttp reads."""
    assert stream.isascii()
    assert b"\r" not in stream
    assert all(len(line) < LONGEST_LINE_BYTES for line in stream.split(b"\n"))
    assert not stream or stream.endswith(b"\n\n"), "the last event is complete"


def dashscope_1x(stream: bytes) -> list[tuple[int, dict[str, Any]]]:
    """Return status and payload of each event, as `_handle_stream` of the DashScope SDK 1.x reads them.

    A payload that is no result (with `output`) and no error makes the SDK raise `TypeError`, so it fails here.
    """
    check_bytes(stream)
    items: list[tuple[int, dict[str, Any]]] = []
    status, is_error = 400, False
    for line in stream.split(b"\n"):
        text = line.decode("utf-8").rstrip("\r")
        if text.startswith("event:"):
            is_error = text[len("event:") :] == "error"
        elif text.startswith("status:"):
            status = int(text[len("status:") :])
        elif text.startswith("data:"):
            payload = json.loads(text[len("data:") :])
            assert ("code" in payload and "message" in payload) if is_error else "output" in payload
            items.append((status if is_error else 200, payload))
            if is_error:
                break
    return items


def httpx_sse(stream: bytes) -> list[Event]:
    """Return events as `httpx-sse` 0.4.0 reads them: it splits by `str.splitlines`, at U+2028 and U+0085, too."""
    check_bytes(stream)
    events: list[Event] = []
    event = Event()
    for line in stream.decode("utf-8").splitlines():
        if not line:
            if event.data:
                events.append(event)
            event = Event(id=event.id)
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "":
                pass
            case "event":
                event.name = value
            case "id":
                event.id = value
            case "data":
                event.data.append(value)
            case "status":
                event.status = int(value)
            case _:
                raise AssertionError(f"unknown field in {line!r}")
    assert not event.data, "the stream ends in the middle of an event"
    return events


def openai_chunks(stream: bytes) -> list[dict[str, Any]]:
    """Return the chunks of a complete compatible stream; every line is data, a comment or blank."""
    check_bytes(stream)
    lines = [line for line in stream.decode("ascii").split("\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines), "an id or event line breaks old clients"
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]
