"""Engine replicas behind sockets: a frontend uses them as one engine, also when one of them fails."""

from __future__ import annotations

import asyncio
import gc
import weakref
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest

from serving.config import Settings
from serving.engine.admission_control import AdmissionControl
from serving.engine.base import Load
from serving.engine.fake import FakeEngine, Faults
from serving.engine.remote import server as servers
from serving.engine.remote.client import RemoteEngine
from serving.engine.remote.server import EngineServer
from serving.engine.remote.wire import Abort, Failure, FeaturesPiece, Generate, Hello, State, encode, read_message
from serving.errors import AudioTooLong, EngineFailed, NotReady, Overloaded
from serving.types import MELS, Features, FinishReason, Sampling, SchedulingClass

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from serving.engine.base import EngineDelta

SECRET = "sesame"  # noqa: S105


@dataclass
class Replica:
    """An engine and its server."""

    fake: FakeEngine
    server: EngineServer

    @property
    def address(self) -> str:
        """Address for frontends."""
        return f"127.0.0.1:{self.server.port}"


def settings(**changes: object) -> Settings:
    """Settings of a fake engine."""
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
    """A frontend's engine over the replicas."""
    engine = RemoteEngine()
    engine.update([each.address for each in replicas], secret)
    await until(lambda: engine.replicas["ready"] == len(replicas) or secret != SECRET)
    try:
        yield engine
    finally:
        await engine.stop()


async def until(condition: object) -> None:
    """Wait until the condition is true."""
    async with asyncio.timeout(10):
        while not condition():  # type: ignore[operator]  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def clip(seconds: float = 1.0, seed: int = 0) -> Features:
    """Features of noise."""
    frames = int(seconds * 100)
    log_mel = np.random.default_rng(seed).standard_normal((MELS, frames), np.float32)
    return Features(log_mel, int(seconds * 16_000))


async def collect(engine: RemoteEngine | FakeEngine, features: Features, **sampling: int) -> list[EngineDelta]:
    """Return all deltas of a caption."""
    async with aclosing(engine.generate("r", features, Sampling(**sampling))) as deltas:  # type: ignore[arg-type]
        return [delta async for delta in deltas]


def result(deltas: list[EngineDelta]) -> tuple[str, int, FinishReason | None]:
    """Return text, tokens and finish reason."""
    return "".join(each.text for each in deltas), sum(each.tokens for each in deltas), deltas[-1].finish_reason


async def test_a_caption_is_the_same_through_a_socket() -> None:
    """Text, token count and finish reason are those of the local engine, for clips of one piece and of many."""
    given = settings()
    local = FakeEngine(given)
    await local.start()
    async with replica(given) as one, frontend(one) as engine:
        for features in (clip(0.01), clip(1), clip(60)):
            assert result(await collect(engine, features)) == result(await collect(local, features))
        limited = result(await collect(engine, clip(1), max_tokens=5))
        assert limited[1:] == (5, FinishReason.LENGTH)
        await until(lambda: engine.load.running == 0)
        assert one.server.features_bytes == 0


async def test_tokens_are_sent_together_but_the_first_at_once() -> None:
    """After the first delta there is one delta per `stream_flush_interval_s`."""
    given = settings(fake_tpot_s=0.005, stream_flush_interval_s=0.05)
    async with replica(given) as one, frontend(one) as engine:
        deltas = await collect(engine, clip())
    assert deltas[0].tokens == 1
    assert 3 <= len(deltas) <= 12
    assert result(deltas)[1] == 20


async def test_closing_a_caption_aborts_it_in_the_replica() -> None:
    """A caption that is closed before its first token, or in the middle, is aborted."""
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
    """A clip goes to the replica whose KV cache has room for it, even if that replica has more audio under way."""
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
    """A caption without output is made by another replica; a caption that had begun fails."""
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
        assert result(await unbegun)[1] == 20
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
    """A clip that has failed on two replicas is not sent to a third."""
    faults = Faults(fail_after_tokens=0)
    async with AsyncExitStack() as stack:
        replicas = [await stack.enter_async_context(replica(settings(), faults)) for _ in range(3)]
        engine = await stack.enter_async_context(frontend(*replicas))
        with pytest.raises(EngineFailed):
            await collect(engine, clip())
        assert sum(each.fake.failed for each in replicas) == 2


