"""Metrics: the name, labels, buckets and meaning of every metric, and the registry that a scrape reads.

Units are base units and part of the name. Labels are bounded: words of the code, or tenants up to a bound. A value that
another component keeps is read by a callback at each scrape (`Gauges.bind`); its name and meaning are in
`CALLBACK_METRICS` nevertheless.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.exposition import ALLOWUTF8
from prometheus_client.registry import Collector

from serving.errors import CaptionerError, Overloaded, RateLimited, UploadRejected, error_code
from serving.observability.batch_metrics import BatchMetrics
from serving.observability.context import Untraced
from serving.observability.included import Included
from serving.observability.money_counter import MoneyCounter
from serving.observability.quality_metrics import QualityMetrics
from serving.observability.request_record import ANSWERED, OUTCOMES, STAGES, RequestRecord

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from prometheus_client.core import Metric

    from serving.observability.context import Tracer

disable_created_metrics()  # type: ignore[no-untyped-call]  # one more series per metric, which nothing here reads

_STAGE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TTFT_BUCKETS = (0.05, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 20, 30, 60, 120, 300)
_E2E_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300, 600, 1800, 3600)
_TPOT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
_AUDIO_BUCKETS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 2400)
_RTF_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)

OTHER_TENANTS, UNKNOWN_TENANT = "other", "none"
"""Label of all tenants beyond the bound together, and label of requests whose tenant is unknown."""

DIALECTS = ("openai", "dashscope", "transcriptions")
ANY_OTHER = "capacity"
REASONS = (
    *("concurrent_requests", "bodies", "downloads", "audio_queue", "engine_queue", "engine_wait"),
    *("journal", "ledger", "budget"),
    ANY_OTHER,
)
"""Reasons for which a caption request is shed; every other reason is counted as `ANY_OTHER`."""

CALLBACK_METRICS = {
    # The process
    "captioner_ready": "1 if this process can make captions now (the answer of /readyz), else 0.",
    "captioner_cpu_seconds_total": "CPU time by part: frontend (this process), audio (its audio workers, dead ones "
    "included), downloads (its download process), engine (the processes of the model).",
    # Audio workers
    "captioner_audio_workers": "Configured number of audio workers.",
    "captioner_audio_workers_busy": "Audio workers that process a clip.",
    "captioner_audio_workers_busy_seconds_total": "Time that audio workers spent on clips, summed over workers.",
    "captioner_audio_worker_deaths_total": "Audio workers that died, of their clip or of an outside cause.",
    "captioner_audio_queue_depth": "Clips queued for an audio worker.",
    "captioner_audio_queue_audio_seconds": "Audio queued for an audio worker, estimated from its size (16 kB per "
    "second).",
    "captioner_downloads_running": "Downloads of URLs that are not finished.",
    "captioner_download_process_deaths_total": "Download processes that died or hung; each was replaced.",
    "captioner_features_bytes": "Memory of features that the engine has not consumed yet.",
    "captioner_body_bytes": "Memory of request bodies in flight.",
    "captioner_connections": "Open connections of clients.",
    "captioner_connections_refused_total": "Connections refused or closed, by reason: address (too many of one "
    "address), descriptors (none left), evicted (closed for a new one while none was left), malformed, headers (too "
    "large), header_timeout, unread (a body after its answer), shutdown (an incomplete body).",
    "captioner_saturation_ratio": "Used fraction of a bound, by resource: concurrent_requests, bodies, downloads, "
    "audio_queue, features, engine_queue, kv_cache, uploads, journal.",
    # The engine, exported by the process that runs it
    "captioner_engine_running": "Captions running in the engine.",
    "captioner_engine_waiting": "Captions queued for the engine.",
    "captioner_engine_running_audio_seconds": "Audio of the captions running in the engine.",
    "captioner_engine_waiting_audio_seconds": "Audio of the captions queued for the engine.",
    "captioner_engine_kv_tokens": "Context tokens reserved in the engine.",
    "captioner_engine_kv_capacity_tokens": "Context tokens that fit in the engine; 0 until the model is loaded.",
    "captioner_engine_steps_total": "Steps that the engine has completed.",
    "captioner_engine_stalled_seconds": "Time since the engine's last step while requests are running; 0 while it "
    "makes progress.",
    "captioner_engine_gpus": "GPUs that the engine uses.",
    # A frontend's view of a cluster: every frontend exports the same, so take the maximum
    "captioner_engine_replicas": "Engine replicas that this frontend knows.",
    "captioner_engine_replicas_ready": "Engine replicas known to this frontend that accept captions.",
    "captioner_engine_retries_total": "Captions that were sent to a second replica.",
    "captioner_replicas_lost_total": "Replicas that ended without deregistering, by replica (frontend, engine), as "
    "counted by the cluster's registry.",
    # Uploads
    "captioner_uploads_bytes": "Disk used by uploaded files, other replicas' included.",
    "captioner_upload_received_bytes_total": "Bytes of stored uploads.",
    # Limits and keys
    "captioner_limits_store_up": "1 if the store of limits answers, or if limits are kept in memory; else 0.",
    "captioner_limits_fallbacks_total": "Decisions made from this process's own memory because the store of limits "
    "did not answer.",
    "captioner_keys_age_seconds": "Age of the snapshot of keys and tenants against which callers are checked.",
    # The ledger
    "captioner_database_up": "1 if the last access to the database succeeded, both by the ledger and to read keys; "
    "else 0.",
    "captioner_ledger_lag_seconds": "Age of the oldest entry that is not in the database yet; 0 if there is none.",
    "captioner_ledger_pending": "Entries that are not in the database yet.",
    "captioner_ledger_journal_bytes": "Disk used by the local journal.",
    "captioner_ledger_journal_limit_bytes": "Disk that the local journal may use; above it new requests are refused.",
    "captioner_ledger_writable": "1 if usage can be recorded; 0 while the disk of data_dir is full or failing, and new "
    "requests are refused.",
    "captioner_ledger_unrecorded": "Ended requests whose records are in memory alone, because disk and database fail.",
    "captioner_ledger_records_total": "Requests that the ledger has closed, by outcome; `lost` counts those of killed "
    "processes and lost machines, closed by this process.",
    "captioner_ledger_write_failures_total": "Batches that the database rejected; each is retried.",
}
"""Metrics read by a callback at each scrape: name and meaning. Names that end in `_total` are counters, else gauges."""

CALLBACK_LABELS = {
    "captioner_cpu_seconds_total": "part",
    "captioner_connections_refused_total": "reason",
    "captioner_saturation_ratio": "resource",
    "captioner_replicas_lost_total": "replica",
    "captioner_ledger_records_total": "outcome",
}
"""Label of the callback metrics that have one; their callbacks return a mapping from label value to number."""


class Gauges:
    """A registry, with the callback metrics that are read at each scrape."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._ready = False
        self.bind("captioner_ready", lambda: self._ready)

    def bind(self, name: str, read: Callable[[], float | Mapping[str, float]]) -> None:
        """Export the metric `name` of `CALLBACK_METRICS`; `read` is called at each scrape."""
        self.registry.register(_CallbackMetric(name, read))

    def include(self, registry: CollectorRegistry, prefix: str) -> None:
        """Export the metrics of another registry whose names begin with `prefix`."""
        self.registry.register(Included(registry, prefix))

    async def expose(self, check_health: Callable[[], Awaitable[None]], accept: str = "") -> tuple[bytes, str]:
        """Return the body of a scrape and its content type, in the format that the scraper accepts."""
        try:
            await check_health()
            self._ready = True
        except CaptionerError:
            self._ready = False
        encode, content_type = choose_encoder(accept)
        if isinstance(encode, partial):
            # The default escapes the colon in vLLM's names to `_`, though a colon is a legal character.
            encode = partial(encode, escaping=ALLOWUTF8)
        return encode(self.registry), content_type


