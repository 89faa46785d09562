"""An engine that is lost in the middle of a caption: a stream ends with an error event, a full response is complete."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from serving.api.app import create_app
from serving.api.dialects.dashscope import DashScopeReply
from serving.api.dialects.openai import OpenAIReply
from serving.config import Settings
from serving.engine.fake import FakeEngine, Faults
from serving.engine.remote.client import RemoteEngine
from tests.engine.test_remote import SECRET, replica, settings, until
from tests.support.wire import COMPATIBLE, NATIVE, compatible_body, data_url, events, native_body, wav

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable
    from pathlib import Path

    from serving.engine.base import Engine, EngineDelta
    from tests.engine.test_remote import Replica

pytestmark = pytest.mark.usefixtures("in_process")

CLIP = data_url(wav(1))
TOKENS = 20
DIALECTS = ("native", "compatible")


@dataclass
class Service:
    """The whole application in this process, over the given engine."""

    client: httpx.AsyncClient
    app: Any

    async def ask(self, dialect: str, *, stream: bool = False, audio: str = CLIP) -> httpx.Response:
        """Send one request."""
        if dialect == "native":
            headers = {"x-dashscope-sse": "enable"} if stream else {}
            return await self.client.post(NATIVE, json=native_body(audio), headers=headers)
        return await self.client.post(COMPATIBLE, json=compatible_body(audio, stream=stream))

    async def metric(self, series: str) -> float:
        """Return the value of one series of the metrics."""
        metrics = self.app.state.components.metrics
        text, _ = await metrics.expose(self.app.state.components.engine.check_health)
        (line,) = [line for line in text.decode().splitlines() if line.startswith(f"{series} ")]
        return float(line.split()[-1])


@asynccontextmanager
async def service(engine: Engine, directory: Path, **changes: object) -> AsyncIterator[Service]:
    """Run the application."""
    given = {"engine": "fake", "auth": False, "audio_workers": 1, "stream_flush_interval_s": 0, **changes}
    app = create_app(Settings(data_dir=directory, uploads_dir=directory / "uploads", **given), engine)  # type: ignore[arg-type]
    async with app.router.lifespan_context(app):
        await until(lambda: app.state.components.engine is engine)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://captioner") as client:
            yield Service(client, app)


@asynccontextmanager
async def cluster(
    directory: Path, *, replicas: int = 2, **changes: object
) -> AsyncIterator[tuple[Service, list[Replica]]]:
    """A frontend that knows only the first engine replica, which writes slowly, until `meet` adds the others."""
    async with AsyncExitStack() as stack:
        paces = [0.05, *[0.001] * (replicas - 1)]
        made = [await stack.enter_async_context(replica(settings(fake_tpot_s=pace))) for pace in paces]
        engine = RemoteEngine()
        engine.update([made[0].address], SECRET)
        await until(lambda: engine.replicas["ready"] == 1)
        yield await stack.enter_async_context(service(engine, directory, **changes)), made


async def meet(running: Service, replicas: list[Replica]) -> None:
    """Add all replicas to those that the frontend uses."""
    engine = running.app.state.components.engine
    engine.update([each.address for each in replicas], SECRET)
    await until(lambda: engine.replicas["ready"] == len(replicas))


async def _killed(lost: Replica) -> None:
    for connection in list(lost.server._connections):
        connection._writer.transport.abort()
    await lost.server.stop()


async def _reset(lost: Replica) -> None:
    for connection in list(lost.server._connections):
        connection._writer.transport.abort()


async def _malformed(lost: Replica) -> None:
    for connection in lost.server._connections:
        connection._writer.write(b"\xff" * 64)


async def _unknown_frame(lost: Replica) -> None:
    header = b'{"op": "state", "seen": 1e999, "failed": false, "load": []}'
    for connection in lost.server._connections:
        connection._writer.write(len(header).to_bytes(4, "big") + bytes(4) + header)


async def _crashed(lost: Replica) -> None:
    lost.fake.die()


LOSSES: tuple[Callable[[Replica], Any], ...] = (_killed, _reset, _malformed, _unknown_frame, _crashed)


@pytest.mark.parametrize("lose", LOSSES)
async def test_a_full_response_is_made_by_another_engine(tmp_path: Path, lose: Callable[[Replica], Any]) -> None:
    """Full responses whose engine is lost have the text and the tokens of the second try alone."""
    async with cluster(tmp_path) as (running, (first, second)):
        asked = [asyncio.create_task(running.ask(dialect)) for dialect in DIALECTS]
        await until(lambda: first.fake.load.running == 2 and first.fake.steps > 8)
        await meet(running, [first, second])
        await lose(first)
        for dialect, task in zip(DIALECTS, asked, strict=True):
            answer, expected = await task, await running.ask(dialect)
            assert answer.status_code == 200, answer.text
            used = answer.json()["usage"]
            assert used["output_tokens" if dialect == "native" else "completion_tokens"] == TOKENS
            kind = "output" if dialect == "native" else "choices"
            assert answer.json()[kind] == expected.json()[kind]
        assert await running.metric("captioner_engine_retries_total") == 2
        assert await running.metric('captioner_tokens_total{kind="output"}') == 4 * TOKENS
        assert await running.metric("captioner_features_bytes") == 0
        assert running.app.state.components.pipeline._kept.used == 0


@pytest.mark.parametrize("lose", LOSSES)
async def test_a_stream_ends_with_an_error_event(tmp_path: Path, lose: Callable[[Replica], Any]) -> None:
    """Streams whose engine is lost end with the error event of their dialect, and are not generated once more."""
    async with cluster(tmp_path) as (running, (first, second)):
        streams = [asyncio.create_task(running.ask(dialect, stream=True)) for dialect in DIALECTS]
        await until(lambda: first.fake.load.running == 2 and first.fake.steps > 8)
        await meet(running, [first, second])
        await lose(first)
        for dialect, stream in zip(DIALECTS, streams, strict=True):
            assert_ends_with_error(await stream, dialect)
        assert await running.metric("captioner_engine_retries_total") == 0
        assert second.fake.finished == 0


def assert_ends_with_error(answer: httpx.Response, dialect: str) -> None:
    """Check that a stream has begun, and that its last event is an error in its dialect."""
    assert answer.status_code == 200
    texts = events(answer.text)
    assert len(texts) > 1
    if dialect == "native":
        assert "event:error" in answer.text
        assert texts[-1]["code"] in {"InternalError", "InternalError.Algo"}, texts[-1]
    else:
        assert texts[-1]["error"]["code"] in {"internal_error", "inference_error"}, texts[-1]
        assert "[DONE]" not in answer.text


async def test_a_full_response_is_tried_twice_at_most(tmp_path: Path) -> None:
    """A full response that two engines have lost fails; a third engine is not asked."""
    async with cluster(tmp_path, replicas=3) as (running, replicas):
        for each in replicas:
            each.fake.faults = Faults(fail_after_tokens=5)
        await meet(running, replicas)
        answer = await running.ask("native")
        assert answer.status_code == 500
        assert sum(each.fake.failed for each in replicas) == 2
        assert await running.metric("captioner_engine_retries_total") == 1
        assert await running.metric('captioner_tokens_total{kind="output"}') == 0  # it is not billed


async def test_features_are_kept_within_a_bound(tmp_path: Path) -> None:
    """A clip whose features exceed a quarter of `max_features_bytes` is not kept: its full response fails."""
    async with cluster(tmp_path, max_features_bytes=2**20) as (running, (first, second)):
        long = data_url(wav(6))  # features of 307,200 bytes, of which 262,144 may be kept
        whole = asyncio.create_task(running.ask("native", audio=long))
        await until(lambda: first.fake.steps > 3)
        assert await running.metric("captioner_features_bytes") == 0
        await meet(running, [first, second])
        await _killed(first)
        assert (await whole).status_code == 500
        assert second.fake.finished == 0


async def test_kept_features_count_as_memory(tmp_path: Path) -> None:
    """Features that are kept for a second try count as `captioner_features_bytes` until the response is complete."""
    async with cluster(tmp_path, replicas=1) as (running, (first,)):
        whole = asyncio.create_task(running.ask("native"))
        await until(lambda: first.fake.steps > 3)
        assert await running.metric("captioner_features_bytes") == 4 * 128 * 100
        assert (await whole).status_code == 200
        assert await running.metric("captioner_features_bytes") == 0


async def test_a_second_try_ends_at_the_deadline(tmp_path: Path) -> None:
    """The deadline counts from the request's arrival: the second try is cut, with its own text and tokens alone."""
    async with cluster(tmp_path, response_timeout_s=1.5) as (running, (first, second)):
        second.fake._tpot_s = 0.5
        whole = asyncio.create_task(running.ask("native"))
        await until(lambda: first.fake.steps > 5)
        await meet(running, [first, second])
        await _killed(first)
        answer = await whole
        assert answer.headers["x-dashscope-partialresponse"] == "true"
        assert 1 <= answer.json()["usage"]["output_tokens"] <= 4


