"""Every metric's name, label and bucket, and the record of one request from which they are told."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from serving.errors import CaptionerError, ClientError, Disconnected, Overloaded
from serving.types import SAMPLE_RATE, FinishReason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client.core import Metric

    from serving.types import Usage

log = logging.getLogger(__name__)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for each, which nothing here reads

STAGES = ("fetch", "audio_queue", "decode", "features", "engine_first_token", "generate")
"""Stages of a caption, in order: `audio_queue` waits for an audio worker; `engine_first_token` is queue and prefill."""

_STAGE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TPOT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
_AUDIO_BUCKETS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 2400)


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
    finish_reason: FinishReason | None = None
    partial: bool = False
    stages_s: dict[str, float] = field(default_factory=dict)


class Metrics:
    """The service's own metrics on a registry of its own."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry = registry or CollectorRegistry()
        self._requests = Counter(
            "captioner_requests",
            "Caption requests that ended, by dialect, outcome (finished, cancelled, client_error, server_error) and "
            "code (the finish reason, or the name of the error).",
            ("dialect", "outcome", "code"),
            registry=registry,
        )
        self._rejected = Counter(
            "captioner_rejected",
            "Caption requests refused for want of room, by reason: inflight, bodies, spool, audio_queue, engine_queue "
            "(full), engine_wait (too long), capacity (any other).",
            ("reason",),
            registry=registry,
        )
        self._in_flight = Gauge("captioner_requests_in_flight", "Caption requests under way.", registry=registry)
        self._audio = Counter(
            "captioner_audio_seconds", "Seconds of audio of finished captions.", ("dialect",), registry=registry
        )
        self._tokens = Counter(
            "captioner_tokens",
            "Tokens as billed, of every request that reached the engine: audio, text (the scaffold), output.",
            ("kind",),
            registry=registry,
        )
        self._stages = Histogram(
            "captioner_stage_seconds",
            "Time that one request spent in one stage.",
            ("stage",),
            buckets=_STAGE_BUCKETS,
            registry=registry,
        )
        self._ttft = Histogram(
            "captioner_time_to_first_token_seconds",
            "From the request's arrival to its first token, fetch and decode included.",
            buckets=_STAGE_BUCKETS,
            registry=registry,
        )
        self._tpot = Histogram(
            "captioner_time_per_output_token_seconds",
            "Mean time between tokens of one caption, after the first.",
            buckets=_TPOT_BUCKETS,
            registry=registry,
        )
        self._e2e = Histogram(
            "captioner_request_duration_seconds",
            "From the request's arrival to its end.",
            ("outcome",),
            buckets=_STAGE_BUCKETS,
            registry=registry,
        )
        self._durations = Histogram(
            "captioner_audio_duration_seconds",
            "Length of the decoded audio of one request.",
            buckets=_AUDIO_BUCKETS,
            registry=registry,
        )

    def watch(self, name: str, documentation: str, read: Callable[[], float]) -> None:
        """Add a gauge whose value is read at each scrape."""
        Gauge(name, documentation, registry=self.registry).set_function(read)

    def watch_total(self, name: str, documentation: str, read: Callable[[], float]) -> None:
        """Add a counter, `_total`, that is kept elsewhere and read at each scrape."""
        self.registry.register(_Kept(name, documentation, read))

    def begin(self, request_id: str, dialect: str) -> RequestRecord:
        """Open the record of a request; whoever begins it finishes it, once."""
        self._in_flight.inc()
        return RequestRecord(request_id, dialect)

    def finish(self, record: RequestRecord, error: BaseException | None) -> None:
        """Tell the record in metrics and in one log line. `error`: what ended it, `None` if it was answered."""
        now = time.perf_counter()
        self._in_flight.dec()
        outcome, code = _outcome(record, error)
        self._requests.labels(record.dialect, outcome, code).inc()
        if isinstance(error, Overloaded):
            self._rejected.labels(error.reason).inc()
        self._e2e.labels(outcome).observe(now - record.started)
        if record.first_token is not None:
            self._ttft.observe(record.first_token - record.started)
            record.stages_s["generate"] = now - record.first_token
        for stage, seconds in record.stages_s.items():
            self._stages.labels(stage).observe(seconds)
        if record.samples:
            self._durations.observe(record.samples / SAMPLE_RATE)
        if usage := record.usage:
            for kind in ("audio", "text", "output"):
                self._tokens.labels(kind).inc(getattr(usage, f"{kind}_tokens"))
            if record.first_token is not None and usage.output_tokens > 1:
                self._tpot.observe((now - record.first_token) / (usage.output_tokens - 1))
        if outcome == "finished":
            self._audio.labels(record.dialect).inc(record.samples / SAMPLE_RATE)
        log.log(
            logging.WARNING if outcome == "server_error" else logging.INFO,
            "request",
            extra={
                "request_id": record.request_id,
                "dialect": record.dialect,
                "caller": record.caller,
                "stream": record.stream,
                "audio_form": record.audio_form,
                "outcome": outcome,
                "code": code,
                "audio_s": round(record.samples / SAMPLE_RATE, 3),
                "output_tokens": record.usage.output_tokens if record.usage else 0,
                "duration_s": round(now - record.started, 4),
                "stages_s": {stage: round(seconds, 4) for stage, seconds in record.stages_s.items()},
            },
        )


@dataclass(frozen=True, slots=True)
class _Kept(Collector):
    """A counter that someone else keeps."""

    name: str
    documentation: str
    read: Callable[[], float]

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(self.name, self.documentation, value=self.read())


def _outcome(record: RequestRecord, error: BaseException | None) -> tuple[str, str]:
    """How a request ended, in two bounded words."""
    if isinstance(error, Disconnected):
        return "cancelled", "disconnected"
    if error is None:
        # A cumulative stream may end before the caption does, at the longest line that clients read.
        return "finished", "partial" if record.partial else str(record.finish_reason or FinishReason.LENGTH)
    if isinstance(error, CaptionerError):
        side = "client_error" if isinstance(error, ClientError) else "server_error"
        return side, re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).lower()
    if isinstance(error, Exception):
        return "server_error", "internal"
    return "cancelled", "cancelled"
