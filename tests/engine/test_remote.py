"""Engine replicas behind sockets: a frontend finds in them one engine, whatever happens to any of them."""

from __future__ import annotations

import asyncio
import gc
import weakref
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from serving.config import Settings
from serving.engine.admission_control import AdmissionControl
from serving.engine.base import Load
from serving.engine.fake import FakeEngine, Faults
from serving.engine.remote import server as servers
from serving.engine.remote.client import RemoteEngine
from serving.engine.remote.server import EngineServer
from serving.engine.remote.wire import frame, known, read_frame
from serving.errors import EngineFailed, NotReady, Overloaded
from serving.types import MELS, Features, FinishReason, Sampling, SchedulingClass

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from serving.engine.base import EngineDelta

SECRET = "sesame"  # noqa: S105


@dataclass
class Replica:
    """An engine, and the socket before it."""

    fake: FakeEngine
    server: EngineServer

    @property
    def address(self) -> str:
        """Where frontends reach it."""
        return f"127.0.0.1:{self.server.port}"


def settings(**changes: object) -> Settings:
    """Of a fake engine."""
    return Settings(engine="fake", fake_tokens=20, **changes)  # type: ignore[arg-type]


@asynccontextmanager
async def replica(given: Settings, faults: Faults | None = None) -> AsyncIterator[Replica]:
    """An engine behind a socket."""
    fake = FakeEngine(given, faults=faults)
    engine = AdmissionControl(fake, given)
    server = EngineServer(given, engine, lambda: SECRET)
    await engine.start()
    await server.start("127.0.0.1")
    try:
        yield Replica(fake, server)
    finally:
        await server.stop()
        await engine.stop()


@asynccontextmanager
async def frontend(*replicas: Replica, secret: str = SECRET) -> AsyncIterator[RemoteEngine]:
    """An engine that finds the replicas."""
    engine = RemoteEngine()
    engine.update([each.address for each in replicas], secret)
    await until(lambda: engine.replicas["ready"] == len(replicas) or secret != SECRET)
    try:
        yield engine
    finally:
        await engine.stop()


async def until(condition: object) -> None:
    """Wait until something has become true."""
    async with asyncio.timeout(10):
        while not condition():  # type: ignore[operator]  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def clip(seconds: float = 1.0, seed: int = 0) -> Features:
    """Features of noise."""
    frames = int(seconds * 100)
    log_mel = np.random.default_rng(seed).standard_normal((MELS, frames), np.float32)
    return Features(log_mel, int(seconds * 16_000))


async def collect(engine: RemoteEngine | FakeEngine, features: Features, **sampling: int) -> list[EngineDelta]:
    """All pieces of a caption."""
    async with aclosing(engine.generate("r", features, Sampling(**sampling))) as deltas:  # type: ignore[arg-type]
        return [delta async for delta in deltas]


def told(deltas: list[EngineDelta]) -> tuple[str, int, FinishReason | None]:
    """Text, tokens and finish reason."""
    return "".join(each.text for each in deltas), sum(each.tokens for each in deltas), deltas[-1].finish_reason


async def test_a_caption_is_the_same_through_a_socket() -> None:
    """Text, token count and finish reason are those of the engine itself, for clips of one piece and of many."""
    given = settings()
    local = FakeEngine(given)
    await local.start()
    async with replica(given) as one, frontend(one) as engine:
        for features in (clip(0.01), clip(1), clip(60)):
            assert told(await collect(engine, features)) == told(await collect(local, features))
        limited = told(await collect(engine, clip(1), max_tokens=5))
        assert limited[1:] == (5, FinishReason.LENGTH)
        await until(lambda: engine.load.running == 0)
        assert one.server.features_bytes == 0


async def test_tokens_are_handed_over_together_but_the_first_at_once() -> None:
    """Between the first piece and the last, one piece an interval."""
    given = settings(fake_tpot_s=0.005, stream_flush_interval_s=0.05)
    async with replica(given) as one, frontend(one) as engine:
        deltas = await collect(engine, clip())
    assert deltas[0].tokens == 1
    assert 3 <= len(deltas) <= 12
    assert told(deltas)[1] == 20


