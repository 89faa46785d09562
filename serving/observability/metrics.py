"""Every metric's name, label and bucket, and where they are told.

Units are base units, in the name. Labels are bounded: words of the code, or tenants up to a bound. A value that someone
else keeps is read at each scrape (`Gauges.watch`); its name stands here all the same, in `WATCHED`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.exposition import ALLOWUTF8
from prometheus_client.registry import Collector

from serving.errors import CaptionerError, Overloaded, RateLimited, UploadRejected
from serving.observability.context import Untraced
from serving.observability.request_record import OUTCOMES, STAGES, RequestRecord, code_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from prometheus_client.core import Metric

    from serving.observability.context import Tracer

log = logging.getLogger(__name__)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for each, which nothing here reads

_STAGE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TTFT_BUCKETS = (0.05, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 20, 30, 60, 120, 300)
_E2E_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300, 600, 1800, 3600)
_TPOT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
_AUDIO_BUCKETS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 2400)
_RTF_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)

OTHER, NOBODY = "other", "none"
"""Tenants beyond the bound, all together; and requests of which nobody knows whose they are."""

DIALECTS = ("openai", "dashscope")
REASONS = ("concurrent_requests", "bodies", "downloads", "audio_queue", "engine_queue", "engine_wait", "capacity")

WATCHED = {
    # The process
    "captioner_ready": "Whether this process can make captions now, as /readyz tells.",
    "captioner_cpu_seconds_total": "CPU time by part: frontend (this process), audio (its workers, those that have died "
    "included), engine (the processes of the model).",
    # Audio workers
    "captioner_audio_workers": "Audio workers that there should be.",
    "captioner_audio_workers_busy": "Audio workers at work.",
    "captioner_audio_workers_busy_seconds_total": "Time that audio workers were at work, all together.",
    "captioner_audio_worker_deaths_total": "Audio workers that died, each of a clip or of the system.",
    "captioner_audio_queue_depth": "Clips that wait for an audio worker.",
    "captioner_audio_queue_audio_seconds": "Audio that waits for an audio worker, guessed from its bytes "
    "(16 kB a second).",
    "captioner_features_bytes": "Memory of features that wait for the engine.",
    "captioner_body_bytes": "Memory of request bodies under way.",
    "captioner_saturation_ratio": "How much of a bound is taken, by resource: concurrent_requests, bodies, downloads, audio_queue, "
    "features, engine_queue, kv_cache, uploads, journal.",
    # The engine, told where it runs
    "captioner_engine_running": "Captions in the engine.",
    "captioner_engine_waiting": "Captions that wait for the engine.",
    "captioner_engine_running_audio_seconds": "Audio of the captions in the engine.",
    "captioner_engine_waiting_audio_seconds": "Audio of the captions that wait for the engine.",
    "captioner_engine_kv_tokens": "Tokens of context reserved in the engine.",
    "captioner_engine_kv_capacity_tokens": "Tokens of context that fit in the engine; 0 until it has loaded.",
    "captioner_engine_steps_total": "Steps that the engine has taken.",
    "captioner_engine_stalled_seconds": "How long the engine has taken no step though it owes tokens; 0 if it works.",
    "captioner_engine_gpus": "GPUs that the engine holds.",
    # A frontend's view of a cluster: the same from all frontends, so take the maximum
    "captioner_engine_replicas": "Engine replicas known to this frontend.",
    "captioner_engine_replicas_ready": "Of these, can take captions.",
    "captioner_engine_retries_total": "Captions asked for a second time, of another replica.",
    "captioner_replicas_lost_total": "Replicas that ended without saying so, by replica (frontend, engine), as the "
    "directory has seen it.",
    # Uploads
    "captioner_uploads_bytes": "Disk that uploaded files take, other replicas' included.",
    "captioner_upload_received_bytes_total": "Bytes of uploads that were stored.",
    # Limits and keys
    "captioner_limits_store_up": "Whether the store of limits answers; 1 where they are kept in memory.",
    "captioner_limits_fallbacks_total": "Decisions by this process's own memory because the store did not answer.",
    "captioner_keys_age_seconds": "Age of the snapshot of keys and tenants that callers are checked against.",
    # The ledger
    "captioner_database_up": "Whether the last use of the database went well, by the ledger and to read keys.",
    "captioner_ledger_lag_seconds": "Age of the oldest entry that is not in the database yet; 0 if all are.",
    "captioner_ledger_pending": "Entries that are not in the database yet.",
    "captioner_ledger_journal_bytes": "Disk that the local journal takes.",
    "captioner_ledger_journal_limit_bytes": "Disk that it may take; past it new work is refused.",
    "captioner_ledger_records_total": "Requests that the ledger has closed, by ending.",
    "captioner_ledger_write_failures_total": "Batches that the database did not take; they are tried again.",
}
"""What is read at each scrape: name and meaning. Names that end in `_total` are counters, the others gauges."""

WATCHED_LABELS = {
    "captioner_cpu_seconds_total": "part",
    "captioner_saturation_ratio": "resource",
    "captioner_replicas_lost_total": "replica",
    "captioner_ledger_records_total": "ending",
}
"""The label of those that have one; they are read as a mapping."""


class Gauges:
    """A registry, with what is read at each scrape."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._ready = False
        self.watch("captioner_ready", lambda: self._ready)

    def watch(self, name: str, read: Callable[[], float | Mapping[str, float]]) -> None:
        """Tell a value of `WATCHED`, read at each scrape."""
        self.registry.register(_Watched(name, read))

    def include(self, registry: CollectorRegistry, prefix: str) -> None:
        """Tell also what another registry holds under this prefix."""
        self.registry.register(_Included(registry, prefix))

    async def expose(self, check_health: Callable[[], Awaitable[None]], accept: str = "") -> tuple[bytes, str]:
        """The body of a scrape and its content type, in the format that the scraper accepts."""
        try:
            await check_health()
            self._ready = True
        except CaptionerError:
            self._ready = False
        encode, content_type = choose_encoder(accept)
        if isinstance(encode, partial):
            # By default it makes `_` of the colon in vLLM's names, which is as good a character as any.
            encode = partial(encode, escaping=ALLOWUTF8)
        return encode(self.registry), content_type


