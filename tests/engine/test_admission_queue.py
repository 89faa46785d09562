"""The queue of admission control: its order, in which nothing starves, and its bounds. Time is simulated."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from serving.errors import NotReady, Overloaded
from tests.engine.simulated import admission, assert_empty, run, simulate

if TYPE_CHECKING:
    from serving.engine.admission_control import AdmissionControl

pytestmark = pytest.mark.usefixtures("no_stray_tasks")


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
    # Ten tokens of 0.1 s, not a hundred of 0.01 s: the same times in a tenth of the steps.
    async with admission(max_num_seqs=1, fake_tokens=10, fake_tpot_s=0.1, fake_kv_tokens=100_000) as (control, engine):
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
