"""Parsers under fuzzing. Each takes any bytes; what it may raise, and must hold, is part of the target.

A target fails by raising `AssertionError` or any exception that its parser does not declare.
"""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from serving.api.dialects.dashscope import DashScopeCodec
from serving.api.dialects.openai import OpenAICodec
from serving.api.dialects.transcriptions import CONTENT_TYPES, TranscriptionCodec
from serving.api.multipart_form import MultipartForm, read_form
from serving.audio.decode import decode
from serving.config import Settings
from serving.engine.base import EngineDelta, Load
from serving.engine.remote.wire import (
    Abort,
    Deltas,
    FeaturesPiece,
    Generate,
    Hello,
    Message,
    ProtocolError,
    State,
    encode,
    read_message,
)
from serving.errors import AudioError, CaptionerError, InvalidRequest
from serving.tenancy.ledger.journal_lines import JournalReader
from serving.timeline.captions import TimelineDelta
from serving.timeline.segments import Segment
from serving.types import NO_TENANT, CaptionDelta, FinishReason, Sampling, Usage
from tests.audio.clips import every_clip
from tests.support.wire import compatible_body, data_url, native_body, wav

if TYPE_CHECKING:
    from collections.abc import Callable

_SERVER_FAULT = 500
_LAST = CaptionDelta("A dog.", Usage(audio_tokens=26), FinishReason.STOP)
_LAST_OF_TIMELINE = TimelineDelta(
    _LAST.text, _LAST.usage, _LAST.finish_reason, segments=(Segment(0, 0.0, 2.0, "A dog.", None, None),)
)
_BOUNDARY = b"0123456789abcdef"
_MAX_ENTRIES = 3
_SETTINGS = Settings()


@dataclass(frozen=True, slots=True)
class Target:
    """A parser, and intact inputs for it."""

    name: str
    check: Callable[[bytes], None]
    """Parses any bytes. Raises if the parser breaks its promises."""
    seeds: Callable[[], list[bytes]]
    inputs: int
    """Number of inputs of a run of `make harden`."""
    isolated: bool = False
    """It runs C code on the bytes, which may end the process."""


# ---- both dialects: a request is decoded, or refused with a status below 500; either way the answer is rendered


def _dialect(codec: OpenAICodec | DashScopeCodec, body: bytes) -> None:
    # The headers follow from the body, so that an input is one file.
    kind = hashlib.blake2b(body, digest_size=1).digest()[0]
    headers = {"content-type": "application/json"} if kind & 1 else {}
    headers |= {"x-dashscope-sse": "enable"} if kind & 2 else {}
    headers |= {"accept": "text/event-stream"} if kind & 4 else {}
    refusal: CaptionerError | None = None
    try:
        request, reply = codec.decode_request(body, headers, "request-1")
    except CaptionerError as error:
        refusal = error
    if refusal is not None:
        rendered = codec.error(refusal, "request-1")
        assert 400 <= rendered.status < _SERVER_FAULT, refusal
        orjson.loads(rendered.body)
        return
    assert 1 <= request.sampling.max_tokens <= _SETTINGS.max_output_tokens
    if reply.stream:
        assert reply.event(_LAST).startswith((b"data:", b"id:"))
    else:
        assert isinstance(orjson.loads(reply.full_body("A dog.", _LAST)), dict)


def _openai(body: bytes) -> None:
    _dialect(OpenAICodec(_SETTINGS), body)


def _dashscope(body: bytes) -> None:
    _dialect(DashScopeCodec(_SETTINGS), body)