class Metrics(Gauges):
    """The service's metrics of requests, in a separate registry.

    The first `tenants` tenants are labelled by their ids; all later ones share the label `other`.
    """

    def __init__(
        self, registry: CollectorRegistry | None = None, *, tenants: int = 100, tracer: Tracer | None = None
    ) -> None:
        super().__init__(registry)
        self.tracer = tracer or Untraced()
        self._quality = QualityMetrics(self.registry)
        self.batches = BatchMetrics(self.registry, self._count_bill)
        self._tenants, self._max_tenants = {UNKNOWN_TENANT}, tenants + 1
        self._requests = self._counter(
            "captioner_requests",
            "Caption requests that have ended, by dialect, outcome (finished, partial, rejected, failed, "
            "failed_midstream, disconnected, cancelled) and code (the finish reason, or the error's name).",
            "dialect",
            "outcome",
            "code",
        )
        self._requests_shed = self._counter(
            "captioner_requests_shed",
            "Caption requests refused because a bound of the service was reached, by reason: concurrent_requests, "
            "bodies, downloads, audio_queue, engine_queue (full), engine_wait (too long), journal (full), ledger (the "
            "disk of the journal is full or failing), budget (the caller's spending cannot be read), capacity (any "
            "other).",
            "reason",
        )
        self._requests_rate_limited = self._counter(
            "captioner_requests_rate_limited",
            "Caption requests refused by one of the caller's limits, by the error's name.",
            "limit",
        )
        self._in_flight = Gauge("captioner_requests_in_flight", "Caption requests in flight.", registry=self.registry)
        self._audio_decoded = self._counter(
            "captioner_audio_decoded_seconds",
            "Seconds of decoded audio, whatever the outcome of the caption.",
            "dialect",
        )
        self._audio = self._counter(
            "captioner_audio_seconds", "Seconds of audio of answered (finished and partial) captions.", "dialect"
        )
        self._tokens = self._counter(
            "captioner_tokens",
            "Tokens of billed requests, as in the ledger (free ones included), by kind: audio, text (the scaffold), "
            "output.",
            "kind",
        )
        self._stages = self._histogram(
            "captioner_stage_seconds", "Time that one request spent in one stage, by stage.", _STAGE_BUCKETS, "stage"
        )
        self._ttft = self._histogram(
            "captioner_time_to_first_token_seconds",
            "Time from the request's arrival to its first token, fetch and decode included, by the audio's length: "
            "short (to 30 s), medium (to 300 s), long.",
            _TTFT_BUCKETS,
            "length",
        )
        self._tpot = self._histogram(
            "captioner_time_per_output_token_seconds",
            "Mean time between the tokens of one caption, from the first token on.",
            _TPOT_BUCKETS,
        )
        self._e2e = self._histogram(
            "captioner_request_duration_seconds",
            "Time from the request's arrival to its end, by outcome and the audio's length (unknown if it was not "
            "decoded).",
            _E2E_BUCKETS,
            "outcome",
            "length",
        )
        self._durations = self._histogram(
            "captioner_audio_duration_seconds", "Length of the decoded audio of one request.", _AUDIO_BUCKETS
        )
        self._rtf = self._histogram(
            "captioner_real_time_factor_ratio",
            "Time from arrival to end of an answered caption, divided by the length of its audio.",
            _RTF_BUCKETS,
        )
        self._uploads = self._counter(
            "captioner_uploads", "Uploads that have ended, by code (stored, or the error's name).", "code"
        )
        self._tenant_requests = self._counter(
            "captioner_tenant_requests", "Caption requests that have ended, by tenant and outcome.", "tenant", "outcome"
        )
        self._tenant_audio = self._counter(
            "captioner_tenant_audio_seconds", "Seconds of audio of answered captions, by tenant.", "tenant"
        )
        self._tenant_tokens = self._counter(
            "captioner_tenant_tokens",
            "Tokens of billed requests, as in the ledger (free ones included), by tenant and kind.",
            "tenant",
            "kind",
        )
        self._tenant_wait = self._counter(
            "captioner_tenant_wait_seconds", "Time that requests spent in queues, summed, by tenant.", "tenant"
        )
        self._tenant_requests_rate_limited = self._counter(
            "captioner_tenant_requests_rate_limited",
            "Caption requests refused by one of the tenant's limits, by tenant and limit (the error's name).",
            "tenant",
            "limit",
        )
        self._tenant_cost = MoneyCounter(
            "captioner_tenant_cost",
            "Money billed, as in the ledger, in units of the currency, by tenant and currency.",
            ("tenant", "currency"),
            self.registry,
        )
        self._initialise_series()

    def _initialise_series(self) -> None:
        """Export a zero for every event that has not occurred yet.

        If a series appears only with its first event, no rate includes that event.
        """
        for dialect in DIALECTS:
            for outcome, code in OUTCOMES:
                self._requests.labels(dialect, outcome, code)
            self._audio_decoded.labels(dialect)
            self._audio.labels(dialect)
        for reason in REASONS:
            self._requests_shed.labels(reason)
        for limit in (*RateLimited.__subclasses__(), RateLimited):
            self._requests_rate_limited.labels(error_code(limit))
        for kind in ("audio", "text", "output"):
            self._tokens.labels(kind)
        for stage in STAGES:
            self._stages.labels(stage)
        for length in ("short", "medium", "long"):
            self._ttft.labels(length)
            for outcome in ANSWERED:
                self._e2e.labels(outcome, length)
        self._uploads.labels("stored")
        for refusal in UploadRejected.__subclasses__():
            self._uploads.labels(error_code(refusal))

    def begin(self, request_id: str, dialect: str) -> RequestRecord:
        """Open the record of a request. The caller must `finish` it exactly once."""
        self._in_flight.inc()
        return RequestRecord(request_id, dialect)

    def finish(self, record: RequestRecord, error: BaseException | None) -> None:
        """Write the record to metrics, to a trace, whose id becomes the exemplar, and to one log line.

        `error` is the exception that ended the request, `None` if it was answered.
        """
        self._in_flight.dec()
        record.close()
        outcome, code = record.conclude(error)
        trace_id = self.tracer.end(record, outcome, code)
        exemplar = {"trace_id": trace_id} if trace_id else None
        tenant = self._tenant(record.caller)
        self._requests.labels(record.dialect, outcome, code).inc()
        self._tenant_requests.labels(tenant, outcome).inc()
        self._count_refusal(tenant, error)
        audio_s = record.audio_s
        self._e2e.labels(outcome, record.length_class).observe(record.duration_s, exemplar)
        if record.first_token is not None:
            self._ttft.labels(record.length_class).observe(record.first_token - record.started, exemplar)
        for stage, seconds in record.stages_s.items():
            self._stages.labels(stage).observe(seconds, exemplar)
        self._tenant_wait.labels(tenant).inc(record.queued_s)
        self._count_bill(record)
        if record.samples:
            self._durations.observe(audio_s)
            self._audio_decoded.labels(record.dialect).inc(audio_s)
        if record.first_token is not None and (usage := record.usage) and usage.output_tokens > 1:
            self._tpot.observe((record.ended - record.first_token) / (usage.output_tokens - 1), exemplar)
        if outcome in ANSWERED:
            self._quality.count(record)
            self._audio.labels(record.dialect).inc(audio_s)
            self._tenant_audio.labels(tenant).inc(audio_s)
            if audio_s:
                self._rtf.observe(record.duration_s / audio_s)
        record.log(outcome, code, trace_id)

    def _count_bill(self, record: RequestRecord) -> None:
        """Count what the settled record bills."""
        tenant = self._tenant(record.caller)
        if record.billed_nanos:
            self._tenant_cost.add(record.billed_nanos, tenant, record.currency)
        if billed := record.billed:
            for kind in ("audio", "text", "output"):
                self._tokens.labels(kind).inc(tokens := getattr(billed, f"{kind}_tokens"))
                self._tenant_tokens.labels(tenant, kind).inc(tokens)

    def _count_refusal(self, tenant: str, error: BaseException | None) -> None:
        """Count a request that was refused by a bound of the service or by a limit of the tenant."""
        if isinstance(error, Overloaded):
            self._requests_shed.labels(error.reason if error.reason in REASONS else ANY_OTHER).inc()
        if isinstance(error, RateLimited):
            self._requests_rate_limited.labels(limit := error_code(type(error))).inc()
            self._tenant_requests_rate_limited.labels(tenant, limit).inc()

    def upload(self, code: str) -> None:
        """Count an upload that has ended with `code`: `stored`, or the error's name."""
        self._uploads.labels(code).inc()

    def _tenant(self, tenant_id: str) -> str:
        """Return the label of a tenant: its id up to the bound, so that the number of series is bounded."""
        if not tenant_id:
            return UNKNOWN_TENANT
        if tenant_id not in self._tenants:
            if len(self._tenants) >= self._max_tenants:
                return OTHER_TENANTS
            self._tenants.add(tenant_id)
        return tenant_id

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(name, documentation, labels, registry=self.registry)

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, documentation, labels, buckets=buckets, registry=self.registry)


@dataclass(frozen=True, slots=True)
class _CallbackMetric(Collector):
    """A value that another component keeps."""

    name: str
    read: Callable[[], float | Mapping[str, float]]

    def collect(self) -> Iterator[Metric]:
        kind = CounterMetricFamily if self.name.endswith("_total") else GaugeMetricFamily
        label = CALLBACK_LABELS.get(self.name)
        family = kind(self.name.removesuffix("_total"), CALLBACK_METRICS[self.name], labels=[label] if label else [])
        value = self.read()
        if isinstance(value, Mapping):
            for word, number in value.items():
                family.add_metric([word], number)
        else:
            family.add_metric([], value)
        yield family