async def test_without_another_engine_a_full_response_fails(tmp_path: Path) -> None:
    """With no other engine the full response is an error, with a status on which clients retry."""
    async with cluster(tmp_path, replicas=1) as (running, (first,)):
        whole = asyncio.create_task(running.ask("native"))
        await until(lambda: first.fake.steps > 3)
        await _killed(first)
        answer = await whole
        assert (answer.status_code, answer.json()["code"]) == (503, "ModelUnavailable")


async def test_on_one_machine_nothing_is_tried_twice(tmp_path: Path) -> None:
    """The only engine of one machine is lost for good: no second try, no features kept, and an error in the dialect."""
    engine = FakeEngine(settings(fake_tpot_s=0.05), faults=Faults(fail_after_tokens=5))
    async with service(engine, tmp_path, quality_guard="stop") as running:
        await until(lambda: engine._ready)
        whole = asyncio.create_task(running.ask("native"))
        await until(lambda: engine.steps > 1)
        assert await running.metric("captioner_features_bytes") == 0
        assert (await whole).status_code == 500
        assert engine.failed == 1
        for dialect in DIALECTS:
            assert_ends_with_error(await running.ask(dialect, stream=True), dialect)


class _Strange(FakeEngine):
    """An engine that ends a caption after three tokens in a way that no engine should."""

    def __init__(self, given: Settings, end: BaseException | None) -> None:
        super().__init__(given)
        self._end = end

    async def generate(self, *arguments: Any, **named: Any) -> AsyncGenerator[EngineDelta]:
        count = 0
        async for delta in super().generate(*arguments, **named):
            yield delta
            count += 1
            if count == 3:
                if self._end is not None:
                    raise self._end
                return


