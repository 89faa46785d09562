"""Admission control: nothing over budget, nothing lost, nothing starved; and the watchdog. Time is simulated."""

from __future__ import annotations

import asyncio
import contextlib
import selectors
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from serving.config import Settings
from serving.engine.admission_control import AdmissionControl
from serving.engine.base import EngineDelta, Load, context_tokens, ignore_start
from serving.engine.fake import FakeEngine, Faults
from serving.errors import AudioTooLong, EngineFailed, EngineStalled, NotReady, Overloaded
from serving.scheduling.output_estimate import OutputEstimate
from serving.types import NO_TENANT, Features, Sampling

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator

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
    """Run `main` to its end in simulated time."""
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        runner.run(main)


def clip(seconds: float) -> Features:
    """Return features of silence."""
    return Features(np.broadcast_to(np.float32(0), (128, max(1, round(seconds * 100)))), round(seconds * 16_000))


@dataclass
class Seen:
    """Captions that reached the engine: their order, and the most at once."""

    order: list[str]
    most: int = 0


class Watched(FakeEngine):
    """A fake engine that records the captions it gets."""

    def __init__(self, settings: Settings, **options: Any) -> None:
        super().__init__(settings, **options)
        self.seen = Seen([])

    async def generate(
        self,
        request_id: str,
        features: Features,
        sampling: Sampling,
        scheduling_class: SchedulingClass = NO_TENANT,
        on_started: Callable[[], None] = ignore_start,
    ) -> AsyncGenerator[EngineDelta]:
        """See `Engine`."""
        del on_started  # admission control is the one that knows
        self.seen.order.append(request_id)
        async with aclosing(super().generate(request_id, features, sampling, scheduling_class)) as deltas:
            async for delta in deltas:
                self.seen.most = max(self.seen.most, self.load.running)
                yield delta


@contextlib.asynccontextmanager
async def admission(faults: Faults | None = None, **changes: Any) -> AsyncGenerator[tuple[AdmissionControl, Watched]]:
    """Start admission control with a watched engine behind it; yield both."""
    chosen = Settings(engine="fake", **{"fake_tpot_s": 0.01, "fake_ttft_s": 0.1, **changes})
    engine = Watched(chosen, faults=faults)
    control = AdmissionControl(engine, chosen)
    await control.start()
    try:
        yield control, engine
    finally:
        await control.stop()


async def run(
    control: AdmissionControl,
    name: str = "id",
    seconds: float = 5,
    scheduling_class: SchedulingClass = NO_TENANT,
    **sampling: Any,
) -> int:
    """Run one caption to its end; return its number of tokens."""
    return sum(
        [delta.tokens async for delta in control.generate(name, clip(seconds), Sampling(**sampling), scheduling_class)]
    )


def assert_empty(control: AdmissionControl) -> None:
    """Assert that nothing runs, waits or is reserved."""
    assert (control.load.running, control.load.waiting, control.load.kv_tokens, control.load.audio_s) == (0, 0, 0, 0)
    assert not control._awaited
    assert control._long_prefill is None


async def test_a_clients_stops_teach_no_length() -> None:
    """A caption whose length the client's stops or choice of tokens may decide teaches only if it is long."""
    async with admission(fake_tokens=20, fake_tpot_s=0.0, fake_ttft_s=0.0) as (control, _):
        before = control._outputs.tokens
        for _ in range(5):
            assert await run(control, stop=(" ",)) <= 2
            await run(control, stop_token_ids=(1,))
            await run(control, stop_token_sequences=((1, 2),))
            await run(control, logit_bias=((1, 100.0),))
            await run(control, allowed_token_ids=(1,))
            await run(control, bad_words=("a",))
            await run(control, min_tokens=1)
        assert control._outputs.tokens == before
        await run(control)
        assert control._outputs.tokens != before


