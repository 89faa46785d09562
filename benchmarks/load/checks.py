"""Checks of answers: a fast answer that is wrong is not a result.

`check` demands of each answer the expected end, as many tokens as requested, text that fits them, and usage by the
rule. `SeenCaptions` demands that no two clips get the same caption and no two answers the same id. Every violation
raises `BadAnswerError`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from benchmarks.load.wire import Answer

PADDING_S = 0.15
"""Seconds that a codec may add to a clip, or remove from it."""
TEXT_TOKENS = 8
"""Input tokens of the prompt's text, by the manual."""
CHARACTERS_PER_TOKEN = (1.2, 16.0)
"""Bounds for English in tokens of a byte-pair vocabulary, on average over a caption of 16 tokens or more."""
MAX_COMPRESSION = 12
"""Text that zlib compresses by more than this repeats itself; a caption compresses to a half or a third."""
FREE_PAIRS = 3
"""Equal pairs that count as chance where `same_pairs` allows any."""

WRONG = ("broken", "cut", "empty", "repeated", "changed", "usage", "cached", "id")
"""Kinds of wrong answers. One wrong answer makes the run wrong."""
REFUSED, FAILED = "refused", "failed"
"""A clear refusal (429, 503), which an overloaded server may send; and any other error, which it may not."""

Cause = Literal["", "dialect", "stream", "foreign", "connection"]
"""Form of a refusal or failure.

An error in the caller's dialect with a request id, the same as the last event of a stream, a status without such an
error (a proxy's), or a connection that was refused, reset, or closed within a message.
"""


class BadAnswerError(Exception):
    """An answer that fails a check. `kind` is one of `WRONG`, `REFUSED` and `FAILED`."""

    def __init__(self, kind: str, detail: str, *, cause: Cause = "", status: int = 0, request_id: str = "") -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail
        self.cause = cause
        self.status = status
        self.request_id = request_id


@dataclass(frozen=True, slots=True)
class Expected:
    """Options that all requests of a run share, and by which their answers are checked."""

    model: str
    tokens: int | None = None
    """Length of every caption, by `ignore_eos`; without it the model ends the caption."""
    usage: Literal["manual", "model", "any"] = "manual"
    """Rule for input tokens: 12.5 per second as billed by the manual, about 13 as other servers count, or no rule."""
    least_s: float = 0.0
    """An answer that takes less time comes from a cache."""
    words: int | None = None
    """Words of every caption, each of one token, as the fake engine writes: a doubled or cut text is noticed."""


def check(answer: Answer, expected: Expected, audio_s: float) -> None:
    """Check the answer to a clip of `audio_s`. Raises `BadAnswerError`."""
    if not answer.text.strip():
        raise BadAnswerError("empty", f"no text, {answer.output_tokens} tokens")
    _check_length(answer, expected)
    if answer.e2e_s < expected.least_s:
        raise BadAnswerError("cached", f"after {answer.e2e_s:.4f} s, sooner than a model can answer")
    _check_usage(answer, expected, audio_s)


def _check_length(answer: Answer, expected: Expected) -> None:
    reason = "length" if expected.tokens else "stop"
    if answer.finish_reason != reason or (expected.tokens and answer.output_tokens != expected.tokens):
        found = f"{answer.finish_reason} after {answer.output_tokens} tokens"
        raise BadAnswerError("cut", f"{found}, expected {reason}, {expected.tokens}")
    words = len(answer.text.split())
    if expected.words is not None and not words == answer.output_tokens == expected.words:
        raise BadAnswerError("cut", f"{words} words of {answer.output_tokens} tokens, expected {expected.words}")
    if answer.output_tokens < 1 or answer.text_events > answer.output_tokens:
        raise BadAnswerError("usage", f"{answer.output_tokens} tokens in {answer.text_events} pieces of text")
    characters = len(answer.text)
    # A model that may not end finally writes what is not text, or the same again.
    if (
        not expected.tokens
        and answer.output_tokens >= 16
        and characters / answer.output_tokens < CHARACTERS_PER_TOKEN[0]
    ):
        raise BadAnswerError("cut", f"{characters} characters of {answer.output_tokens} tokens")
    if characters / answer.output_tokens > CHARACTERS_PER_TOKEN[1]:
        raise BadAnswerError("usage", f"{characters} characters in {answer.output_tokens} tokens")
    if not expected.tokens:
        _check_repetition(answer.text)


def _check_repetition(text: str) -> None:
    half = len(text) // 2
    doubled = half >= 32 and text[:half].strip() == text[-half:].strip()
    if doubled or len(text) / len(zlib.compress(text.encode())) > MAX_COMPRESSION:
        raise BadAnswerError("repeated", f"the text repeats itself: {text[:100]!r}")


def _check_usage(answer: Answer, expected: Expected, audio_s: float) -> None:
    if answer.total_tokens != answer.input_tokens + answer.output_tokens:
        sums = f"{answer.total_tokens} is not {answer.input_tokens} + {answer.output_tokens}"
        raise BadAnswerError("usage", sums)
    if expected.usage == "any":
        return
    if expected.usage == "model":
        low, high = 12.4 * audio_s - 13, 13.1 * (audio_s + PADDING_S) + 40  # with the prompt's text
        if not low <= answer.input_tokens <= high:
            raise BadAnswerError("usage", f"{answer.input_tokens} input tokens of {audio_s:.2f} s")
        return
    low, high = (max(13, ceil(12.5 * (audio_s + off))) for off in (-PADDING_S, PADDING_S))
    audio_tokens = answer.audio_tokens if answer.audio_tokens is not None else -1
    if not low <= audio_tokens <= high or answer.input_tokens != audio_tokens + TEXT_TOKENS:
        found = f"{audio_tokens} of {answer.input_tokens} input tokens are audio"
        raise BadAnswerError("usage", f"{found}, expected {low} to {high}")


class SeenCaptions:
    """Clips, captions and ids of a run so far.

    As sampling is random, two clips with the same words were not listened to. A small model has few words: there
    `same_pairs` is the share of pairs of clips that may get the same words; unlike the share of clips this share does
    not grow with the run. With `resent` clips are sent repeatedly, and each must get the same caption every time (of
    an engine that does not sample).
    """

    def __init__(self, same_pairs: float = 0.0, *, resent: bool = False) -> None:
        self._same_pairs = same_pairs
        self._resent = resent
        self._same = 0
        self._clips: dict[str, list[int]] = {}
        self._ids: set[str] = set()
        self._captions: dict[int, str] = {}

    def check(self, caption: str, clip: int, id_: str) -> None:
        """Add a caption. Raises `BadAnswerError` if another clip got the same, or another answer has this id."""
        if clip in self._captions and not self._resent:
            raise BadAnswerError("repeated", f"clip {clip} was sent twice")
        if id_ in self._ids:
            raise BadAnswerError("id", f"two answers are {id_!r}")
        self._ids.add(id_)
        if clip in self._captions:
            if caption != self._captions[clip]:
                detail = f"clip {clip} got caption {caption}, before {self._captions[clip]}"
                raise BadAnswerError("changed", detail)
            return
        self._captions[clip] = caption
        others = self._clips.setdefault(caption, [])
        self._same += len(others)
        others.append(clip)
        pairs = len(self._captions) * (len(self._captions) - 1) / 2
        if len(others) > 1 and self._same > (self._same_pairs and max(FREE_PAIRS, self._same_pairs * pairs)):
            detail = f"clips {others[0]} and {clip} got the same caption {caption}"
            raise BadAnswerError("repeated", f"{detail}, as did {self._same} of {pairs:.0f} pairs")
