"""Admission: nothing over budget, nothing lost, nothing starved; and the watchdog. Time is simulated."""

from __future__ import annotations

import asyncio
import contextlib
import selectors
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.config import Settings
from serving.engine.admission_control import GatedEngine
from serving.engine.base import EngineDelta, Load, context_tokens
from serving.engine.fake import FakeEngine, Faults
from serving.errors import AudioTooLong, EngineFailed, EngineStalled, NotReady, Overloaded
from serving.scheduling.output_estimate import OutputEstimate
from serving.types import NO_TENANT, Features, Sampling

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Coroutine, Iterator

    from serving.types import SchedulingClass


class SimulatedLoop(asyncio.SelectorEventLoop):
    """A loop whose clock jumps to the next timer instead of waiting for it."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        loop = self

        class Skip(selectors.DefaultSelector):
            def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
                if timeout:
                    loop.now_s += timeout
                return super().select(0 if timeout is not None else None)

        super().__init__(Skip())

    def time(self) -> float:
        return self.now_s


def simulate(main: Coroutine[Any, Any, None]) -> None:
    """Run it to its end in simulated time."""
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        runner.run(main)


def clip(seconds: float) -> Features:
    """Silence of that length."""
    return Features(np.broadcast_to(np.float32(0), (128, max(1, round(seconds * 100)))), round(seconds * 16_000))


@dataclass
class Seen:
    """What the inner engine was given."""

    order: list[str]
    most: int = 0


class Watched(FakeEngine):
    """A fake engine that tells what it was given, and when."""

    def __init__(self, settings: Settings, **options: Any) -> None:
        super().__init__(settings, **options)
        self.seen = Seen([])

    async def generate(
        self, request_id: str, features: Features, sampling: Sampling, scheduling_class: SchedulingClass = NO_TENANT
    ) -> AsyncGenerator[EngineDelta]:
        """See `Engine`."""
        self.seen.order.append(request_id)
        async with aclosing(super().generate(request_id, features, sampling, scheduling_class)) as deltas:
            async for delta in deltas:
                self.seen.most = max(self.seen.most, self.load.running)
                yield delta


@contextlib.asynccontextmanager
async def gated(faults: Faults | None = None, **changes: Any) -> AsyncGenerator[tuple[GatedEngine, Watched]]:
    """A gate that is started, and the engine behind it."""
    chosen = Settings(engine="fake", **{"fake_tpot_s": 0.01, "fake_ttft_s": 0.1, **changes})
    engine = Watched(chosen, faults=faults)
    gate = GatedEngine(engine, chosen)
    await gate.start()
    try:
        yield gate, engine
    finally:
        await gate.stop()


async def run(
    gate: GatedEngine,
    name: str = "id",
    seconds: float = 5,
    scheduling_class: SchedulingClass = NO_TENANT,
    **sampling: Any,
) -> int:
    """One caption to its end; how many tokens it had."""
    return sum(
        [delta.tokens async for delta in gate.generate(name, clip(seconds), Sampling(**sampling), scheduling_class)]
    )


def assert_empty(gate: GatedEngine) -> None:
    """Nothing runs, waits or is reserved."""
    assert (gate.load.running, gate.load.waiting, gate.load.kv_tokens, gate.load.audio_s) == (0, 0, 0, 0)
    assert not gate._owed
    assert gate._long_prefill is None


# ---- accounting

captions = st.lists(
    st.tuples(
        st.floats(0.01, 900),  # seconds of audio
        st.floats(0, 3),  # arrival
        st.one_of(st.none(), st.floats(0, 4)),  # it leaves then, if it is still there
        st.integers(1, 1500),  # max_tokens
        st.booleans(),  # ignore_eos
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(captions, st.integers(1, 8), st.integers(13_000, 60_000), st.sampled_from([None, 0, 5]))
def test_whatever_comes_the_budget_holds_and_everything_is_given_back(
    arrivals: list[tuple[float, float, float | None, int, bool]], places: int, capacity: int, fails_after: int | None
) -> None:
    """Finished, failed, cancelled while waiting or running: nothing is left; and nothing is admitted without room."""

    async def main() -> None:
        faults = Faults(fail_after_tokens=fails_after)
        async with gated(faults, max_num_seqs=places, fake_kv_tokens=capacity, fake_tokens=300) as (gate, engine):
            ended: list[BaseException | int] = []

            async def one(seconds: float, arrives: float, leaves: float | None, sampling: dict[str, Any]) -> None:
                await asyncio.sleep(arrives)
                try:
                    async with asyncio.timeout(leaves):
                        ended.append(await run(gate, seconds=seconds, **sampling))
                except (TimeoutError, EngineFailed) as error:
                    ended.append(error)

            admitted = gate._reserve

            def reserve(caption: Any, tokens: int) -> None:
                first = caption.reserved_tokens == 0 and tokens > 0
                admitted(caption, tokens)
                assert gate._kv_tokens == sum(each.reserved_tokens for each in gate._running | {caption})
                if first:
                    assert gate._kv_tokens <= capacity
                    assert len(gate._running) <= places + 1

            gate._reserve = reserve  # type: ignore[method-assign]
            async with asyncio.TaskGroup() as group:
                for seconds, arrives, leaves, max_tokens, ignore_eos in arrivals:
                    sampling = {"max_tokens": max_tokens, "ignore_eos": ignore_eos}
                    group.create_task(one(seconds, arrives, leaves, sampling))
            assert len(ended) == len(arrivals)
            assert_empty(gate)
            assert engine.load.running == 0
            assert engine.seen.most <= places + 1

    simulate(main())


def test_tokens_in_use_stay_within_what_is_reserved() -> None:
    """A caption that outgrows what was expected reserves more before anything new is admitted."""

    async def main() -> None:
        async with gated(fake_kv_tokens=6000, fake_tokens=2500, max_num_seqs=8) as (gate, _):
            deltas = gate.generate("long-winded", clip(5), Sampling())
            tokens = 0
            async with aclosing(deltas):
                async for delta in deltas:
                    tokens += delta.tokens
                    if delta.finish_reason is None:
                        assert gate.load.kv_tokens >= context_tokens(clip(5)) + tokens
            assert tokens == 2500
            assert_empty(gate)

    simulate(main())


def test_the_default_of_max_tokens_does_not_serialise() -> None:
    """Room is reserved for what captions take, not for what they might take at most."""

    async def main() -> None:
        async with gated(fake_kv_tokens=20_000, max_num_seqs=16) as (gate, engine):
            async with asyncio.TaskGroup() as group:
                for _ in range(32):
                    group.create_task(run(gate, seconds=10))
            assert engine.seen.most == 17

    simulate(main())


def test_a_forced_length_is_reserved_in_full() -> None:
    """With `ignore_eos` the length is known, so captions that do not fit together run one after the other."""

    async def main() -> None:
        async with gated(fake_kv_tokens=5000, max_num_seqs=16, fake_tpot_s=0.001) as (gate, engine):
            async with asyncio.TaskGroup() as group:
                for _ in range(4):
                    group.create_task(run(gate, seconds=1, ignore_eos=True, max_tokens=4000))
            assert engine.seen.most == 1

    simulate(main())


@given(st.integers(20, 2000), st.integers(0, 1000))
def test_the_estimate_follows_the_captions(tokens: int, seed: int) -> None:
    """After some captions of about equal length it expects little more than that; before, what the model writes."""
    estimate, rng = OutputEstimate(), np.random.default_rng(seed)
    assert estimate.tokens == 600
    lengths = rng.normal(tokens, tokens / 10, 200).astype(int)
    for length in lengths:
        estimate.update(int(length))
    assert tokens < estimate.tokens < 1.5 * tokens + 5


def test_what_never_fits_is_refused() -> None:
    """A clip that is too long for the engine even alone is told so, and at once."""

    async def main() -> None:
        async with gated(fake_kv_tokens=1000) as (gate, engine):
            with pytest.raises(AudioTooLong, match="1316 tokens of the engine's context of 1000"):
                await run(gate, seconds=100)
            assert await run(gate, seconds=60) == 24
            assert engine.seen.order == ["id"]
            assert_empty(gate)

    simulate(main())


# ---- order


async def _queue_up(gate: GatedEngine, *clips: tuple[str, float], apart_s: float = 0.0) -> None:
    async with asyncio.TaskGroup() as group:
        for name, seconds in clips:
            group.create_task(run(gate, name, seconds))
            await asyncio.sleep(apart_s)


def test_short_clips_go_first() -> None:
    """What waits runs by its length, not by its arrival."""

    async def main() -> None:
        async with gated(max_num_seqs=1) as (gate, engine):
            await _queue_up(gate, ("a", 1), ("b", 1), ("long", 600), ("middle", 60), ("short", 5), ("short too", 5))
            assert engine.seen.order == ["a", "b", "short", "short too", "middle", "long"]

    simulate(main())


@settings(max_examples=10, deadline=None)
@given(st.floats(60, 2400), st.floats(0.5, 0.95))
def test_nothing_starves(seconds: float, load: float) -> None:
    """Under an endless stream of short clips a long one runs in time: it is overtaken for at most half the limit."""

    async def main() -> None:
        async with gated(max_num_seqs=1, fake_tokens=100, fake_kv_tokens=100_000) as (gate, engine):
            # Two places and 1.1 s each: this many a second are more than it can take.
            pause_s = 1.1 / 2 * load
            async with asyncio.TaskGroup() as group:
                hold = [group.create_task(run(gate, "first", 1)) for _ in range(2)]
                await asyncio.sleep(0)
                began = asyncio.get_running_loop().time()
                long = group.create_task(run(gate, "long", seconds))
                others = []
                while "long" not in engine.seen.order:
                    others.append(group.create_task(run(gate, "short", 1)))
                    await asyncio.sleep(pause_s)
                waited_s = asyncio.get_running_loop().time() - began
                for task in (*hold, *others):
                    task.cancel()
                await long
            assert waited_s <= 60 * seconds / 2400 * (1 + 1 / load) / load + 5

    simulate(main())


def test_of_very_long_clips_one_is_read_at_a_time() -> None:
    """A second very long clip waits for the first one's first token; short ones pass it meanwhile."""

    async def main() -> None:
        async with gated(max_num_seqs=8, fake_ttft_s=30, fake_tokens=100) as (gate, engine):
            async with asyncio.TaskGroup() as group:
                for name in ("long 1", "long 2"):
                    group.create_task(run(gate, name, 2400))
                await asyncio.sleep(1)
                group.create_task(run(gate, "short", 5))
                await asyncio.sleep(28)
                assert engine.seen.order == ["long 1", "short"]
                await asyncio.sleep(2)
                assert engine.seen.order == ["long 1", "short", "long 2"]
            assert_empty(gate)

    simulate(main())