async def test_the_start_of_a_caption_is_reported_when_it_is_admitted() -> None:
    """A caption that waits for a slot has not started; one that is admitted has, before its first token."""
    async with admission(max_num_seqs=1, fake_ttft_s=0.2) as (control, _):
        started: list[str] = []

        async def one(name: str) -> None:
            async for _ in control.generate(name, clip(5), Sampling(), NO_TENANT, lambda: started.append(name)):
                pass

        tasks = [asyncio.create_task(one(name)) for name in ("a", "b", "c")]
        await asyncio.sleep(0.05)
        assert started == ["a", "b"], "one slot, and one caption more"
        tasks[2].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert started == ["a", "b"]


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
def test_the_budget_holds_and_everything_is_released(
    arrivals: list[tuple[float, float, float | None, int, bool]], slots: int, capacity: int, fails_after: int | None
) -> None:
    """Captions that finish, fail or are cancelled leave nothing behind; none is admitted beyond slots or context."""

    async def main() -> None:
        faults = Faults(fail_after_tokens=fails_after)
        async with admission(faults, max_num_seqs=slots, fake_kv_tokens=capacity, fake_tokens=300) as (control, engine):
            results: list[BaseException | int] = []

            async def one(seconds: float, arrives: float, leaves: float | None, sampling: dict[str, Any]) -> None:
                await asyncio.sleep(arrives)
                try:
                    async with asyncio.timeout(leaves):
                        results.append(await run(control, seconds=seconds, **sampling))
                except (TimeoutError, EngineFailed) as error:
                    results.append(error)

            admitted = control._reserve

            def reserve(caption: Any, tokens: int) -> None:
                first = caption.reserved_tokens == 0 and tokens > 0
                admitted(caption, tokens)
                assert control._kv_tokens == sum(each.reserved_tokens for each in control._running | {caption})
                if first:
                    assert control._kv_tokens <= capacity
                    assert len(control._running) <= slots + 1

            control._reserve = reserve  # type: ignore[method-assign]
            async with asyncio.TaskGroup() as group:
                for seconds, arrives, leaves, max_tokens, ignore_eos in arrivals:
                    sampling = {"max_tokens": max_tokens, "ignore_eos": ignore_eos}
                    group.create_task(one(seconds, arrives, leaves, sampling))
            assert len(results) == len(arrivals)
            assert_empty(control)
            assert engine.load.running == 0
            assert engine.seen.most <= slots + 1

    simulate(main())


def test_tokens_in_use_stay_within_what_is_reserved() -> None:
    """A caption that exceeds its estimate reserves more context before another caption is admitted."""

    async def main() -> None:
        async with admission(fake_kv_tokens=6000, fake_tokens=2500, max_num_seqs=8) as (control, _):
            deltas = control.generate("long-winded", clip(5), Sampling())
            tokens = 0
            async with aclosing(deltas):
                async for delta in deltas:
                    tokens += delta.tokens
                    if delta.finish_reason is None:
                        assert control.load.kv_tokens >= context_tokens(clip(5)) + tokens
            assert tokens == 2500
            assert_empty(control)

    simulate(main())


def test_the_default_of_max_tokens_does_not_serialise() -> None:
    """Context is reserved for the estimated output, not for `max_tokens`."""

    async def main() -> None:
        async with admission(fake_kv_tokens=20_000, max_num_seqs=16) as (control, engine):
            async with asyncio.TaskGroup() as group:
                for _ in range(32):
                    group.create_task(run(control, seconds=10))
            assert engine.seen.most == 17

    simulate(main())


def test_a_forced_length_is_reserved_in_full() -> None:
    """With `ignore_eos` the length is known, so captions that do not fit together run one after the other."""

    async def main() -> None:
        async with admission(fake_kv_tokens=5000, max_num_seqs=16, fake_tpot_s=0.001) as (control, engine):
            async with asyncio.TaskGroup() as group:
                for _ in range(4):
                    group.create_task(run(control, seconds=1, ignore_eos=True, max_tokens=4000))
            assert engine.seen.most == 1

    simulate(main())


@given(st.integers(20, 2000), st.integers(0, 1000))
def test_the_estimate_follows_the_captions(tokens: int, seed: int) -> None:
    """After 200 captions of about equal length the estimate is little more than that length; before, the model's."""
    estimate, rng = OutputEstimate(), np.random.default_rng(seed)
    assert estimate.tokens == 600
    lengths = rng.normal(tokens, tokens / 10, 200).astype(int)
    for length in lengths:
        estimate.update(int(length))
    assert tokens < estimate.tokens < 1.5 * tokens + 5


def test_a_clip_that_never_fits_is_rejected() -> None:
    """A clip that is too long for the engine even alone raises `AudioTooLong` at once."""

    async def main() -> None:
        async with admission(fake_kv_tokens=1000) as (control, engine):
            with pytest.raises(AudioTooLong, match="1316 tokens of the engine's context of 1000"):
                await run(control, seconds=100)
            assert await run(control, seconds=60) == 24
            assert engine.seen.order == ["id"]
            assert_empty(control)

    simulate(main())


# ---- order


async def _queue_up(control: AdmissionControl, *clips: tuple[str, float], apart_s: float = 0.0) -> None:
    async with asyncio.TaskGroup() as group:
        for name, seconds in clips:
            group.create_task(run(control, name, seconds))
            await asyncio.sleep(apart_s)


def test_short_clips_go_first() -> None:
    """Waiting clips run in order of their length, not of their arrival."""

    async def main() -> None:
        async with admission(max_num_seqs=1) as (control, engine):
            await _queue_up(control, ("a", 1), ("b", 1), ("long", 600), ("middle", 60), ("short", 5), ("short too", 5))
            assert engine.seen.order == ["a", "b", "short", "short too", "middle", "long"]

    simulate(main())


