"""The record of one request: what is known of it so far, where its time went, and in which words it ended."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import Any

from serving.errors import CaptionerError, ClientError, Disconnected, ServerError
from serving.types import SAMPLE_RATE, FinishReason, Usage

STAGES = (
    "receive",
    "admit",
    "fetch",
    "audio_queue",
    "decode",
    "features",
    "engine_queue",
    "prefill",
    "generate",
    "encode",
)
"""Stages of a caption, in order.

`receive` reads the request; `admit` checks the caller's limits and takes a place; `audio_queue` waits for an audio
worker and `engine_queue` for the engine; `prefill` lasts from the engine's taking it to the first token; `generate`
from there to the end, and within that `encode` writes the dialect.
"""

_SHORT_S, _MEDIUM_S = 30.0, 300.0


@dataclass(slots=True)
class RequestRecord:
    """What is known of one request so far. Filled by the path, told once by `Metrics.finish`."""

    request_id: str
    dialect: str
    caller: str = ""
    stream: bool = False
    audio_form: str = ""
    started: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    samples: int = 0
    usage: Usage | None = None
    engine_input_tokens: int = 0
    engine_output_tokens: int = 0
    """The engine's own counts, which are not what is billed."""
    finish_reason: FinishReason | None = None
    partial: bool = False
    caption: list[str] | None = None
    """What was said; kept only for a tenant that wants its captions in the log."""
    stages_s: dict[str, float] = field(default_factory=dict)
    began: dict[str, float] = field(default_factory=dict)
    """When each stage began, by the clock of `started`."""
    ended: float = 0.0
    billed_nanos: int = 0
    currency: str = ""
    span: Any = None
    """Of the trace, if there is one."""

    @property
    def audio_s(self) -> float:
        """Length of the decoded audio; 0 as long as there is none."""
        return self.samples / SAMPLE_RATE

    @property
    def length(self) -> str:
        """Class of the audio's length, by which waiting times are judged."""
        if not self.samples:
            return "unknown"
        return "short" if self.audio_s <= _SHORT_S else "medium" if self.audio_s <= _MEDIUM_S else "long"

    @property
    def waited_s(self) -> float:
        """How long it stood in queues."""
        return self.stages_s.get("audio_queue", 0.0) + self.stages_s.get("engine_queue", 0.0)

    def generated(self, text: str, tokens: int, finish_reason: FinishReason | None, *, uncounted_tokens: int) -> Usage:
        """Note the next piece of the caption; return what has been used with it."""
        before = self.usage or Usage(0)
        self.usage = Usage(before.audio_tokens, before.output_tokens + tokens)
        self.engine_output_tokens += tokens + uncounted_tokens
        self.finish_reason = finish_reason
        if self.caption is not None:
            self.caption.append(text)
        return self.usage

    def stage(self, name: str, seconds: float, *, ended: float | None = None) -> None:
        """Note that a stage took so long and has ended, at `ended` or now."""
        self.stages_s[name] = seconds
        self.began[name] = (time.perf_counter() if ended is None else ended) - seconds

    def close(self) -> None:
        """The request has ended, now."""
        self.ended = time.perf_counter()
        if self.first_token is not None:
            self.stage("generate", self.ended - self.first_token, ended=self.ended)

    def outcome(self, error: BaseException | None) -> tuple[str, str]:
        """How the request ended, in two bounded words: outcome and code. `error`: what ended it, if anything did."""
        if isinstance(error, Disconnected):
            return "cancelled", "disconnected"
        if error is None:
            # A cumulative stream may end before the caption does, at the longest line that clients read.
            return "finished", "partial" if self.partial else str(self.finish_reason or FinishReason.LENGTH)
        if isinstance(error, CaptionerError):
            return "client_error" if isinstance(error, ClientError) else "server_error", code_of(type(error))
        if isinstance(error, Exception):
            return "server_error", "internal"
        return "cancelled", "cancelled"


def code_of(kind: type[CaptionerError]) -> str:
    """An error's name as a metric's label has it: `engine_stalled`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


def _outcomes() -> tuple[tuple[str, str], ...]:
    """Every way for a request to end."""
    kinds: list[type[CaptionerError]] = [ClientError, ServerError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    errors = (("client_error" if issubclass(kind, ClientError) else "server_error", code_of(kind)) for kind in kinds)
    finished = (("finished", code) for code in (*FinishReason, "partial"))
    return (*finished, ("cancelled", "disconnected"), ("cancelled", "cancelled"), *errors)


OUTCOMES = _outcomes()
"""Pairs of outcome and code."""
