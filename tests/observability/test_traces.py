"""Traces: off by default and then free, a span per stage in the caller's trace, propagation to the engine."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, format_span_id, format_trace_id
from pydantic import SecretStr

from serving.api import app as app_module
from serving.api.app import create_app
from serving.config import Settings
from serving.engine.fake import FakeEngine, Faults
from serving.engine.remote.client import RemoteEngine
from serving.engine.remote.server import EngineServer
from serving.observability.context import TRACE
from serving.observability.request_record import STAGES, RequestRecord
from serving.observability.tracing import OpenTelemetry
from tests.support.wire import COMPATIBLE, NATIVE, compatible_body, data_url, native_body, wav

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from serving.engine.base import Engine, EngineDelta

SETTINGS = Settings(audio_workers=1, otlp_endpoint="http://127.0.0.1:9", engine="fake", auth=False)
TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01", "tracestate": "vendor=1"}
SLACK_NS = 20_000_000
UNSAMPLED = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-00"}


class Listening(FakeEngine):
    """A fake engine that records the trace context of each caption."""

    def __init__(self, settings: Settings, *, faults: Faults | None = None) -> None:
        super().__init__(settings, faults=faults)
        self.traces: list[Any] = []

    async def generate(self, *arguments: Any) -> AsyncGenerator[EngineDelta]:
        """See `Engine`."""
        self.traces.append(TRACE.get())
        async with aclosing(super().generate(*arguments)) as deltas:
            async for delta in deltas:
                yield delta


@asynccontextmanager
async def service(
    engine: Engine,
    exporter: InMemorySpanExporter,
    monkeypatch: pytest.MonkeyPatch,
    ratio: float = 1.0,
    *,
    follow_callers: bool = False,
    **settings: Any,
) -> AsyncIterator[httpx.AsyncClient]:
    """Run the application with traces that go to `exporter`."""
    traces = OpenTelemetry("http://unused", ratio, follow_callers=follow_callers, exporter=exporter)
    monkeypatch.setattr("serving.api.app._tracer", lambda _: traces)
    with tempfile.TemporaryDirectory() as data:
        app = create_app(SETTINGS.model_copy(update={"data_dir": Path(data)} | settings), engine)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=30) as client,
        ):
            while (await client.get("/readyz")).status_code != 200:  # noqa: ASYNC110 - no event reports it
                await asyncio.sleep(0.01)
            yield client


async def test_a_span_for_each_stage_in_the_callers_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request's span is a child of the caller's; the stages are within it, one after the other."""
    exporter, engine = InMemorySpanExporter(), Listening(SETTINGS)
    async with service(engine, exporter, monkeypatch, ratio=0.0, follow_callers=True) as client:
        answer = await client.post(NATIVE, json=native_body(data_url(wav(1))), headers=SAMPLED)
        assert answer.status_code == 200
        metrics = await client.get("/metrics", headers={"accept": "application/openmetrics-text;version=1.0.0"})
    spans = {span.name: span for span in exporter.get_finished_spans()}
    root = spans.pop("caption")
    assert spans.keys() == set(STAGES) - {"fetch", "encode"}
    assert root.context
    assert root.parent
    assert (format_trace_id(root.context.trace_id), format_span_id(root.parent.span_id)) == (TRACE_ID, SPAN_ID)
    assert root.attributes
    assert root.attributes["captioner.request_id"] == answer.headers["x-request-id"]
    assert root.attributes["captioner.code"] == "stop"
    assert root.start_time
    assert root.end_time
    at = root.start_time
    for stage in STAGES:
        if stage not in spans:
            continue
        span = spans[stage]
        assert span.parent == root.context
        assert span.start_time
        assert span.end_time
        # Within some milliseconds: a worker reports durations, which are counted back from the arrival of its reply.
        assert at - SLACK_NS <= span.start_time <= span.end_time <= root.end_time + SLACK_NS, stage
        at = span.end_time
    (trace,) = engine.traces
    assert trace["traceparent"] == f"00-{TRACE_ID}-{format_span_id(root.context.span_id)}-01"
    assert trace["tracestate"] == "vendor=1"
    assert f'# {{trace_id="{TRACE_ID}"}}' in metrics.text


@pytest.mark.usefixtures("in_process")
async def test_an_unsampled_request_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """If neither ratio nor caller samples, there is no span and no exemplar, and the engine is not to trace either."""
    exporter, engine = InMemorySpanExporter(), Listening(SETTINGS)
    async with service(engine, exporter, monkeypatch, ratio=0.0, follow_callers=True) as client:
        for headers in (UNSAMPLED, {}, {"traceparent": "nonsense"}):
            assert (await client.post(NATIVE, json=native_body(data_url(wav(1))), headers=headers)).status_code == 200
        metrics = await client.get("/metrics", headers={"accept": "application/openmetrics-text;version=1.0.0"})
    assert not exporter.get_finished_spans()
    assert "trace_id" not in metrics.text
    # The lowest bit is the sampling decision; another bit marks a random id.
    assert [int(trace["traceparent"].rpartition("-")[2], 16) & 1 for trace in engine.traces] == [0, 0, 0]