async def wait_among_short_clips(seconds: float, load: float) -> float:
    """Return the wait of a long clip that finds two short clips running and an empty queue, in seconds.

    Short clips arrive at `load` times the rate that the engine can serve. Raises `Overloaded`.
    """
    async with admission(max_num_seqs=1, fake_tokens=100, fake_kv_tokens=100_000) as (control, engine):
        # Two slots, and 1.1 s for each clip.
        pause_s = 1.1 / 2 / load
        running = [asyncio.create_task(run(control, "first", 1)) for _ in range(2)]
        await asyncio.sleep(0)
        start_s = asyncio.get_running_loop().time()
        long = asyncio.create_task(run(control, "long", seconds))
        short = []
        while "long" not in engine.seen.order and not long.done():
            short.append(asyncio.create_task(run(control, "short", 1)))
            await asyncio.sleep(pause_s)
        wait_s = asyncio.get_running_loop().time() - start_s
        for task in (*running, *short):
            task.cancel()
        await asyncio.gather(*running, *short, return_exceptions=True)
        await long
        return wait_s


@settings(max_examples=10, deadline=None)
@given(st.floats(60, 2400), st.floats(1.05, 4))
@example(2388, 1.9)
@example(1200, 3.8)
def test_nothing_starves(seconds: float, load: float) -> None:
    """Under an endless stream of short clips a long clip runs once those that arrived within its delay are done.

    The delay is half of `max_engine_wait_s` (120 s) for the longest clip, and in proportion for others. The limit: the
    clips that arrive within it take `load` times the delay, which must be less than `max_engine_wait_s`.
    """
    overtaken_s = load * 60 * seconds / 2400
    assume(overtaken_s < 115)

    async def main() -> None:
        assert await wait_among_short_clips(seconds, load) <= overtaken_s + 5

    simulate(main())


def test_beyond_twice_the_load_the_longest_clip_is_rejected() -> None:
    """The limit of `test_nothing_starves`: more work arrives within the delay than fits into `max_engine_wait_s`."""

    async def main() -> None:
        with pytest.raises(Overloaded) as rejected:
            await wait_among_short_clips(2400, 2.1)
        assert rejected.value.reason == "engine_wait"

    simulate(main())


def test_of_very_long_clips_one_is_read_at_a_time() -> None:
    """A second very long clip waits for the first token of the first; short clips overtake it meanwhile."""

    async def main() -> None:
        async with admission(max_num_seqs=8, fake_ttft_s=30, fake_tokens=100) as (control, engine):
            async with asyncio.TaskGroup() as group:
                for name in ("long 1", "long 2"):
                    group.create_task(run(control, name, 2400))
                await asyncio.sleep(1)
                group.create_task(run(control, "short", 5))
                await asyncio.sleep(28)
                assert engine.seen.order == ["long 1", "short"]
                await asyncio.sleep(2)
                assert engine.seen.order == ["long 1", "short", "long 2"]
            assert_empty(control)

    simulate(main())


# ---- bounds


