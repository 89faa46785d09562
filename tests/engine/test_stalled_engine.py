"""The watchdog of admission control: an engine without progress fails, and a slow one does not. Time is simulated."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from serving.engine.fake import Faults
from serving.errors import EngineFailed, EngineStalled
from serving.types import Sampling
from tests.engine.simulated import SimulatedLoop, admission, assert_empty, clip, run, simulate

pytestmark = pytest.mark.usefixtures("no_stray_tasks")


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