class Metrics(Gauges):
    """The service's own metrics of requests, on a registry of its own.

    Of at most `tenants` tenants each is told by its id; the rest are folded into one.
    """

    def __init__(
        self, registry: CollectorRegistry | None = None, *, tenants: int = 100, tracer: Tracer | None = None
    ) -> None:
        super().__init__(registry)
        self.tracer = tracer or Untraced()
        self._tenants, self._most_tenants = {NOBODY}, tenants + 1
        self._requests = self._counter(
            "captioner_requests",
            "Caption requests that ended, by dialect, outcome (finished, cancelled, client_error, server_error) and "
            "code (the finish reason, or the name of the error).",
            "dialect",
            "outcome",
            "code",
        )
        self._rejected = self._counter(
            "captioner_requests_shed",
            "Caption requests refused for want of room, by reason: concurrent_requests, bodies, downloads, audio_queue, engine_queue "
            "(full), engine_wait (too long), capacity (any other).",
            "reason",
        )
        self._limited = self._counter(
            "captioner_requests_rate_limited",
            "Caption requests refused by a limit of the caller's, by the error's name.",
            "limit",
        )
        self._in_flight = Gauge("captioner_requests_in_flight", "Caption requests under way.", registry=self.registry)
        self._audio_in = self._counter(
            "captioner_audio_decoded_seconds", "Seconds of audio decoded, whatever became of the caption.", "dialect"
        )
        self._audio = self._counter("captioner_audio_seconds", "Seconds of audio of finished captions.", "dialect")
        self._tokens = self._counter(
            "captioner_tokens",
            "Tokens as billed, of every request that reached the engine: audio, text (the scaffold), output.",
            "kind",
        )
        self._stages = self._histogram(
            "captioner_stage_seconds", "Time that one request spent in one stage.", _STAGE_BUCKETS, "stage"
        )
        self._ttft = self._histogram(
            "captioner_time_to_first_token_seconds",
            "From the request's arrival to its first token, fetch and decode included, by the audio's length: short "
            "(to 30 s), medium (to 300 s), long.",
            _TTFT_BUCKETS,
            "length",
        )
        self._tpot = self._histogram(
            "captioner_time_per_output_token_seconds",
            "Mean time between tokens of one caption, after the first.",
            _TPOT_BUCKETS,
        )
        self._e2e = self._histogram(
            "captioner_request_duration_seconds",
            "From the request's arrival to its end, by outcome and the audio's length (unknown if it was not decoded).",
            _E2E_BUCKETS,
            "outcome",
            "length",
        )
        self._durations = self._histogram(
            "captioner_audio_duration_seconds", "Length of the decoded audio of one request.", _AUDIO_BUCKETS
        )
        self._rtf = self._histogram(
            "captioner_real_time_factor_ratio",
            "Time of a finished caption, from arrival to end, divided by the length of its audio.",
            _RTF_BUCKETS,
        )
        self._uploads = self._counter(
            "captioner_uploads", "Uploads that ended, by code (stored, or the error).", "code"
        )
        self._tenant_requests = self._counter(
            "captioner_tenant_requests", "Caption requests that ended, by tenant and outcome.", "tenant", "outcome"
        )
        self._tenant_audio = self._counter(
            "captioner_tenant_audio_seconds", "Seconds of audio of finished captions, by tenant.", "tenant"
        )
        self._tenant_tokens = self._counter(
            "captioner_tenant_tokens", "Tokens as billed, by tenant and kind.", "tenant", "kind"
        )
        self._tenant_wait = self._counter(
            "captioner_tenant_wait_seconds", "Time that a tenant's requests stood in queues, all together.", "tenant"
        )
        self._tenant_limited = self._counter(
            "captioner_tenant_requests_rate_limited",
            "Requests refused by a limit of the tenant's, by limit.",
            "tenant",
            "limit",
        )
        self._tenant_cost = self._counter(
            "captioner_tenant_cost",
            "Money billed, in whole units of the currency, by tenant; the ledger has the exact sums.",
            "tenant",
            "currency",
        )
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """Tell what has not happened yet: from a counter that appears with its first event, no rate sees that event."""
        for dialect in DIALECTS:
            for outcome, code in OUTCOMES:
                self._requests.labels(dialect, outcome, code)
            self._audio_in.labels(dialect)
            self._audio.labels(dialect)
        for reason in REASONS:
            self._rejected.labels(reason)
        for limit in (*RateLimited.__subclasses__(), RateLimited):
            self._limited.labels(code_of(limit))
        for kind in ("audio", "text", "output"):
            self._tokens.labels(kind)
        for stage in STAGES:
            self._stages.labels(stage)
        for length in ("short", "medium", "long"):
            self._ttft.labels(length)
            self._e2e.labels("finished", length)
        self._uploads.labels("stored")
        for refusal in UploadRejected.__subclasses__():
            self._uploads.labels(code_of(refusal))

    def begin(self, request_id: str, dialect: str) -> RequestRecord:
        """Open the record of a request; whoever begins it finishes it, once."""
        self._in_flight.inc()
        return RequestRecord(request_id, dialect)

    def finish(self, record: RequestRecord, error: BaseException | None) -> None:
        """Tell the record in metrics, as a trace and in one log line. `error`: what ended it, `None`: it was answered.

        The id of a sampled trace becomes the exemplar of what is told.
        """
        self._in_flight.dec()
        record.close()
        outcome, code = record.outcome(error)
        trace_id = self.tracer.end(record, outcome, code)
        exemplar = {"trace_id": trace_id} if trace_id else None
        tenant = self._tenant(record.caller)
        self._requests.labels(record.dialect, outcome, code).inc()
        self._tenant_requests.labels(tenant, outcome).inc()
        self._refuse(tenant, error)
        duration_s, audio_s = record.ended - record.started, record.audio_s
        self._e2e.labels(outcome, record.length).observe(duration_s, exemplar)
        if record.first_token is not None:
            self._ttft.labels(record.length).observe(record.first_token - record.started, exemplar)
        for stage, seconds in record.stages_s.items():
            self._stages.labels(stage).observe(seconds, exemplar)
        self._tenant_wait.labels(tenant).inc(record.waited_s)
        if record.billed_nanos:
            self._tenant_cost.labels(tenant, record.currency).inc(record.billed_nanos / 1e9)
        if record.samples:
            self._durations.observe(audio_s)
            self._audio_in.labels(record.dialect).inc(audio_s)
        if usage := record.usage:
            for kind in ("audio", "text", "output"):
                tokens = getattr(usage, f"{kind}_tokens")
                self._tokens.labels(kind).inc(tokens)
                self._tenant_tokens.labels(tenant, kind).inc(tokens)
            if record.first_token is not None and usage.output_tokens > 1:
                self._tpot.observe((record.ended - record.first_token) / (usage.output_tokens - 1), exemplar)
        if outcome == "finished":
            self._audio.labels(record.dialect).inc(audio_s)
            self._tenant_audio.labels(tenant).inc(audio_s)
            if audio_s:
                self._rtf.observe(duration_s / audio_s)
        _log(record, outcome, code, duration_s, trace_id)

    def _refuse(self, tenant: str, error: BaseException | None) -> None:
        """Count what a bound of ours, or a limit of the tenant's, refused."""
        if isinstance(error, Overloaded):
            self._rejected.labels(error.reason).inc()
        if isinstance(error, RateLimited):
            self._limited.labels(code_of(type(error))).inc()
            self._tenant_limited.labels(tenant, code_of(type(error))).inc()

    def upload(self, code: str) -> None:
        """Count an upload that has ended: `stored`, or the error's name."""
        self._uploads.labels(code).inc()

    def _tenant(self, tenant_id: str) -> str:
        """The label of a tenant: its id for the first so many, lest their number makes the metrics grow."""
        if not tenant_id:
            return NOBODY
        if tenant_id not in self._tenants:
            if len(self._tenants) >= self._most_tenants:
                return OTHER
            self._tenants.add(tenant_id)
        return tenant_id

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(name, documentation, labels, registry=self.registry)

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, documentation, labels, buckets=buckets, registry=self.registry)