async def test_work_goes_where_the_least_audio_is() -> None:
    """Load is compared by seconds of audio: one long clip outweighs several short ones."""
    given = settings(fake_ttft_s=0.5)
    async with AsyncExitStack() as stack:
        replicas = [await stack.enter_async_context(replica(given)) for _ in range(2)]
        engine = await stack.enter_async_context(frontend(*replicas))
        captions = [asyncio.create_task(collect(engine, clip(100)))]
        await asyncio.sleep(0.05)
        captions += [asyncio.create_task(collect(engine, clip(1))) for _ in range(6)]
        await asyncio.gather(*captions)
        assert sorted(each.fake.finished for each in replicas) == [1, 6]


async def test_a_draining_replica_gets_no_more_and_finishes_what_it_has() -> None:
    """A replica that drains, as in a rolling update, finishes its captions; new clips go to the next replica."""
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
        assert result(await collect(engine, clip()))[1] == 20
        assert result(await last)[1] == 20
        await draining
        assert (old.fake.finished, new.fake.finished, engine.retries) == (1, 1, 0)


async def test_a_replica_refuses_what_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clip of `max_audio_s` is accepted; a longer one is `AudioTooLong` and takes no memory."""
    allocated: list[int] = []
    allocate = servers._Incoming.allocate

    def noted(incoming: servers._Incoming) -> None:
        allocated.append(incoming.frames)
        allocate(incoming)

    monkeypatch.setattr(servers._Incoming, "allocate", noted)
    async with replica(settings(max_audio_s=2.0)) as one, frontend(one) as engine:
        assert result(await collect(engine, clip(2)))[1] == 20
        with pytest.raises(AudioTooLong):
            await collect(engine, clip(2.05))
        assert (allocated, one.server.features_bytes) == ([200], 0)


async def test_a_refusal_arrives_with_its_reason() -> None:
    """Features beyond the replica's memory, and a full queue, are `Overloaded` with a time to retry after."""
    given = settings(max_features_bytes=2**20)
    async with replica(given) as one, frontend(one) as engine:
        with pytest.raises(Overloaded) as refused:
            await collect(engine, clip(60))
        assert refused.value.retry_after_s >= 1
        assert result(await collect(engine, clip(1)))[1] == 20
        assert one.server.features_bytes == 0


async def test_a_connection_without_the_secret_is_closed() -> None:
    """Connections without the secret, and those that break the protocol, are closed; others go on."""
    async with replica(settings()) as one, frontend(one) as engine, frontend(one, secret=SECRET * 2) as stranger:
        await asyncio.sleep(0.2)
        with pytest.raises(NotReady):
            await collect(stranger, clip())
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"".join(encode(Hello(SECRET))) + b"\xff" * 64):
            reader, writer = await asyncio.open_connection("127.0.0.1", one.server.port)
            writer.write(words)
            async with asyncio.timeout(10):
                while await reader.read(65536):
                    pass
            writer.close()
        assert result(await collect(engine, clip()))[1] == 20


async def test_a_long_clip_on_the_wire_does_not_hold_up_a_short_one() -> None:
    """Features of both clips alternate on the connection, so the short clip is answered first."""
    async with replica(settings()) as one, frontend(one) as engine:
        long = asyncio.create_task(collect(engine, clip(2000)))
        await asyncio.sleep(0)
        await collect(engine, clip(1))
        assert not long.done()
        assert result(await long)[1] == 20


async def test_features_are_released() -> None:
    """Features are freed after a caption, a failure and a refusal, even before the garbage collector runs."""
    gc.disable()
    try:
        async with replica(settings(max_features_bytes=2**22)) as one, frontend(one) as engine:
            for seconds, faults in ((1.0, Faults()), (1.0, Faults(fail_after_tokens=0)), (60.0, Faults())):
                one.fake.faults = faults
                features = clip(seconds)
                reference = weakref.ref(features.log_mel)
                try:
                    await collect(engine, features)
                except (EngineFailed, Overloaded) as error:
                    del error
                del features
                await asyncio.sleep(0.05)
                assert reference() is None, (seconds, faults)
    finally:
        gc.enable()


