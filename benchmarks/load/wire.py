"""What is asked, and what a right answer is, in both dialects: for every load generator here.

A fast answer that is wrong is no figure. `Answer.check` demands of each: an end as it was asked for, as many tokens as
were asked for, text that fits them, usage by the rule, one id, nothing that came from a cache. `Seen` demands that no
two clips get the same caption, and no two answers the same id.
"""

from __future__ import annotations

import itertools
import json
import zlib
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SAMPLING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
"""The model card's, sent explicitly so that no server's own defaults count."""

Dialect = Literal["dashscope", "openai"]
BASES: dict[Dialect, str] = {"dashscope": "/api/v1", "openai": "/compatible-mode/v1"}
"""Where this service and the hosted API have the dialects; others have OpenAI's at `/v1`."""
PATHS: dict[Dialect, str] = {
    "dashscope": "/services/aigc/multimodal-generation/generation",
    "openai": "/chat/completions",
}
"""Below that."""

PADDING_S = 0.15
"""What a codec may add to a clip, or take from it."""
TEXT_TOKENS = 8
"""The scaffold's, by the manual."""
CHARACTERS_PER_TOKEN = (1.2, 16.0)
"""What English in tokens of a byte-pair vocabulary may have, on average over a caption of 16 tokens or more."""
MOST_REPETITION = 12
"""Text that packs better than this says the same over and over; a caption packs to a half or a third."""

FEW_PAIRS = 3
"""So many that are alike are chance, where some may be."""

WRONG = ("broken", "cut", "empty", "repeated", "usage", "cached", "id")
"""Kinds of wrong answers. One of them, and the run is wrong."""
REFUSED, FAILED = "refused", "failed"
"""A clear no (429, 503), which a server past its limit may say; and any other error, which it may not."""


class BadAnswerError(Exception):
    """An answer that is not what every request of a benchmark must get. `kind` is of `WRONG`, `REFUSED` or `FAILED`."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Asked:
    """What every request of a run asks for."""

    model: str
    tokens: int | None = None
    """Length of every caption, by `ignore_eos`; without one it ends by itself."""
    usage: Literal["manual", "model", "any"] = "manual"
    """Rule for input tokens: 12.5 of a second as billed by the manual, about 13 as other servers count, or none."""
    least_s: float = 0.0
    """No answer can be there sooner; one that is comes from a cache."""


@dataclass(frozen=True, slots=True)
class Call:
    """A request, ready to be sent."""

    path: str
    """Below the dialect's base."""
    headers: dict[str, str]
    body: bytes