async def test_closing_a_caption_aborts_it_in_the_replica() -> None:
    """Before the first token, and in the middle."""
    given = settings(fake_ttft_s=0.2, fake_tpot_s=0.2)
    async with replica(given) as one, frontend(one) as engine:
        waiting = asyncio.create_task(collect(engine, clip()))
        await until(lambda: one.fake.load.running == 1)
        waiting.cancel()
        await until(lambda: one.fake.aborted == 1)
        async with aclosing(engine.generate("r", clip(), Sampling())) as deltas:
            await anext(deltas)
        await until(lambda: one.fake.aborted == 2)
        assert one.server.running == 0
        assert one.server.features_bytes == 0


async def test_a_clip_goes_where_its_context_has_room() -> None:
    """Even to the replica with more audio under way, rather than to wait for room at the other."""
    small, large = settings(fake_kv_tokens=1000, fake_tpot_s=0.5), settings(fake_tpot_s=0.5)
    async with AsyncExitStack() as stack:
        replicas = [await stack.enter_async_context(replica(given)) for given in (small, large)]
        engine = await stack.enter_async_context(frontend(*replicas))
        engine.update([replicas[0].address], SECRET)
        running = [asyncio.create_task(collect(engine, clip(40)))]
        await until(lambda: replicas[0].fake.load.running == 1)
        engine.update([each.address for each in replicas], SECRET)
        await until(lambda: engine.replicas["ready"] == 2 and engine.load.kv_tokens)
        for expected in (1, 2):
            running.append(asyncio.create_task(collect(engine, clip(60))))
            await until(lambda count=expected: replicas[1].fake.load.running == count)
        assert replicas[0].fake.load.running == 1
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def test_a_lost_replica_costs_only_what_had_begun() -> None:
    """A caption without output is made by another replica; one that had begun fails."""
    slow, fast = settings(fake_ttft_s=5), settings()
    async with AsyncExitStack() as stack:
        lost = await stack.enter_async_context(replica(slow))
        other = await stack.enter_async_context(replica(fast))
        engine = await stack.enter_async_context(frontend(lost))
        unbegun = asyncio.create_task(collect(engine, clip()))
        await until(lambda: lost.fake.load.running == 1)
        engine.update([lost.address, other.address], SECRET)
        await until(lambda: engine.replicas["ready"] == 2)
        await lost.server.stop()
        assert told(await unbegun)[1] == 20
        assert (engine.retries, other.fake.finished) == (1, 1)
    async with replica(settings(fake_tpot_s=0.2)) as one, frontend(one) as engine:
        async with aclosing(engine.generate("r", clip(), Sampling())) as deltas:
            await anext(deltas)
            await one.server.stop()
            with pytest.raises(EngineFailed):
                await anext(deltas)
        assert engine.retries == 0
        with pytest.raises(NotReady):
            await engine.check_health()


async def test_a_clip_is_tried_twice_at_most() -> None:
    """What kills or fails two replicas gets no third."""
    faults = Faults(fail_after_tokens=0)
    async with AsyncExitStack() as stack:
        replicas = [await stack.enter_async_context(replica(settings(), faults)) for _ in range(3)]
        engine = await stack.enter_async_context(frontend(*replicas))
        with pytest.raises(EngineFailed):
            await collect(engine, clip())
        assert sum(each.fake.failed for each in replicas) == 2


async def test_work_goes_where_the_least_audio_is() -> None:
    """By seconds of audio: one long clip outweighs several short ones."""
    given = settings(fake_ttft_s=0.5)
    async with AsyncExitStack() as stack:
        replicas = [await stack.enter_async_context(replica(given)) for _ in range(2)]
        engine = await stack.enter_async_context(frontend(*replicas))
        captions = [asyncio.create_task(collect(engine, clip(100)))]
        await asyncio.sleep(0.05)
        captions += [asyncio.create_task(collect(engine, clip(1))) for _ in range(6)]
        await asyncio.gather(*captions)
        assert sorted(each.fake.finished for each in replicas) == [1, 6]