async def test_features_are_released_once_a_caption_has_begun() -> None:
    """A frontend frees features with the first delta, since they do not count as memory from then on."""
    async with replica(settings(fake_tpot_s=0.05)) as one, frontend(one) as engine:
        features = clip(1)
        reference = weakref.ref(features.log_mel)
        async with aclosing(engine.generate("r", features, Sampling())) as deltas:
            del features
            await anext(deltas)
            await anext(deltas)
            assert reference() is None


@asynccontextmanager
async def raw_connection(one: Replica) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A frontend's end of the wire after Hello and the first state, with no frontend behind it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", one.server.port)
    writer.writelines(encode(Hello(SECRET)))
    await read_message(reader)
    yield reader, writer
    writer.close()


def request(frames: int) -> bytes:
    """Return the start of generation 0, whose features are to follow."""
    return b"".join(encode(Generate(0, "r", Sampling(), SchedulingClass(), 160 * frames, frames)))


FEATURES = b"".join(encode(FeaturesPiece(0, bytes(4 * MELS * 100))))


@pytest.mark.parametrize("disconnects", [False, True])
async def test_an_abort_right_behind_the_features_leaves_nothing(*, disconnects: bool) -> None:
    """A generation that is aborted before its first step releases its memory, and a drain finishes."""
    async with replica(settings(fake_ttft_s=5)) as one, raw_connection(one) as (_, writer):
        writer.write(request(100) + FEATURES + b"".join(encode(Abort(0))))
        if disconnects:
            writer.close()
        async with asyncio.timeout(10):
            await asyncio.sleep(0.1)
            await one.server.drain()
        assert (one.server.running, one.server.features_bytes, one.fake.load.running) == (0, 0, 0)


async def test_a_frontend_that_stops_in_the_middle_loses_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features that stop arriving release their memory after a time-out, and their request is refused."""
    monkeypatch.setattr(servers, "_UPLOAD_STALL_TIMEOUT_S", 0.5)
    async with replica(settings()) as one, raw_connection(one) as (reader, writer):
        writer.write(request(1000) + FEATURES)
        await until(lambda: one.server.features_bytes == 4 * MELS * 1000)
        async with asyncio.timeout(10):
            while isinstance(message := await read_message(reader), State):
                pass
        assert isinstance(message, Failure)
        assert (message.error, one.server.features_bytes, one.server.running) == ("NotReady", 0, 0)


async def test_a_frontend_reconnects_after_a_malformed_frame(caplog: pytest.LogCaptureFixture) -> None:
    """An engine replica that breaks the protocol is logged, disconnected, and used again after the next connection."""
    frames = [
        b'\x00\x00\x00\x0e\x00\x00\x00\x00{"op":"state"}',
        b"".join(encode(State(-1, ready=True, failed=False, draining=False, load=Load(0, 0, 0, 0, 1)))),
    ]

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frames.pop(0))
        await reader.read()
        writer.close()

    async with await asyncio.start_server(speak, "127.0.0.1") as strange:
        engine = RemoteEngine()
        engine.update([f"127.0.0.1:{strange.sockets[0].getsockname()[1]}"], SECRET)
        await until(lambda: engine.replicas["ready"] == 1)
        (record,) = [each for each in caplog.records if each.getMessage() == "engine replica broke the protocol"]
        assert "malformed frame: KeyError" in vars(record)["error"]
        await engine.stop()


async def test_a_clip_that_has_waited_its_time_does_not_wait_at_another_replica() -> None:
    """A clip is refused after `max_engine_wait_s`, not after twice that, and is not sent to another replica."""
    given = settings(fake_ttft_s=5, max_num_seqs=1, max_engine_wait_s=0.3)
    async with AsyncExitStack() as stack:
        replicas = [await stack.enter_async_context(replica(given)) for _ in range(2)]
        engine = await stack.enter_async_context(frontend(*replicas))
        running = [asyncio.create_task(collect(engine, clip())) for _ in range(4)]
        await until(lambda: all(each.fake.load.running == 2 for each in replicas))  # a slot and one more
        with pytest.raises(Overloaded) as refused:
            await collect(engine, clip())
        assert (refused.value.reason, engine.retries) == ("engine_wait", 0)
        for task in running:
            task.cancel()