@pytest.mark.usefixtures("in_process")
async def test_a_request_without_a_key_leaves_no_span(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests without a valid key are not traced, whatever they ask for and however many are traced."""
    exporter, engine = InMemorySpanExporter(), Listening(SETTINGS)
    keys = {"auth": True, "api_keys": (SecretStr("sesame"),)}
    async with service(engine, exporter, monkeypatch, ratio=1.0, follow_callers=True, **keys) as client:
        for key in ({}, {"authorization": "Bearer wrong"}):
            for path, body in ((NATIVE, native_body(data_url(wav(1)))), (COMPATIBLE, compatible_body("x"))):
                assert (await client.post(path, json=body, headers=SAMPLED | key)).status_code == 401
        valid = {"authorization": "Bearer sesame"}
        answer = await client.post(NATIVE, json=native_body(data_url(wav(1))), headers=SAMPLED | valid)
        assert answer.status_code == 200
    assert [span.name for span in exporter.get_finished_spans() if span.kind is SpanKind.SERVER] == ["caption"]


@pytest.mark.usefixtures("in_process")
async def test_a_caller_does_not_decide_on_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default neither the caller's flag nor its choice of the trace id decides; the trace id is joined."""
    least = f"00-{'f' * 16}{'0' * 15}1-{SPAN_ID}-01"  # the lowest of ids, which a ratio of the id would always sample
    exporter, engine = InMemorySpanExporter(), Listening(SETTINGS)
    async with service(engine, exporter, monkeypatch, ratio=1e-6) as client:
        for headers in (SAMPLED, {"traceparent": least}):
            assert (await client.post(NATIVE, json=native_body(data_url(wav(1))), headers=headers)).status_code == 200
    assert not exporter.get_finished_spans()
    assert [trace["traceparent"][:35] for trace in engine.traces] == [f"00-{TRACE_ID}", least[:35]]
    assert [int(trace["traceparent"].rpartition("-")[2], 16) & 1 for trace in engine.traces] == [0, 0]
    exporter = InMemorySpanExporter()
    async with service(Listening(SETTINGS), exporter, monkeypatch, ratio=1.0) as client:
        assert (await client.post(NATIVE, json=native_body(data_url(wav(1))), headers=UNSAMPLED)).status_code == 200
    (root,) = (span for span in exporter.get_finished_spans() if span.name == "caption")
    assert root.context
    assert format_trace_id(root.context.trace_id) == TRACE_ID


def test_the_tracer_follows_the_settings() -> None:
    """`trace_ratio` and `trace_follow_callers` reach the sampler; callers are not followed by default."""
    for settings, flags in (({}, {"00", "01"}), ({"trace_follow_callers": True}, {"01"})):
        tracer = app_module._tracer(SETTINGS.model_copy(update=settings | {"trace_ratio": 0.5}))
        found = set()
        for _ in range(100):
            tracer.begin(RequestRecord("r", "openai"), SAMPLED)
            found.add((TRACE.get() or {})["traceparent"][-2:])
        tracer.stop()
        assert found == flags


@pytest.mark.usefixtures("in_process")
async def test_a_failure_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure of the service marks its span with an error; a caller's mistake does not."""
    exporter, engine = InMemorySpanExporter(), Listening(SETTINGS, faults=Faults(fail_after_tokens=3))
    async with service(engine, exporter, monkeypatch) as client:
        assert (await client.post(COMPATIBLE, json=compatible_body(data_url(wav(1))))).status_code == 500
        assert (await client.post(COMPATIBLE, content=b"{")).status_code == 400
    failed, wrong = (span for span in exporter.get_finished_spans() if span.name == "caption")
    assert (failed.status.status_code, failed.status.description) == (StatusCode.ERROR, "engine_failed")
    assert wrong.status.status_code is StatusCode.UNSET


@pytest.mark.usefixtures("in_process")
async def test_the_trace_crosses_to_engine_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine replica of a cluster gets the frontend's trace context."""
    exporter, engine = InMemorySpanExporter(), Listening(SETTINGS)
    await engine.start()
    server, remote = EngineServer(SETTINGS, engine, lambda: "secret"), RemoteEngine()
    await server.start("127.0.0.1")
    try:
        remote.update([f"127.0.0.1:{server.port}"], "secret")
        async with service(remote, exporter, monkeypatch) as client:
            answer = await client.post(NATIVE, json=native_body(data_url(wav(1))), headers=SAMPLED)
            assert answer.status_code == 200
    finally:
        await server.stop()
    assert engine.traces[0]["traceparent"].startswith(f"00-{TRACE_ID}-")


def test_opentelemetry_is_not_imported_without_an_endpoint() -> None:
    """Without an endpoint the service does not load OpenTelemetry."""
    code = (
        "import sys; from serving.api.app import create_app; from serving.config import Settings;"
        "app = create_app(Settings(engine='fake'));"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