async def test_a_draining_replica_gets_no_more_and_ends_what_it_has() -> None:
    """As in a rolling update."""
    given = settings(fake_ttft_s=0.3)
    async with AsyncExitStack() as stack:
        old = await stack.enter_async_context(replica(given))
        engine = await stack.enter_async_context(frontend(old))
        last = asyncio.create_task(collect(engine, clip()))
        await until(lambda: old.fake.load.running == 1)
        new = await stack.enter_async_context(replica(given))
        engine.update([old.address, new.address], SECRET)
        await until(lambda: engine.replicas["ready"] == 2)
        draining = asyncio.create_task(old.server.drain())
        await until(lambda: engine.replicas == {"ready": 1, "not_ready": 1})
        engine.update([new.address], SECRET)
        assert told(await collect(engine, clip()))[1] == 20
        assert told(await last)[1] == 20
        await draining
        assert (old.fake.finished, new.fake.finished, engine.retries) == (1, 1, 0)


async def test_a_refusal_arrives_with_its_reason() -> None:
    """Features beyond the replica's memory, and a full queue, are `Overloaded`, with when to come again."""
    given = settings(max_features_bytes=2**20)
    async with replica(given) as one, frontend(one) as engine:
        with pytest.raises(Overloaded) as refused:
            await collect(engine, clip(60))
        assert refused.value.retry_after_s >= 1
        assert told(await collect(engine, clip(1)))[1] == 20
        assert one.server.features_bytes == 0


async def test_nobody_enters_without_the_secret() -> None:
    """A stranger is hung up on, and so is whoever speaks nonsense; others go on."""
    async with replica(settings()) as one, frontend(one) as engine, frontend(one, secret=SECRET * 2) as stranger:
        await asyncio.sleep(0.2)
        with pytest.raises(NotReady):
            await collect(stranger, clip())
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"".join(frame({"secret": SECRET})) + b"\xff" * 64):
            reader, writer = await asyncio.open_connection("127.0.0.1", one.server.port)
            writer.write(words)
            async with asyncio.timeout(10):
                while await reader.read(65536):
                    pass
            writer.close()
        assert told(await collect(engine, clip()))[1] == 20


async def test_a_long_clip_on_its_way_does_not_hold_up_a_short_one() -> None:
    """Their features alternate on the connection."""
    async with replica(settings()) as one, frontend(one) as engine:
        long = asyncio.create_task(collect(engine, clip(2000)))
        await asyncio.sleep(0)
        await collect(engine, clip(1))
        assert not long.done()
        assert told(await long)[1] == 20


async def test_features_are_let_go() -> None:
    """After a caption, a failure, and a refusal nothing holds them, even before the collector runs."""
    gc.disable()
    try:
        async with replica(settings(max_features_bytes=2**22)) as one, frontend(one) as engine:
            for seconds, faults in ((1.0, Faults()), (1.0, Faults(fail_after_tokens=0)), (60.0, Faults())):
                one.fake.faults = faults
                features = clip(seconds)
                gone = weakref.ref(features.log_mel)
                try:
                    await collect(engine, features)
                except (EngineFailed, Overloaded) as error:
                    del error
                del features
                await asyncio.sleep(0.05)
                assert gone() is None, (seconds, faults)
    finally:
        gc.enable()


async def test_features_are_let_go_once_a_caption_has_begun() -> None:
    """They are no longer counted from then on, so a frontend must not keep them while the caption is written."""
    async with replica(settings(fake_tpot_s=0.05)) as one, frontend(one) as engine:
        features = clip(1)
        gone = weakref.ref(features.log_mel)
        async with aclosing(engine.generate("r", features, Sampling())) as deltas:
            del features
            await anext(deltas)
            await anext(deltas)
            assert gone() is None


@asynccontextmanager
async def spoken(one: Replica) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A frontend's end of the wire, and nobody behind it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", one.server.port)
    writer.writelines(frame({"secret": SECRET}))
    await read_frame(reader)
    yield reader, writer
    writer.close()