def test_a_full_queue_rejects_with_a_time_to_retry() -> None:
    """Beyond the bound a caption is `Overloaded`; the time to retry follows from the queue and the drain rate."""

    async def main() -> None:
        async with admission(max_num_seqs=1, max_engine_queue=4, fake_ttft_s=10) as (control, _):
            tasks = [asyncio.create_task(run(control, seconds=30)) for _ in range(6)]
            await asyncio.sleep(15)
            assert (control.load.running, control.load.waiting) == (2, 2)
            assert control.load.waiting_audio_s == 60
            tasks += [asyncio.create_task(run(control, seconds=30)) for _ in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(Overloaded) as rejected:
                await run(control, seconds=5)
            # Two of 30 s every 10.3 s, so 4 of them, and the 5 s, take about 21 s.
            assert 10 <= rejected.value.retry_after_s <= 30
            assert rejected.value.reason == "engine_queue"
            await asyncio.gather(*tasks)
            assert_empty(control)

    simulate(main())


def test_the_wait_is_bounded() -> None:
    """A caption that waits for `max_engine_wait_s` is `Overloaded` and removed from the queue."""

    async def main() -> None:
        async with admission(max_num_seqs=1, max_engine_wait_s=20, fake_ttft_s=50) as (control, engine):
            tasks = [asyncio.create_task(run(control)) for _ in range(3)]
            began = asyncio.get_running_loop().time()
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            assert asyncio.get_running_loop().time() - began == pytest.approx(20)
            with pytest.raises(Overloaded) as rejected:
                await tasks[2]
            assert (rejected.value.reason, control.load.waiting) == ("engine_wait", 0)
            await asyncio.gather(*tasks[:2])
            assert len(engine.seen.order) == 2

    simulate(main())


def test_a_cancelled_caption_leaves_the_queue_at_once() -> None:
    """A caption that is cancelled in the queue is removed at once, and never reaches the engine."""

    async def main() -> None:
        async with admission(max_num_seqs=1) as (control, engine):
            tasks = [asyncio.create_task(run(control, str(number))) for number in range(4)]
            await asyncio.sleep(0.01)
            tasks[2].cancel()
            await asyncio.sleep(0)
            assert control.load.waiting == 1
            await asyncio.gather(*tasks, return_exceptions=True)
            assert engine.seen.order == ["0", "1", "3"]
            assert_empty(control)

    simulate(main())


def test_stopping_rejects_waiting_captions() -> None:
    """A caption that waits when the engine is stopped raises `NotReady`."""

    async def main() -> None:
        async with admission(max_num_seqs=1, fake_ttft_s=10) as (control, _):
            tasks = [asyncio.create_task(run(control)) for _ in range(3)]
            await asyncio.sleep(1)
            await control.stop()
            with pytest.raises(NotReady):
                await tasks[2]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert_empty(control)

    simulate(main())


# ---- the watchdog


@pytest.mark.parametrize("after", [0, 7])
def test_an_engine_without_progress_fails(after: int, caplog: pytest.LogCaptureFixture) -> None:
    """After `engine_stall_timeout_s` running, waiting and later captions and the health check raise `EngineStalled`.

    The stall is logged once.
    """

    async def main() -> None:
        async with admission(
            Faults(hang_after_tokens=after), max_num_seqs=1, engine_stall_timeout_s=30, max_engine_wait_s=100
        ) as parts:
            control, engine = parts
            tasks = [asyncio.create_task(run(control)) for _ in range(4)]
            await asyncio.sleep(29)
            await engine.check_health()
            await control.check_health()
            await asyncio.sleep(4)
            for task in tasks:
                with pytest.raises(EngineStalled):
                    await task
            with pytest.raises(EngineStalled):
                await run(control)
            with pytest.raises(EngineFailed):
                await control.check_health()
            await engine.check_health()  # which is why there is a watchdog
            assert_empty(control)
            assert engine.load.running == 0

    simulate(main())
    assert [record.message for record in caplog.records] == ["engine stalled"]


def test_slow_is_not_stalled() -> None:
    """A token of any caption within the timeout is progress; an idle engine is not stalled."""

    async def main() -> None:
        async with admission(fake_ttft_s=29, fake_tpot_s=25, fake_tokens=3, engine_stall_timeout_s=30) as (control, _):
            assert list(await asyncio.gather(run(control), run(control))) == [3, 3]
            await asyncio.sleep(1000)
            assert await run(control) == 3

    simulate(main())


def test_a_long_prefill_is_no_stall() -> None:
    """Steps count as progress, though no caption gets a token."""

    async def main() -> None:
        async with admission(fake_ttft_s=300, engine_stall_timeout_s=30) as (control, engine):
            task = asyncio.create_task(run(control))
            while not task.done():
                engine.steps += 1
                await asyncio.sleep(20)
            assert await task == 24

    simulate(main())


def test_a_client_that_does_not_read_is_no_stall() -> None:
    """A caption whose client does not read awaits no delta, so the engine is not stalled."""

    async def main() -> None:
        async with (
            admission(engine_stall_timeout_s=30) as (control, _),
            aclosing(control.generate("id", clip(5), Sampling())) as deltas,
        ):
            await anext(deltas)
            await asyncio.sleep(300)
            await anext(deltas)
            await control.check_health()

    simulate(main())


def test_a_process_that_was_suspended_has_not_stalled() -> None:
    """A jump of the clock counts as one tick of the watchdog."""

    async def main() -> None:
        async with admission(fake_ttft_s=2, engine_stall_timeout_s=30) as (control, _):
            task = asyncio.create_task(run(control))
            await asyncio.sleep(1)
            loop = asyncio.get_running_loop()
            assert isinstance(loop, SimulatedLoop)
            loop.now_s += 3600
            assert await task == 24

    simulate(main())


def test_load_adds_up() -> None:
    """The load counts running and waiting captions, their seconds and their tokens."""

    async def main() -> None:
        async with admission(max_num_seqs=1, fake_kv_tokens=50_000) as (control, _):
            tasks = [asyncio.create_task(run(control, seconds=10)) for _ in range(3)]
            await asyncio.sleep(0.01)
            tokens = 2 * (context_tokens(clip(10)) + 600)
            assert control.load == Load(2, 1, 30.0, tokens, 50_000, waiting_audio_s=10.0)
            await asyncio.gather(*tasks)
            assert_empty(control)

    simulate(main())


@pytest.fixture(autouse=True)
def _no_stray_tasks(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    """Assert that no warning, as of a stray task, was raised."""
    yield
    assert not recwarn.list