_CLIP = data_url(wav(0.05))
_PARAMETERS: dict[str, object] = {"temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["a", "b"], "max_tokens": 20}


def _openai_seeds() -> list[bytes]:
    usage = {"stream_options": {"include_usage": True}}
    bodies = [
        compatible_body("https://example.com/a.wav"),
        compatible_body(_CLIP, **_PARAMETERS),
        compatible_body(_CLIP, stream=True, **usage),
        compatible_body(_CLIP, n=1, logprobs=False, presence_penalty=0.1, logit_bias={"1": 1}, user="u", tools=[]),
    ]
    return [orjson.dumps(body) for body in bodies]


def _dashscope_seeds() -> list[bytes]:
    bodies = [
        native_body("https://example.com/a.wav"),
        native_body("oss://dashscope-instant/a/b/c.wav", result_format="message"),
        native_body(_CLIP, incremental_output=True, **_PARAMETERS),
    ]
    return [orjson.dumps(body) for body in bodies]


# ---- upload forms: parsed, or refused as an invalid request; the same in one piece and in many


def _upload_form(body: bytes) -> None:
    def parsed(pieces: list[bytes]) -> object:
        form = MultipartForm.of(f"multipart/form-data; boundary={_BOUNDARY.decode()}")
        found: list[tuple[str, bytes]] = []
        try:
            for piece in pieces:
                for name, data in form.feed(piece):
                    if name:
                        found.append((name, b""))
                    else:
                        found[-1] = (found[-1][0], found[-1][1] + data)
        except InvalidRequest:
            return "refused"
        return found if form.complete else "refused"

    with suppress(InvalidRequest):
        read_form(body, f"multipart/form-data; boundary={_BOUNDARY.decode()}")
    cut = len(body) // 2
    assert parsed([body]) == parsed([body[:cut], body[cut:]])


def _form(*parts: tuple[str, bytes]) -> bytes:
    head = b'--%b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'
    return b"".join(head % (_BOUNDARY, name.encode(), data) for name, data in parts) + b"--%b--\r\n" % _BOUNDARY


def _upload_form_seeds() -> list[bytes]:
    fields = [("policy", b"e30="), ("Signature", b"c2ln"), ("key", b"dashscope-instant/a/b"), ("OSSAccessKeyId", b"x")]
    return [_form(*fields, ("file", wav(0.01))), _form(("file", b"--0123456789abcdef\r\n\r\n--"), *fields)]


# ---- forms of transcriptions: decoded and answered in the requested format, or refused with a status below 500


def _transcriptions(body: bytes) -> None:
    codec = TranscriptionCodec(_SETTINGS)
    refusal: CaptionerError | None = None
    try:
        _, reply = codec.decode_request(
            body, {"content-type": f"multipart/form-data; boundary={_BOUNDARY.decode()}"}, "1"
        )
    except CaptionerError as error:
        refusal = error
    if refusal is not None:
        assert 400 <= codec.error(refusal, "1").status < _SERVER_FAULT, refusal
    elif reply.stream:
        assert reply.event(_LAST).endswith(b"data: [DONE]\n\n")
    else:
        assert b"A dog." in reply.full_body("A dog.", _LAST_OF_TIMELINE)


def _transcriptions_seeds() -> list[bytes]:
    fields = {"model": b"qwen3-omni-30b-a3b-captioner", "temperature": b"0.5", "timestamp_granularities[]": b"segment"}
    forms = [fields | {"response_format": form.encode()} for form in CONTENT_TYPES] + [fields | {"stream": b"true"}]
    return [_form(*form.items(), ("file", wav(0.01))) for form in forms]


# ---- frames between frontends and engine replicas: messages, or a protocol error


def _frames(data: bytes) -> None:
    async def read_all() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        while True:
            message = await read_message(reader)
            header, payload = encode(message)
            again = asyncio.StreamReader()
            again.feed_data(header + payload)
            again.feed_eof()
            assert repr(await read_message(again)) == repr(message)

    try:
        _LOOP.run_until_complete(read_all())
    except (ProtocolError, asyncio.IncompleteReadError):
        return


_LOOP = asyncio.new_event_loop()


def _frames_seeds() -> list[bytes]:
    sampling = Sampling(
        max_tokens=20, temperature=0.5, stop=("a",), stop_token_ids=(1,), stop_token_sequences=((1, 2),)
    )
    deltas = {1: EngineDelta("A dog", 2, None, 0.1, 30), 2: EngineDelta(".", 1, FinishReason.STOP)}
    messages: list[Message] = [
        Hello("secret"),
        Generate(1, "request-1", sampling, NO_TENANT, samples=16_000, frames=100, trace={"traceparent": "00-1-2-01"}),
        FeaturesPiece(1, bytes(64)),
        Abort(1),
        State(1, ready=True, failed=False, draining=False, load=Load(1, 2, 3.5, 400, 5000)),
        Deltas(deltas, (1, 2)),
    ]
    frames = [b"".join(encode(message)) for message in messages]
    return [*frames, b"".join(frames)]


# ---- the journal: whatever a disk returns, every line that is intact is read, once, and the rest is counted


def _journal(data: bytes) -> None:
    with tempfile.TemporaryDirectory(prefix="captioner-fuzz-") as scratch:
        directory = Path(scratch)
        (directory / "00000001.log").write_bytes(data)
        (directory / "00000002.log").write_bytes(_journal_line({"after": 1}))
        reader = JournalReader(directory)
        read: list[Any] = []
        for _ in range(len(data) + 10):
            entries, nbytes = reader.read()
            if not nbytes:
                break
            read += entries
            reader.advance()
        else:
            raise AssertionError("the reader does not end")
        assert read == [*_intact(data), {"after": 1}]


def _intact(data: bytes) -> list[Any]:
    """Return the entries of all lines with a right checksum, found without the reader."""
    found = []
    for line in data[: data.rfind(b"\n") + 1].split(b"\n"):
        checksum, _, payload = line.partition(b" ")
        if checksum == f"{zlib.crc32(payload):08x}".encode():
            with suppress(orjson.JSONDecodeError):
                found.append(orjson.loads(payload))
    return found


def _journal_line(entry: object) -> bytes:
    payload = orjson.dumps(entry)
    return b"%08x %b\n" % (zlib.crc32(payload), payload)


def _journal_seeds() -> list[bytes]:
    lines = [_journal_line({"op": "open", "id": str(number), "tokens": number}) for number in range(6)]
    return [b"".join(lines), b"".join(lines[:3]) + bytes(4096), lines[0] + bytes(600_000) + lines[1] + lines[2]]


# ---- audio of every container: decoded, or refused as audio


def _audio(data: bytes) -> None:
    try:
        waveform = decode(data, max_duration_s=30)
    except AudioError:
        return
    assert len(waveform) > 0


def _audio_seeds() -> list[bytes]:
    return [each.data[:20_000] for each in every_clip()]


TARGETS = {
    each.name: each
    for each in (
        Target("openai", _openai, _openai_seeds, 250_000),
        Target("dashscope", _dashscope, _dashscope_seeds, 250_000),
        Target("form", _upload_form, _upload_form_seeds, 100_000),
        Target("transcriptions", _transcriptions, _transcriptions_seeds, 150_000),
        Target("frames", _frames, _frames_seeds, 150_000),
        Target("journal", _journal, _journal_seeds, 50_000),
        Target("audio", _audio, _audio_seeds, 50_000, isolated=True),
    )
}