def request(frames: int, **more: Any) -> bytes:
    """The beginning of one, whose features are to come."""
    header = {"op": "generate", "id": 0, "request_id": "r", "samples": 160 * frames, "frames": frames}
    return b"".join(frame({**header, "sampling": asdict(Sampling()), "share": asdict(SchedulingClass()), **more}))


FEATURES = b"".join(frame({"op": "features", "id": 0}, bytes(4 * MELS * 100)))


@pytest.mark.parametrize("hang_up", [False, True])
async def test_an_end_right_behind_the_features_leaves_nothing(*, hang_up: bool) -> None:
    """Aborted before its first step, a generation still gives its memory back, and a drain ends."""
    async with replica(settings(fake_ttft_s=5)) as one, spoken(one) as (_, writer):
        writer.write(request(100) + FEATURES + b"".join(frame({"op": "abort", "id": 0})))
        if hang_up:
            writer.close()
        async with asyncio.timeout(10):
            await asyncio.sleep(0.1)
            await one.server.drain()
        assert (one.server.running, one.server.features_bytes, one.fake.load.running) == (0, 0, 0)


async def test_a_frontend_that_stops_in_the_middle_loses_its_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features that go no further count for nothing after a while, and their request is refused."""
    monkeypatch.setattr(servers, "_STALLED_S", 0.5)
    async with replica(settings()) as one, spoken(one) as (reader, writer):
        writer.write(request(1000) + FEATURES)
        await until(lambda: one.server.features_bytes == 4 * MELS * 1000)
        async with asyncio.timeout(10):
            while (header := (await read_frame(reader))[0])["op"] != "error":
                pass
        assert (header["error"], one.server.features_bytes, one.server.running) == ("NotReady", 0, 0)


async def test_an_update_may_add_fields() -> None:
    """Of a newer frontend to an older engine, and the other way round; what is unknown is passed over."""
    async with replica(settings()) as one, spoken(one) as (reader, writer):
        newer: dict[str, Any] = {
            "share": asdict(SchedulingClass()) | {"new": 1},
            "sampling": asdict(Sampling()) | {"new": 1},
        }
        writer.write(request(100, **newer, new=1) + FEATURES)
        async with asyncio.timeout(10):
            while (header := (await read_frame(reader))[0])["op"] != "deltas":
                assert header["op"] == "state"
    assert known(Load, {**asdict(Load(1, 2, 3.0, 4, 5)), "new": 6}) == Load(1, 2, 3.0, 4, 5)


async def test_a_frontend_connects_anew_after_nonsense(caplog: pytest.LogCaptureFixture) -> None:
    """An engine that breaks the protocol is lost for the moment, and said to be so, not for good."""
    said: list[dict[str, Any]] = [
        {"op": "state"},
        {"op": "state", "ready": True, "failed": False, "seen": -1, "load": asdict(Load(0, 0, 0, 0, 1))},
    ]

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.writelines(frame(said.pop(0)))
        await reader.read()
        writer.close()

    async with await asyncio.start_server(speak, "127.0.0.1") as strange:
        engine = RemoteEngine()
        engine.update([f"127.0.0.1:{strange.sockets[0].getsockname()[1]}"], SECRET)
        await until(lambda: engine.replicas["ready"] == 1)
        assert "broke the protocol: a malformed frame: KeyError" in caplog.text
        await engine.stop()


async def test_who_has_waited_his_time_does_not_wait_again_elsewhere() -> None:
    """The refusal comes after `max_engine_wait_s`, not after twice that; a full queue is another matter."""
    given = settings(fake_ttft_s=5, max_num_seqs=1, max_engine_wait_s=0.3)
    async with AsyncExitStack() as stack:
        replicas = [await stack.enter_async_context(replica(given)) for _ in range(2)]
        engine = await stack.enter_async_context(frontend(*replicas))
        running = [asyncio.create_task(collect(engine, clip())) for _ in range(4)]
        await until(lambda: all(each.fake.load.running == 2 for each in replicas))  # a place and one more
        with pytest.raises(Overloaded) as refused:
            await collect(engine, clip())
        assert (refused.value.reason, engine.retries) == ("engine_wait", 0)
        for task in running:
            task.cancel()