# ---- bounds


def test_a_full_queue_refuses_with_a_time_to_come_again() -> None:
    """Past the bound a caption is `Overloaded`; when to come again follows from what waits and how fast it goes."""

    async def main() -> None:
        async with gated(max_num_seqs=1, max_engine_queue=4, fake_ttft_s=10) as (gate, _):
            tasks = [asyncio.create_task(run(gate, seconds=30)) for _ in range(6)]
            await asyncio.sleep(15)
            assert (gate.load.running, gate.load.waiting) == (2, 2)
            assert gate.load.waiting_audio_s == 60
            tasks += [asyncio.create_task(run(gate, seconds=30)) for _ in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(Overloaded) as refused:
                await run(gate, seconds=5)
            # Two of 30 s every 10.3 s, so 4 of them, and the 5 s, take about 21 s.
            assert 10 <= refused.value.retry_after_s <= 30
            assert refused.value.reason == "engine_queue"
            await asyncio.gather(*tasks)
            assert_empty(gate)

    simulate(main())


def test_waiting_has_an_end() -> None:
    """Who waits too long is `Overloaded`, and out of the line."""

    async def main() -> None:
        async with gated(max_num_seqs=1, max_engine_wait_s=20, fake_ttft_s=50) as (gate, engine):
            tasks = [asyncio.create_task(run(gate)) for _ in range(3)]
            began = asyncio.get_running_loop().time()
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            assert asyncio.get_running_loop().time() - began == pytest.approx(20)
            with pytest.raises(Overloaded) as refused:
                await tasks[2]
            assert (refused.value.reason, gate.load.waiting) == ("engine_wait", 0)
            await asyncio.gather(*tasks[:2])
            assert len(engine.seen.order) == 2

    simulate(main())


def test_who_leaves_the_line_is_gone_at_once() -> None:
    """A cancelled caption waits no more, and never reaches the engine."""

    async def main() -> None:
        async with gated(max_num_seqs=1) as (gate, engine):
            tasks = [asyncio.create_task(run(gate, str(number))) for number in range(4)]
            await asyncio.sleep(0.01)
            tasks[2].cancel()
            await asyncio.sleep(0)
            assert gate.load.waiting == 1
            await asyncio.gather(*tasks, return_exceptions=True)
            assert engine.seen.order == ["0", "1", "3"]
            assert_empty(gate)

    simulate(main())


def test_stopping_turns_away_what_waits() -> None:
    """Who waits when the engine is stopped is told that it is not ready."""

    async def main() -> None:
        async with gated(max_num_seqs=1, fake_ttft_s=10) as (gate, _):
            tasks = [asyncio.create_task(run(gate)) for _ in range(3)]
            await asyncio.sleep(1)
            await gate.stop()
            with pytest.raises(NotReady):
                await tasks[2]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert_empty(gate)

    simulate(main())


# ---- the watchdog


@pytest.mark.parametrize("after", [0, 7])
def test_an_engine_without_progress_is_given_up(after: int, caplog: pytest.LogCaptureFixture) -> None:
    """What runs, waits and comes ends as `EngineStalled` after `engine_stall_timeout_s`; health tells; it is logged once."""

    async def main() -> None:
        async with gated(
            Faults(hang_after_tokens=after), max_num_seqs=1, engine_stall_timeout_s=30, max_engine_wait_s=100
        ) as parts:
            gate, engine = parts
            tasks = [asyncio.create_task(run(gate)) for _ in range(4)]
            await asyncio.sleep(29)
            await engine.check_health()
            await gate.check_health()
            await asyncio.sleep(4)
            for task in tasks:
                with pytest.raises(EngineStalled):
                    await task
            with pytest.raises(EngineStalled):
                await run(gate)
            with pytest.raises(EngineFailed):
                await gate.check_health()
            await engine.check_health()  # which is why there is a watchdog
            assert_empty(gate)
            assert engine.load.running == 0

    simulate(main())
    assert [record.message for record in caplog.records] == ["the engine makes no progress"]


def test_slow_is_not_stalled() -> None:
    """One token from anyone within the time is progress; so is nothing to do."""

    async def main() -> None:
        async with gated(fake_ttft_s=29, fake_tpot_s=25, fake_tokens=3, engine_stall_timeout_s=30) as (gate, _):
            assert list(await asyncio.gather(run(gate), run(gate))) == [3, 3]
            await asyncio.sleep(1000)
            assert await run(gate) == 3

    simulate(main())


def test_a_long_prefill_is_no_stall() -> None:
    """Steps count as progress, though nobody gets a token."""

    async def main() -> None:
        async with gated(fake_ttft_s=300, engine_stall_timeout_s=30) as (gate, engine):
            task = asyncio.create_task(run(gate))
            while not task.done():
                engine.steps += 1
                await asyncio.sleep(20)
            assert await task == 24

    simulate(main())


def test_a_client_that_does_not_read_is_no_stall() -> None:
    """The engine owes nothing to a caption whose last delta has not been taken."""

    async def main() -> None:
        async with (
            gated(engine_stall_timeout_s=30) as (gate, _),
            aclosing(gate.generate("id", clip(5), Sampling())) as deltas,
        ):
            await anext(deltas)
            await asyncio.sleep(300)
            await anext(deltas)
            await gate.check_health()

    simulate(main())


def test_a_process_that_was_suspended_has_not_stalled() -> None:
    """A jump of the clock is one tick."""

    async def main() -> None:
        async with gated(fake_ttft_s=2, engine_stall_timeout_s=30) as (gate, _):
            task = asyncio.create_task(run(gate))
            await asyncio.sleep(1)
            loop = asyncio.get_running_loop()
            assert isinstance(loop, SimulatedLoop)
            loop.now_s += 3600
            assert await task == 24

    simulate(main())


def test_load_adds_up() -> None:
    """Running and waiting are told in captions, seconds and tokens."""

    async def main() -> None:
        async with gated(max_num_seqs=1, fake_kv_tokens=50_000) as (gate, _):
            tasks = [asyncio.create_task(run(gate, seconds=10)) for _ in range(3)]
            await asyncio.sleep(0.01)
            tokens = 2 * (context_tokens(clip(10)) + 600)
            assert gate.load == Load(2, 1, 30.0, tokens, 50_000, waiting_audio_s=10.0)
            await asyncio.gather(*tasks)
            assert_empty(gate)

    simulate(main())


@pytest.fixture(autouse=True)
def _no_stray_tasks(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    """Nothing is left to the garbage collector to complain about."""
    yield
    assert not recwarn.list
