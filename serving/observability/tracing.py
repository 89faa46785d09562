"""Traces with OpenTelemetry: one span per request with one child span per stage, made from the record at its end.

Imported only if traces are enabled. Stages become spans afterwards, from the times in the request record: the path has
no second set of marks, and a request that is not sampled costs one span that records nothing.
"""

from __future__ import annotations

import secrets
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, SamplingResult, TraceIdRatioBased
from opentelemetry.trace import SpanKind, Status, StatusCode, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serving.observability.context import TRACE
from serving.observability.request_record import FAILURES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

    from serving.observability.request_record import RequestRecord
    from serving.types import Outcome

_W3C = TraceContextTextMapPropagator()


class _Random(TraceIdRatioBased):
    """Sampler of a share of the requests, by a random number: callers choose the trace id, which usually decides."""

    def should_sample(self, parent_context: Context | None, trace_id: int, *args: Any, **kwargs: Any) -> SamplingResult:
        """See `Sampler`."""
        del trace_id
        return super().should_sample(parent_context, secrets.randbits(64), *args, **kwargs)


class OpenTelemetry:
    """A `Tracer` that sends to `endpoint` (OTLP over HTTP).

    A request joins the trace of the caller's `traceparent`, but `ratio` of the requests are sampled, whatever the
    caller has decided. With `follow_callers` the decision of a caller's `traceparent` is followed.
    """

    def __init__(
        self, endpoint: str, ratio: float, *, follow_callers: bool = False, exporter: SpanExporter | None = None
    ) -> None:
        ours = _Random(ratio)
        self._provider = TracerProvider(
            sampler=ParentBased(ours)
            if follow_callers
            else ParentBased(ours, remote_parent_sampled=ours, remote_parent_not_sampled=ours),
            resource=Resource.create({"service.name": "captioner", "service.version": version("captioner")}),
            shutdown_on_exit=False,
        )
        exporter = exporter or OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("captioner")
        self._epoch_ns = time.time_ns() - time.perf_counter_ns()

    def begin(self, record: RequestRecord, headers: Mapping[str, str]) -> None:
        """See `Tracer`. The next hop gets the context of an unsampled trace too, so that it does not start another."""
        span = self._tracer.start_span(
            "caption", _W3C.extract(headers), kind=SpanKind.SERVER, start_time=self._ns(record.started)
        )
        record.span = span
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, set_span_in_context(span))
        TRACE.set(carrier)

    def end(self, record: RequestRecord, outcome: Outcome, code: str) -> str | None:
        """See `Tracer`."""
        span: Span | None = record.span
        if span is None or not span.is_recording():
            return None
        context = set_span_in_context(span)
        for stage, started in record.stage_started.items():
            # Encoding is spread over the whole of `generate`: a single span would have a wrong start.
            if stage != "encode":
                child = self._tracer.start_span(stage, context, start_time=self._ns(started))
                child.end(self._ns(started + record.stages_s[stage]))
        span.set_attributes(
            {
                "captioner.request_id": record.request_id,
                "captioner.dialect": record.dialect,
                "captioner.caller": record.caller,
                "captioner.stream": record.stream,
                "captioner.audio_form": record.audio_form,
                "captioner.audio_s": record.audio_s,
                "captioner.output_tokens": record.usage.output_tokens if record.usage else 0,
                "captioner.outcome": outcome.value,
                "captioner.code": code,
                "captioner.encode_s": record.stages_s.get("encode", 0.0),
            }
        )
        if outcome in FAILURES:
            span.set_status(Status(StatusCode.ERROR, code))
        span.end(self._ns(record.ended))
        return format_trace_id(span.get_span_context().trace_id)

    def stop(self) -> None:
        """See `Tracer`."""
        self._provider.shutdown()

    def _ns(self, at_s: float) -> int:
        return self._epoch_ns + round(at_s * 1e9)