def call(asked: Asked, dialect: Dialect, audio: bytes, *, stream: bool, bare: str = "") -> Call:
    """Ask for a caption of `audio`: a URL, a data URL, or base64, whose format then is `bare`."""
    sampling = SAMPLING | ({"max_tokens": asked.tokens, "ignore_eos": True} if asked.tokens else {})
    headers = {"content-type": "application/json"}
    if audio.startswith(b"oss:"):
        headers["x-dashscope-ossresourceresolve"] = "enable"
    body: dict[str, Any]
    if dialect == "dashscope":
        headers |= {"x-dashscope-sse": "enable"} if stream else {}
        message = {"role": "user", "content": [{"audio": "@"}]}
        body = {"input": {"messages": [message]}, "parameters": {"incremental_output": True, **sampling}}
    else:
        part = {"data": "@", **({"format": bare} if bare else {})}
        body = {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": part}]}], **sampling}
        body |= {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    # The audio, up to 10 MB, is put in as it is: taking it through a JSON library would cost more than all the rest.
    before, after = json.dumps({"model": asked.model, **body}).split('"@"')
    return Call(PATHS[dialect], headers, b'%s"%s"%s' % (before.encode(), audio, after.encode()))


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that is complete. Times count from just before the request is sent; TTFT is to the first text."""

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
    """Of a streamed one, as are the others below."""
    itl_s: float | None = None
    """From the first text to the last, for each token after the first."""
    stall_s: float | None = None
    """Longest pause between two pieces of text."""

    def check(self, asked: Asked, audio_s: float) -> None:
        """Raise `BadAnswerError` if this is not what was asked for."""
        if not self.text.strip():
            raise BadAnswerError("empty", f"no text, {self.output_tokens} tokens")
        expected = "length" if asked.tokens else "stop"
        if self.finish_reason != expected or (asked.tokens and self.output_tokens != asked.tokens):
            raise BadAnswerError(
                "cut", f"{self.finish_reason} after {self.output_tokens} tokens, expected {expected}, {asked.tokens}"
            )
        per_token = len(self.text) / self.output_tokens if self.output_tokens else float("inf")
        if self.output_tokens < 1 or self.text_events > self.output_tokens:
            raise BadAnswerError("usage", f"{self.output_tokens} tokens in {self.text_events} pieces of text")
        # A model that may not end says in the end what is not text, or the same again.
        if not asked.tokens and self.output_tokens >= 16 and per_token < CHARACTERS_PER_TOKEN[0]:
            raise BadAnswerError("cut", f"{len(self.text)} characters of {self.output_tokens} tokens")
        if per_token > CHARACTERS_PER_TOKEN[1]:
            raise BadAnswerError("usage", f"{len(self.text)} characters in {self.output_tokens} tokens")
        if not asked.tokens:
            self._check_repetition()
        if self.e2e_s < asked.least_s:
            raise BadAnswerError("cached", f"after {self.e2e_s:.4f} s, sooner than a model can answer")
        self._check_usage(asked, audio_s)

    def _check_repetition(self) -> None:
        half = len(self.text) // 2
        doubled = half >= 32 and self.text[:half].strip() == self.text[-half:].strip()
        if doubled or len(self.text) / len(zlib.compress(self.text.encode())) > MOST_REPETITION:
            raise BadAnswerError("repeated", f"the text repeats itself: {self.text[:100]!r}")

    def _check_usage(self, asked: Asked, audio_s: float) -> None:
        if self.total_tokens != self.input_tokens + self.output_tokens:
            raise BadAnswerError("usage", f"{self.total_tokens} is not {self.input_tokens} + {self.output_tokens}")
        if asked.usage == "any":
            return
        if asked.usage == "model":
            low, high = 12.4 * audio_s - 13, 13.1 * (audio_s + PADDING_S) + 40  # with its scaffold
            if not low <= self.input_tokens <= high:
                raise BadAnswerError("usage", f"{self.input_tokens} input tokens of {audio_s:.2f} s")
            return
        low, high = (max(13, ceil(12.5 * (audio_s + off))) for off in (-PADDING_S, PADDING_S))
        told = self.audio_tokens if self.audio_tokens is not None else -1
        if not low <= told <= high or self.input_tokens != told + TEXT_TOKENS:
            raise BadAnswerError(
                "usage", f"{told} of {self.input_tokens} input tokens are audio, expected {low} to {high} of them"
            )


class Seen:
    """Clips, captions and ids so far. As sampling is random, two clips that get the same words were not listened to.

    A small model has not that much to say: there `same_pairs` is the share of pairs of clips that may get the same
    words. Unlike the share of clips it does not grow with the run.
    """

    def __init__(self, same_pairs: float = 0.0) -> None:
        self._same_pairs = same_pairs
        self._same = 0
        self._clips: dict[str, list[int]] = {}
        self._ids: set[str] = set()
        self._captioned: set[int] = set()

    def check(self, caption: str, clip: int, id_: str) -> None:
        """Raise `BadAnswerError` if this was said of another clip, or in an answer of this id."""
        if clip in self._captioned:
            raise BadAnswerError("repeated", f"clip {clip} was sent twice")
        self._captioned.add(clip)
        if id_ in self._ids:
            raise BadAnswerError("id", f"two answers are {id_!r}")
        self._ids.add(id_)
        others = self._clips.setdefault(caption, [])
        self._same += len(others)
        others.append(clip)
        pairs = len(self._captioned) * (len(self._captioned) - 1) / 2
        if len(others) > 1 and self._same > (self._same_pairs and max(FEW_PAIRS, self._same_pairs * pairs)):
            detail = f"clips {others[0]} and {clip} got the same caption {caption}"
            raise BadAnswerError("repeated", f"{detail}, as did {self._same} of {pairs:.0f} pairs")


Pieces = list[tuple[float, bytes]]
"""The body as it came: seconds since the request was sent, and bytes."""


def read(status: int, headers: Mapping[str, str], pieces: Pieces, e2e_s: float, *, stream: bool) -> Answer:
    """Take an answer apart. Raises `BadAnswerError`."""
    body = b"".join(piece for _, piece in pieces)
    if status != 200:
        raise BadAnswerError(REFUSED if status in (429, 503) else FAILED, f"HTTP {status}: {body[:300]!r}")
    if headers.get("x-cache", "").lower().startswith("hit") or headers.get("age", "0") != "0":
        raise BadAnswerError("cached", "by its headers")
    try:
        return _streamed(pieces, e2e_s) if stream else _whole(json.loads(body), e2e_s)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise BadAnswerError("broken", f"{error!r}: {body[-300:]!r}") from error


def _whole(body: Mapping[str, Any], e2e_s: float) -> Answer:
    if "error" in body or body.get("code"):
        raise BadAnswerError(FAILED, f"an error with HTTP 200: {body}")
    text, finish_reason = _said(body)
    return Answer(_id(body), text, finish_reason, **_counted(body["usage"]), text_events=1, e2e_s=e2e_s)


def _streamed(pieces: Pieces, e2e_s: float) -> Answer:
    texts, times, usage, finish_reason, last = [], [], None, "", b""
    ids = set()
    for at_s, data in _events(pieces):
        last = data
        if data == b"[DONE]":
            continue
        event = json.loads(data)
        if "error" in event or event.get("code"):
            raise BadAnswerError(FAILED, f"in the stream: {data[:300]!r}")
        ids.add(_id(event))
        usage = event.get("usage") or usage
        if event.get("output") or event["choices"]:
            text, reason = _said(event)
            finish_reason = reason or finish_reason
            if text:
                texts.append(text)
                times.append(at_s)
    if not finish_reason or usage is None or (b'"choices":' in last and b'"output"' not in last):
        raise BadAnswerError("cut", f"the stream does not end as it should: {last[-300:]!r}")
    if len(ids) > 1:
        raise BadAnswerError("id", f"one answer has several: {sorted(ids)[:3]}")
    counted = _counted(usage)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    return Answer(
        ids.pop(),
        "".join(texts),
        finish_reason,
        **counted,
        text_events=len(texts),
        e2e_s=e2e_s,
        ttft_s=times[0] if times else None,
        itl_s=(times[-1] - times[0]) / (counted["output_tokens"] - 1)
        if times and counted["output_tokens"] > 1
        else None,
        stall_s=max(gaps, default=None),
    )


def _events(pieces: Pieces) -> Iterator[tuple[float, bytes]]:
    """The data of each event, with the time at which its end came."""
    rest = b""
    for at_s, piece in pieces:
        *frames, rest = (rest + piece).split(b"\n\n")
        for frame in frames:
            for line in frame.splitlines():
                if line.startswith(b"data:"):
                    yield at_s, line[5:].strip()
    if rest.strip():
        raise BadAnswerError("cut", f"the stream ends within an event: {rest[-300:]!r}")


def _id(body: Mapping[str, Any]) -> str:
    """By which the answer can be asked after."""
    id_ = body.get("id") or body.get("request_id")
    if not isinstance(id_, str):
        raise BadAnswerError("id", f"there is none: {str(body)[:300]}")
    return id_


def _said(body: Mapping[str, Any]) -> tuple[str, str]:
    """Text and finish reason, which is empty if there is none yet."""
    choice = (body.get("output") or body)["choices"][0]
    content = (choice["message"] if "message" in choice else choice["delta"]).get("content") or ""
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    reason = choice.get("finish_reason") or ""
    return text, "" if reason == "null" else reason


def _counted(usage: Mapping[str, Any]) -> dict[str, Any]:
    """The tokens of an `Answer`. Raises `BadAnswerError` if some came from a cache."""
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
