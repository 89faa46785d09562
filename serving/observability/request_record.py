"""Request record: the facts and stage times of one request, its outcome, and the log line made from it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from serving.errors import ClientError, ServerError, error_code, outcome_of
from serving.types import SAMPLE_RATE, Defect, FinishReason, Outcome, Usage

if TYPE_CHECKING:
    from serving.errors import CaptionerError

log = logging.getLogger(__name__)

STAGES = (
    "admit",
    "receive",
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

`admit` checks the caller's limits. `receive` reads the request. `fetch` downloads the clip.
`audio_queue` waits for an audio worker, `decode` and `features` are the worker's parts. `engine_queue` waits for the
engine. `prefill` lasts from the engine's start on the caption to its first token, `generate` from there to the end of
the request. `encode` writes the dialect; it is spread over `generate` and contained in it.
"""

ANSWERED = (Outcome.FINISHED, Outcome.PARTIAL)
FAILURES = (Outcome.FAILED, Outcome.FAILED_MIDSTREAM)
"""Outcomes that are the service's fault."""

_OUTPUT_FIELDS = ("usage", "first_token", "engine_output_tokens", "finish_reason", "partial", "defect")

_MAX_SHORT_S, _MAX_MEDIUM_S = 30.0, 300.0


@dataclass(slots=True)
class RequestRecord:
    """Facts about one request, filled along the path and written once, by `Metrics.finish`.

    Points in time are seconds of `time.perf_counter`.
    """

    request_id: str
    dialect: str
    caller: str = ""
    """Tenant id; empty while the caller is unknown."""
    stream: bool = False
    audio_form: str = ""
    """Kind of audio reference: inline, file, uploaded or url."""
    started: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    samples: int = 0
    usage: Usage | None = None
    engine_input_tokens: int = 0
    engine_output_tokens: int = 0
    """The engine's own counts, which are not the billed ones."""
    finish_reason: FinishReason | None = None
    partial: bool = False
    defect: Defect | None = None
    """Defect of the caption that is delivered."""
    retried: Defect | None = None
    """Defect of a first sample, because of which a second one was generated."""
    caption: list[str] | None = None
    """Pieces of the caption; kept only for a tenant that wants its captions in the log."""
    stages_s: dict[str, float] = field(default_factory=dict)
    stage_started: dict[str, float] = field(default_factory=dict)
    ended: float = 0.0
    conclusion: tuple[Outcome, str] | None = None
    """Outcome and code, once `conclude` has decided them."""
    billed: Usage | None = None
    """Usage that the settled record bills; `None` if it bills nothing."""
    billed_nanos: int = 0
    currency: str = ""
    span: Any = None
    """Span of the trace, if the request is traced."""

    @property
    def audio_s(self) -> float:
        """Length of the decoded audio in seconds; 0 before it is decoded."""
        return self.samples / SAMPLE_RATE

    @property
    def length_class(self) -> str:
        """Class of the audio's length, for which each objective on waiting times has a limit."""
        if not self.samples:
            return "unknown"
        return "short" if self.audio_s <= _MAX_SHORT_S else "medium" if self.audio_s <= _MAX_MEDIUM_S else "long"

    @property
    def queued_s(self) -> float:
        """Time in queues, in seconds."""
        return self.stages_s.get("audio_queue", 0.0) + self.stages_s.get("engine_queue", 0.0)

    @property
    def duration_s(self) -> float:
        """Time from arrival to end, in seconds; valid once the record is closed."""
        return self.ended - self.started

    def add_output(self, text: str, tokens: int, finish_reason: FinishReason | None, *, uncounted_tokens: int) -> Usage:
        """Add the next piece of the caption; return the usage up to and including it."""
        before = self.usage or Usage(0)
        self.usage = Usage(before.audio_tokens, before.output_tokens + tokens)
        self.engine_output_tokens += tokens + uncounted_tokens
        self.finish_reason = finish_reason
        if self.caption is not None:
            self.caption.append(text)
        return self.usage

    def discard_output(self) -> None:
        """Remove everything that was generated, before another engine generates the caption."""
        self.usage = Usage(self.usage.audio_tokens) if self.usage else None
        self.first_token = self.finish_reason = self.defect = None
        self.engine_output_tokens = 0
        if self.caption is not None:
            self.caption.clear()

    def output(self) -> dict[str, Any]:
        """Return everything that `add_output` and the pipeline recorded of a caption, to restore it later."""
        kept = {name: getattr(self, name) for name in _OUTPUT_FIELDS}
        return kept | {"caption": None if self.caption is None else [*self.caption]}

    def restore_output(self, kept: dict[str, Any]) -> None:
        """Record an earlier caption in place of the last one."""
        for name, value in kept.items():
            setattr(self, name, value)

    def stage(self, name: str, seconds: float, *, ended: float | None = None) -> None:
        """Record a stage that took `seconds` and ended at `ended`, by default now."""
        self.stages_s[name] = seconds
        self.stage_started[name] = (time.perf_counter() if ended is None else ended) - seconds

    def close(self) -> None:
        """Record that the request has ended now."""
        self.ended = time.perf_counter()
        if self.first_token is not None:
            self.stage("generate", self.ended - self.first_token, ended=self.ended)

    def conclude(self, error: BaseException | None) -> tuple[Outcome, str]:
        """Decide the outcome and the code of the request, once; return both, which are bounded words.

        `error`: the exception that ended the request, `None` if it was answered. The ledger decides before the last
        byte of a response is sent; whatever happens to the connection after that does not change the bill or the
        metrics.
        """
        if self.conclusion is None:
            outcome, code = outcome_of(error, partial=self.partial, generated=self.first_token is not None)
            if outcome is Outcome.FINISHED:
                # A cumulative stream may end before the caption does, at the longest line that clients read.
                code = str(self.finish_reason or FinishReason.LENGTH)
            self.conclusion = outcome, code or outcome.value
        return self.conclusion

    def log(self, outcome: Outcome, code: str, trace_id: str | None) -> None:
        """Log the closed record as one line."""
        log.log(
            logging.WARNING if outcome in FAILURES else logging.INFO,
            "request",
            extra={
                "request_id": self.request_id,
                "dialect": self.dialect,
                "caller": self.caller,
                "stream": self.stream,
                "audio_form": self.audio_form,
                "outcome": outcome.value,
                "code": code,
                "audio_s": round(self.audio_s, 3),
                "output_tokens": self.usage.output_tokens if self.usage else 0,
                "duration_s": round(self.duration_s, 4),
                "stages_s": {stage: round(seconds, 4) for stage, seconds in self.stages_s.items()},
                **({"defect": self.defect.value} if self.defect else {}),
                **({"retried": self.retried.value} if self.retried else {}),
                **({"caption": "".join(self.caption)} if self.caption else {}),
                **({"trace_id": trace_id} if trace_id else {}),
            },
        )


def _outcomes() -> tuple[tuple[Outcome, str], ...]:
    kinds: list[type[CaptionerError]] = [ClientError, ServerError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    rejected = ((Outcome.REJECTED, error_code(kind)) for kind in kinds if issubclass(kind, ClientError))
    failed = ((outcome, error_code(kind)) for kind in kinds if issubclass(kind, ServerError) for outcome in FAILURES)
    finished = ((Outcome.FINISHED, reason.value) for reason in FinishReason)
    others = ((outcome, outcome.value) for outcome in (Outcome.PARTIAL, Outcome.DISCONNECTED, Outcome.CANCELLED))
    return (*finished, *others, *rejected, *failed)


OUTCOMES = _outcomes()
"""All possible pairs of outcome and code. Without `lost`: a killed process reports nothing, the ledger alone counts."""
