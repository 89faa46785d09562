"""Traces with OpenTelemetry: one span per request, and below it one per stage, made from the record when it ends.

Only imported if traces are wanted. Stages become spans afterwards, with the times that the path has noted anyway: the
path has no second set of marks, and a request that is not sampled costs one span that records nothing.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import TYPE_CHECKING

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, Status, StatusCode, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serving.observability.context import TRACE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

    from serving.observability.request_record import RequestRecord

_W3C = TraceContextTextMapPropagator()


class OpenTelemetry:
    """A `Tracer` that sends to `endpoint` (OTLP over HTTP). A caller that samples is followed; else `ratio` decides."""

    def __init__(self, endpoint: str, ratio: float, *, exporter: SpanExporter | None = None) -> None:
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(ratio)),
            resource=Resource.create({"service.name": "captioner", "service.version": version("captioner")}),
            shutdown_on_exit=False,
        )
        exporter = exporter or OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("captioner")
        self._epoch_ns = time.time_ns() - time.perf_counter_ns()

    def begin(self, record: RequestRecord, headers: Mapping[str, str]) -> None:
        """See `Tracer`. Whoever does the next part is told even of a trace that is not sampled, lest it starts one."""
        span = self._tracer.start_span(
            "caption", _W3C.extract(headers), kind=SpanKind.SERVER, start_time=self._ns(record.started)
        )
        record.span = span
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, set_span_in_context(span))
        TRACE.set(carrier)

    def end(self, record: RequestRecord, outcome: str, code: str) -> str | None:
        """See `Tracer`."""
        span: Span | None = record.span
        if span is None or not span.is_recording():
            return None
        context = set_span_in_context(span)
        for stage, began in record.began.items():
            # Encoding is spread over the whole of `generate`: as a span it would stand at a wrong place.
            if stage != "encode":
                child = self._tracer.start_span(stage, context, start_time=self._ns(began))
                child.end(self._ns(began + record.stages_s[stage]))
        span.set_attributes(
            {
                "captioner.request_id": record.request_id,
                "captioner.dialect": record.dialect,
                "captioner.caller": record.caller,
                "captioner.stream": record.stream,
                "captioner.audio_form": record.audio_form,
                "captioner.audio_s": record.audio_s,
                "captioner.output_tokens": record.usage.output_tokens if record.usage else 0,
                "captioner.outcome": outcome,
                "captioner.code": code,
                "captioner.encode_s": record.stages_s.get("encode", 0.0),
            }
        )
        if outcome == "server_error":
            span.set_status(Status(StatusCode.ERROR, code))
        span.end(self._ns(record.ended))
        return format_trace_id(span.get_span_context().trace_id)

    def stop(self) -> None:
        """See `Tracer`."""
        self._provider.shutdown()

    def _ns(self, at_s: float) -> int:
        return self._epoch_ns + round(at_s * 1e9)
