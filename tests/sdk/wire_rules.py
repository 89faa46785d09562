"""Rules for every answer to every client: those of PROTOCOL 2, 4, 5 and 9 that raw bytes can break."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.sdk.relay import Exchange

UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
MAX_LINE_BYTES = 128 * 1024
NEVER_NULL = {"code", "message", "request_id", "content", "annotations", "reasoning_content", "output", "usage"}


def violations(exchange: Exchange) -> list[str]:
    """Return a sentence for each broken rule."""
    return [f"{exchange.method} {exchange.target} → {exchange.status}: {broken}" for broken in _violations(exchange)]


def events(exchange: Exchange) -> list[dict[str, str]]:
    """Return the fields of each event of a stream, without comments and without an incomplete last event."""
    blocks = exchange.body.decode().split("\n\n")[:-1]
    found = []
    for block in blocks:
        fields = [line.partition(":") for line in block.split("\n") if not line.startswith(":")]
        if fields:
            found.append({name: value.removeprefix(" ") for name, _, value in fields})
    return found


def _violations(exchange: Exchange) -> Iterator[str]:
    compatible = exchange.target.startswith(("/compatible-mode/", "/v1/"))
    request_ids = [value for name, value in exchange.headers if name == "x-request-id"]
    if len(request_ids) != 1 or not UUID.fullmatch(request_ids[0]):
        yield f"x-request-id is {request_ids}"
        return
    if exchange.is_stream:
        yield from _stream_headers(exchange)
        yield from _lines(exchange)
        yield from (_compatible_stream if compatible else _native_stream)(exchange)
    elif exchange.target.startswith("/oss-upload"):
        if exchange.status != 200 and exchange.header("content-type") != "application/xml":
            yield f"content-type is {exchange.header('content-type')}"
    elif "/audio/" in exchange.target and (exchange.header("content-type") or "").startswith(
        ("text/", "application/x-")
    ):
        if exchange.status != 200:
            yield "an error is no JSON"
    elif exchange.complete:  # Node's client closes the connection of an answer that it will retry
        if exchange.header("content-type") not in {"application/json", "application/json; charset=utf-8"}:
            yield f"content-type is {exchange.header('content-type')}"
            return
        body = json.loads(exchange.body)
        yield from (_compatible_body if compatible else _native_body)(exchange, body)


def _stream_headers(exchange: Exchange) -> Iterator[str]:
    required = {"transfer-encoding": "chunked", "cache-control": "no-cache", "x-accel-buffering": "no"}
    for name, value in required.items():
        if exchange.header(name) != value:
            yield f"{name} is {exchange.header(name)!r}"
    if exchange.header("content-encoding"):
        yield "the stream is encoded"


def _lines(exchange: Exchange) -> Iterator[str]:
    if not exchange.body.isascii():
        yield "the stream is not plain ASCII"
    longest = max(len(line) for line in exchange.body.split(b"\n"))
    if longest >= MAX_LINE_BYTES:
        yield f"a line has {longest} bytes"


def _native_stream(exchange: Exchange) -> Iterator[str]:
    found = events(exchange)
    if any(event.get("data") == "[DONE]" or event.get("event") == "done" for event in found):
        yield "the stream announces its end"
        return
    if [event.get("id") for event in found] != [str(number + 1) for number in range(len(found))]:
        yield "ids do not count from 1"
    for number, event in enumerate(found):
        data = json.loads(event["data"])
        yield from _nulls(data)
        if data.get("request_id") != exchange.header("x-request-id"):
            yield "an event has another request_id"
        if event["event"] == "error":
            if b"event:error\nstatus:" not in exchange.body or not {"code", "message"} <= data.keys():
                yield "clients cannot read the error event"
            continue
        last = exchange.complete and number == len(found) - 1
        if (data["output"]["choices"][0]["finish_reason"] == "null") == last:
            yield f"event {number} of {len(found)} has the wrong finish_reason"


def _compatible_stream(exchange: Exchange) -> Iterator[str]:
    found = events(exchange)
    if any(event.keys() != {"data"} for event in found):
        yield "there are other fields than data"
    payloads = [event.get("data", "") for event in found]
    chunks = [json.loads(payload) for payload in payloads if payload != "[DONE]"]
    failed = any("error" in chunk for chunk in chunks)
    ends = [index for index, payload in enumerate(payloads) if payload == "[DONE]"]
    # A client may disconnect at [DONE], before the answer's last byte.
    if (ends or (exchange.complete and not failed)) and ends != [len(payloads) - 1]:
        yield f"[DONE] is at {ends} of {len(payloads)}"
    if "/audio/" in exchange.target:
        kinds = [chunk["type"].removeprefix("transcript.text.") for chunk in chunks if "error" not in chunk]
        if exchange.complete and not failed and kinds != ["delta"] * (len(kinds) - 1) + ["done"]:
            yield f"events are {kinds}"
        return
    ids = {chunk["id"] for chunk in chunks if "error" not in chunk}
    if ids - {f"chatcmpl-{exchange.header('x-request-id')}"}:
        yield f"ids are {ids}"
    for chunk in chunks:
        for choice in chunk.get("choices", ()):
            if not isinstance(choice["delta"].get("content"), str):
                yield "a delta has no content"


def _native_body(exchange: Exchange, body: Any) -> Iterator[str]:
    yield from _nulls(body)
    if body.get("request_id") != exchange.header("x-request-id"):
        yield "the body has another request_id"
    if exchange.status == 200:
        if not isinstance(body.get("data" if exchange.target.startswith("/api/v1/uploads") else "output"), dict):
            yield "there is no output"
        if body.get("code"):
            yield "a success has a code"
    elif body.keys() != {"code", "message", "request_id"}:
        yield f"the error has {sorted(body)}"


def _compatible_body(exchange: Exchange, body: Any) -> Iterator[str]:
    if exchange.status != 200 and (
        body.keys() != {"error", "request_id"} or body["error"].keys() != {"message", "type", "param", "code"}
    ):
        yield f"the error has {sorted(body)}"


def _nulls(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (f"{name} is null" for name, inner in value.items() if inner is None and name in NEVER_NULL)
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _nulls(inner)