async def assert_errors(running: Service) -> None:
    """Check that captions end with an error of the dialect, streamed and not, without insides."""
    for dialect in DIALECTS:
        stream = await running.ask(dialect, stream=True)
        assert_ends_with_error(stream, dialect)
        full = await running.ask(dialect)
        assert full.status_code == 500
        assert full.json()["code" if dialect == "native" else "error"]
        assert "inside" not in stream.text + full.text
    assert running.app.state.components.pipeline.in_flight == 0


ENDS = [ZeroDivisionError("inside"), asyncio.CancelledError(), MemoryError(), RecursionError(), TimeoutError(), None]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: type(end).__name__)
async def test_whatever_ends_a_caption_is_an_error_of_the_dialect(tmp_path: Path, end: BaseException | None) -> None:
    """An unexpected exception, a stray cancellation or a silent end is an error event or an error, never silence."""
    engine = _Strange(settings(stream_flush_interval_s=0), end)
    async with service(engine, tmp_path) as running:
        await until(lambda: engine._ready)
        await assert_errors(running)


@pytest.mark.parametrize("end", ENDS, ids=lambda end: type(end).__name__)
async def test_an_engine_replica_reports_every_end(tmp_path: Path, end: BaseException | None) -> None:
    """A generation that ends strangely in an engine replica is reported to the frontend at once."""
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(replica(settings(stream_flush_interval_s=0)))
        one.server.engine = strange = _Strange(settings(stream_flush_interval_s=0), end)
        await strange.start()
        engine = RemoteEngine()
        engine.update([one.address], SECRET)
        await until(lambda: engine.replicas["ready"] == 1)
        running = await stack.enter_async_context(service(engine, tmp_path))
        async with asyncio.timeout(5):
            await assert_errors(running)


@pytest.mark.parametrize("broken", ["codec", "settlement"])
async def test_a_fault_of_the_frontend_is_an_error_of_the_dialect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """A fault while a response is written, or its usage is settled, is an error event or an error."""

    def fail(*_: object, **__: object) -> Any:
        raise ZeroDivisionError("inside")

    async with service(engine := FakeEngine(settings()), tmp_path) as running:
        await until(lambda: engine._ready)
        if broken == "settlement":
            monkeypatch.setattr(running.app.state.components.usage_sessions.limiter, "settle", fail)
        for reply in (DashScopeReply, OpenAIReply) if broken == "codec" else ():
            monkeypatch.setattr(reply, "event", _failing_at_the_end(reply.event, fail))
            monkeypatch.setattr(reply, "full_body", fail)
        await assert_errors(running)


def _failing_at_the_end(real: Callable[..., Any], fail: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, delta: real(self, delta) if delta.finish_reason is None else fail()
