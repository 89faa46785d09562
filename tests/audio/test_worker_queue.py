"""Queue of the audio workers: order of service, bounds of memory and length, cancellation."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from serving import errors
from tests.audio.puppets import FRAME_BYTES, prepare, running, say

if TYPE_CHECKING:
    from pathlib import Path

    from serving.audio.worker_pool import AudioWorkerPool


async def test_clips_are_dispatched_only_within_the_memory_budget() -> None:
    """Clips wait while features fill the memory budget, and are dispatched when it is released."""
    mib_frames = 1024 * 1024 // FRAME_BYTES
    async with running(max_features_bytes=1024 * 1024) as pool, AsyncExitStack() as first:
        await first.enter_async_context(pool.prepare(say(f"samples {mib_frames * 160}")))
        order: list[int] = []

        async def follow(number: int) -> None:
            async with pool.prepare(say(f"samples {(number + 1) * 160}")) as prepared:
                order.append(prepared.features.samples // 160 - 1)
                assert prepared.queue_s >= 0.2

        followers = [asyncio.create_task(follow(number)) for number in range(5)]
        await asyncio.sleep(0.25)
        assert (pool.queued, pool.busy, order) == (5, 0, [])
        assert pool.outstanding_bytes == 1024 * 1024
        await first.aclose()
        await asyncio.gather(*followers)
        assert sorted(order) == list(range(5))
        assert (pool.queued, pool.busy, pool.outstanding_bytes) == (0, 0, 0)


async def test_one_worker_takes_clips_in_order() -> None:
    """Clips of equal size are served first in, first out."""
    async with running(audio_workers=1) as pool:
        order: list[int] = []

        async def follow(number: int) -> None:
            await prepare(pool, f"samples {number}")
            order.append(number)

        await asyncio.gather(*(follow(number) for number in range(160, 180)))
        assert order == list(range(160, 180))


async def test_small_clips_go_first(tmp_path: Path) -> None:
    """Queued clips are ordered by size, base64 text and files alike."""
    big = tmp_path / "big"
    big.write_text("samples 160" + " " * 5_000_000)
    async with running(audio_workers=1, max_audio_s=2400) as pool:
        order: list[str] = []

        async def follow(name: str, clip: str | Path) -> None:
            async with pool.prepare(clip):
                order.append(name)

        clips: dict[str, str | Path] = {
            "at work": say("sleep 0.3"),
            "big": big,
            "middle": say("samples 160" + " " * 500_000),
        }
        clips |= {"small": say("samples 160"), "small too": say("samples 170")}
        tasks = [asyncio.create_task(follow(*clip)) for clip in clips.items()]
        await asyncio.sleep(0.1)
        # 5 MB and 0.5 MB, estimated as if they were MP3.
        assert pool.queued_audio_s == pytest.approx(343.75, abs=1)
        await asyncio.gather(*tasks)
        assert order == ["at work", "small", "small too", "middle", "big"]
        assert pool.queued_audio_s == 0


async def test_a_big_clip_is_overtaken_for_a_bounded_time(tmp_path: Path) -> None:
    """Small clips that arrive long after a big one are served after it."""
    big = tmp_path / "big"
    big.write_text("samples 160" + " " * 500_000)  # counts as 31 s, which may be overtaken for 0.26 s
    async with running(audio_workers=1, max_audio_s=2400) as pool:
        order: list[str] = []

        async def follow(name: str, clip: str | Path) -> None:
            async with pool.prepare(clip):
                order.append(name)

        tasks = [asyncio.create_task(follow(*clip)) for clip in (("at work", say("sleep 1")), ("big", big))]
        await asyncio.sleep(0.1)
        tasks.append(asyncio.create_task(follow("soon", say("samples 160"))))
        await asyncio.sleep(0.4)
        tasks.append(asyncio.create_task(follow("late", say("samples 160"))))
        await asyncio.gather(*tasks)
        assert order == ["at work", "soon", "big", "late"]


@pytest.mark.parametrize("audio_workers", [1, 2, 3])
async def test_one_worker_is_kept_free_of_huge_clips(audio_workers: int, tmp_path: Path) -> None:
    """One worker takes no huge clips, however many are queued; a single worker takes them too."""
    huge = tmp_path / "huge"
    huge.write_text("sleep 1" + " " * 17_000_000)
    async with running(audio_workers=audio_workers, max_audio_s=2400) as pool:
        tasks = [asyncio.create_task(_prepare_file(pool, huge)) for _ in range(4)]
        await asyncio.sleep(0.05)
        assert pool.busy == max(1, audio_workers - 1)
        if audio_workers > 1:
            assert (await prepare(pool, "samples 160")).queue_s < 0.5
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _prepare_file(pool: AudioWorkerPool, clip: Path) -> None:
    async with pool.prepare(clip):
        pass


async def test_a_full_queue_refuses() -> None:
    """A clip beyond the bound of the queue is `Overloaded`, with the seconds until a retry."""
    async with running(audio_workers=1, max_audio_queue=3) as pool:
        tasks = [asyncio.create_task(prepare(pool, "sleep 0.3")) for _ in range(4)]
        await asyncio.sleep(0.05)
        with pytest.raises(errors.Overloaded) as refused:
            await prepare(pool, "samples 160")
        assert refused.value.reason == "audio_queue"
        assert 1 <= refused.value.retry_after_s <= 60
        await asyncio.gather(*tasks)
        assert (await prepare(pool, "samples 160")).features.samples == 160


async def test_cancelled_in_the_queue_a_clip_is_dropped(pool: AudioWorkerPool) -> None:
    """Cancelling a queued clip removes it from the queue at once."""
    tasks = [asyncio.create_task(prepare(pool, "sleep 0.5")) for _ in range(4)]
    await asyncio.sleep(0.05)
    assert (pool.queued, pool.busy) == (2, 2)
    tasks[3].cancel()
    await asyncio.wait(tasks[3:])
    assert (pool.queued, pool.busy) == (1, 2)
    await asyncio.gather(*tasks[:3])
