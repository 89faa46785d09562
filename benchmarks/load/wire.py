"""Requests and answers in both dialects, for every load generator of this package."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.load.checks import FAILED, REFUSED, BadAnswerError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from benchmarks.load.checks import Cause, Expected

MODEL_NAME = "qwen3-omni-30b-a3b-captioner"
SAMPLING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
"""The model card's values, sent explicitly so that no server's defaults apply."""

Dialect = Literal["dashscope", "openai"]
BASES: dict[Dialect, str] = {"dashscope": "/api/v1", "openai": "/compatible-mode/v1"}
"""Base paths of the dialects at this service and at the hosted API; other servers have OpenAI's at `/v1`."""
PATHS: dict[Dialect, str] = {
    "dashscope": "/services/aigc/multimodal-generation/generation",
    "openai": "/chat/completions",
}
"""Paths below the bases."""


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request that is ready to be sent."""

    path: str
    """Below the dialect's base."""
    headers: dict[str, str]
    body: bytes


def prepare(expected: Expected, dialect: Dialect, audio: bytes, *, stream: bool, bare: str = "") -> PreparedRequest:
    """Build a request for the caption of `audio`: a URL, a data URL, or base64, whose format then is `bare`."""
    sampling = SAMPLING | ({"max_tokens": expected.tokens, "ignore_eos": True} if expected.tokens else {})
    headers = {"content-type": "application/json"}
    if audio.startswith(b"oss:"):
        headers["x-dashscope-ossresourceresolve"] = "enable"
    body: dict[str, Any]
    if dialect == "dashscope":
        headers |= {"x-dashscope-sse": "enable"} if stream else {}
        message = {"role": "user", "content": [{"audio": "@"}]}
        body = {"input": {"messages": [message]}, "parameters": {"incremental_output": True, **sampling}}
    else:
        body = chat_body("@", bare, **sampling)
        body |= {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    # The audio, up to 10 MB, is inserted as bytes: encoding it as JSON would cost more than everything else.
    before, after = json.dumps(body | {"model": expected.model}).split('"@"')
    return PreparedRequest(PATHS[dialect], headers, b'%s"%s"%s' % (before.encode(), audio, after.encode()))


def chat_body(audio: str, audio_format: str = "", /, **options: Any) -> dict[str, Any]:
    """Return a request in OpenAI's dialect for `audio`: a URL, a data URL, or base64 of the format given."""
    part = {"data": audio, **({"format": audio_format} if audio_format else {})}
    content = [{"type": "input_audio", "input_audio": part}]
    return {"model": MODEL_NAME, "messages": [{"role": "user", "content": content}], **options}


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer. Times count from just before the request is sent; TTFT is to the first text."""

    id: str
    text: str
    finish_reason: str
    input_tokens: int
    audio_tokens: int | None
    output_tokens: int
    total_tokens: int
    text_events: int
    e2e_s: float
    ttft_s: float | None = None
    """Only of a streamed answer, like the figures below."""
    itl_s: float | None = None
    """Mean time per token after the first, from the first text to the last."""
    stall_s: float | None = None
    """Longest pause between two pieces of text."""
    request_id: str = ""
    """Header `x-request-id`."""


Pieces = list[tuple[float, bytes]]
"""The body as received: seconds since the request was sent, and bytes."""


def read(status: int, headers: Mapping[str, str], pieces: Pieces, e2e_s: float, *, stream: bool) -> Answer:
    """Parse an answer. Raises `BadAnswerError`."""
    body = b"".join(piece for _, piece in pieces)
    request_id = headers.get("x-request-id", "")
    try:
        _check_headers(status, headers, body)
        answer = _streamed(pieces, e2e_s) if stream else _unstreamed(json.loads(body), e2e_s)
        return replace(answer, request_id=request_id)
    except BadAnswerError as bad:
        bad.request_id = request_id
        raise
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise BadAnswerError("broken", f"{error!r}: {body[-300:]!r}") from error


def _check_headers(status: int, headers: Mapping[str, str], body: bytes) -> None:
    """Raise `BadAnswerError` for an error status, and for an answer from an HTTP cache."""
    if status != 200:
        kind = REFUSED if status in (429, 503) else FAILED
        cause: Cause = "dialect" if _is_dialect_error(body) else "foreign"
        raise BadAnswerError(kind, f"HTTP {status}: {body[:300]!r}", cause=cause, status=status)
    if headers.get("x-cache", "").lower().startswith("hit") or headers.get("age", "0") != "0":
        raise BadAnswerError("cached", "by its headers")


def _is_dialect_error(body: bytes) -> bool:
    """Return whether this is an error as this service and the hosted API write it: code, message, request id."""
    try:
        parsed = json.loads(body)
        error = parsed.get("error", parsed)
        return bool(parsed["request_id"] and error["message"] and error["code"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def _unstreamed(body: Mapping[str, Any], e2e_s: float) -> Answer:
    if "error" in body or body.get("code"):
        raise BadAnswerError(FAILED, f"an error with HTTP 200: {body}")
    text, finish_reason = _text(body)
    return Answer(_id(body), text, finish_reason, **_tokens(body["usage"]), text_events=1, e2e_s=e2e_s)


def _streamed(pieces: Pieces, e2e_s: float) -> Answer:
    texts, times, usage, finish_reason, last = [], [], None, "", b""
    ids = set()
    for at_s, data in _events(pieces):
        last = data
        if data == b"[DONE]":
            continue
        event = json.loads(data)
        if "error" in event or event.get("code"):
            raise BadAnswerError(FAILED, f"in the stream: {data[:300]!r}", cause="stream")
        ids.add(_id(event))
        usage = event.get("usage") or usage
        if event.get("output") or event["choices"]:
            text, reason = _text(event)
            finish_reason = reason or finish_reason
            if text:
                texts.append(text)
                times.append(at_s)
    if not finish_reason or usage is None or (b'"choices":' in last and b'"output"' not in last):
        raise BadAnswerError("cut", f"the stream does not end as it should: {last[-300:]!r}")
    if len(ids) > 1:
        raise BadAnswerError("id", f"one answer has several: {sorted(ids)[:3]}")
    tokens = _tokens(usage)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    after_first = tokens["output_tokens"] - 1
    return Answer(
        ids.pop(),
        "".join(texts),
        finish_reason,
        **tokens,
        text_events=len(texts),
        e2e_s=e2e_s,
        ttft_s=times[0] if times else None,
        itl_s=(times[-1] - times[0]) / after_first if times and after_first > 0 else None,
        stall_s=max(gaps, default=None),
    )


def _events(pieces: Pieces) -> Iterator[tuple[float, bytes]]:
    """Yield the data of each event, with the time at which its end was received."""
    rest = b""
    for at_s, piece in pieces:
        *events, rest = (rest + piece).split(b"\n\n")
        for event in events:
            for line in event.splitlines():
                if line.startswith(b"data:"):
                    yield at_s, line[5:].strip()
    if rest.strip():
        raise BadAnswerError("cut", f"the stream ends within an event: {rest[-300:]!r}")


def _id(body: Mapping[str, Any]) -> str:
    """Return the answer's id. Raises `BadAnswerError` without one."""
    id_ = body.get("id") or body.get("request_id")
    if not isinstance(id_, str):
        raise BadAnswerError("id", f"no id: {str(body)[:300]}")
    return id_


def _text(body: Mapping[str, Any]) -> tuple[str, str]:
    """Return the text and the finish reason, which is empty before the end."""
    choice = (body.get("output") or body)["choices"][0]
    content = (choice["message"] if "message" in choice else choice["delta"]).get("content") or ""
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    reason = choice.get("finish_reason") or ""
    return text, "" if reason == "null" else reason


def _tokens(usage: Mapping[str, Any]) -> dict[str, Any]:
    """Return the token counts of an `Answer`. Raises `BadAnswerError` if some tokens came from a cache."""
    prefix, suffix = ("input", "output") if "input_tokens" in usage else ("prompt", "completion")
    details = usage.get(f"{prefix}_tokens_details") or {}
    if details.get("cached_tokens"):
        raise BadAnswerError("cached", f"{details['cached_tokens']} tokens of the prompt")
    audio_tokens = details.get("audio_tokens")
    tokens = usage[f"{prefix}_tokens"], usage[f"{suffix}_tokens"], usage["total_tokens"], audio_tokens or 0
    if not all(isinstance(count, int) for count in tokens):
        raise BadAnswerError("usage", f"{usage}")
    return {
        "input_tokens": tokens[0],
        "output_tokens": tokens[1],
        "total_tokens": tokens[2],
        "audio_tokens": audio_tokens,
    }