@dataclass(frozen=True, slots=True)
class _Watched(Collector):
    """A value that someone else keeps."""

    name: str
    read: Callable[[], float | Mapping[str, float]]

    def collect(self) -> Iterator[Metric]:
        kind = CounterMetricFamily if self.name.endswith("_total") else GaugeMetricFamily
        label = WATCHED_LABELS.get(self.name)
        family = kind(self.name.removesuffix("_total"), WATCHED[self.name], labels=[label] if label else [])
        value = self.read()
        if isinstance(value, Mapping):
            for word, number in value.items():
                family.add_metric([word], number)
        else:
            family.add_metric([], value)
        yield family


@dataclass(frozen=True, slots=True)
class _Included(Collector):
    """What another registry holds under a prefix."""

    other: CollectorRegistry
    prefix: str

    def collect(self) -> Iterator[Metric]:
        return (metric for metric in self.other.collect() if metric.name.startswith(self.prefix))


def _log(record: RequestRecord, outcome: str, code: str, duration_s: float, trace_id: str | None) -> None:
    """One line that tells a request that has ended."""
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
            "audio_s": round(record.audio_s, 3),
            "output_tokens": record.usage.output_tokens if record.usage else 0,
            "duration_s": round(duration_s, 4),
            "stages_s": {stage: round(seconds, 4) for stage, seconds in record.stages_s.items()},
            **({"caption": "".join(record.caption)} if record.caption else {}),
            **({"trace_id": trace_id} if trace_id else {}),
        },
    )
