"""A timeline as one request among others: its share of the engine, its end when the caller leaves, its budget."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import pytest

from serving.observability.request_record import RequestRecord
from serving.types import NO_TENANT, Caller, CaptionRequest, InlineAudio, Sampling, SchedulingClass, TimelineOptions
from tests.audio.film import film
from tests.support.wire import data_url, wav
from tests.timeline.running import FILM, bills, clip_of, service

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from serving.tenancy.usage_session import UsageSession
    from tests.timeline.running import Service

pytestmark = pytest.mark.usefixtures("in_process")


def _base64(clip: str) -> str:
    return clip.partition(",")[2]


def _start(
    running: Service,
    tenant: str,
    clip: str,
    *,
    stream: bool = True,
    timeline: TimelineOptions | None = None,
    **limits: Any,
) -> tuple[AsyncGenerator[Any], UsageSession, RequestRecord]:
    """Return the captions of a request of one tenant, its session and its record, without HTTP."""
    components = running.app.state.components
    caller = Caller(tenant, "key", scheduling_class=SchedulingClass(tenant), **limits)
    record = RequestRecord(f"request-of-{tenant}-{time.perf_counter_ns()}", "openai", caller=tenant, stream=stream)
    session = components.usage_sessions.session(caller, record)
    sampling = Sampling(max_tokens=64)
    request = CaptionRequest(record.request_id, "m", InlineAudio(_base64(clip)), sampling, timeline=timeline)
    path = components.pipeline if timeline is None else components.timelines
    deltas = path.caption(request, record, session, deadline_s=60, on_prepared=lambda: None)
    return deltas, session, record


async def _caption_s(running: Service, tenant: str, clip: str) -> float:
    """Return the seconds that a caption of another tenant takes."""
    deltas, session, _ = _start(running, tenant, clip)
    started = time.perf_counter()
    async with session:
        await session.admit()
        async with aclosing(deltas):
            async for _delta in deltas:
                pass
    return time.perf_counter() - started


async def test_another_tenants_clip(tmp_path: Path) -> None:
    """An 80-piece timeline delays another tenant's clip of 5 s by less than a quarter, also in a small engine."""
    pieces, clip = clip_of(film(400, seed=1)), data_url(wav(5))
    pace: dict[str, Any] = {"max_num_seqs": 4, "fake_ttft_s": 0.05, "fake_tpot_s": 0.004}
    async with service(tmp_path, **pace) as running:
        alone_s = min([await _caption_s(running, "b", clip) for _ in range(3)])
        deltas, session, _ = _start(running, "a", pieces, timeline=TimelineOptions(max_segment_s=5))
        captioned: list[int] = []

        async def read() -> None:
            async with session:
                await session.admit()
                async with aclosing(deltas):
                    async for delta in deltas:
                        captioned.append(delta.segments[0].index)  # noqa: PERF401 - read while it grows

        reading = asyncio.create_task(read())
        while not captioned:  # noqa: ASYNC110 - the audio is being cut
            await asyncio.sleep(0.01)
        running_pieces, during_s = [], []
        for _ in range(6):
            running_pieces.append(running.app.state.components.engine.load.running)
            during_s.append(await _caption_s(running, "b", clip))
        assert not reading.done()
        await reading
    assert captioned == [*range(len(captioned))]
    assert len(captioned) >= 80
    assert max(running_pieces) == 2
    assert min(during_s) <= 1.25 * alone_s


@pytest.mark.parametrize("after", [0, 1])
async def test_caller_leaves(tmp_path: Path, after: int) -> None:
    """A caller that leaves releases the disk, the memory and the engine, and pays for what was written."""
    async with service(tmp_path, fake_ttft_s=0.05, fake_tpot_s=0.01, max_num_seqs=4) as running:
        deltas, session, record = _start(running, "a", clip_of(FILM), timeline=TimelineOptions(max_segment_s=10))

        async def read() -> None:
            async with session:
                await session.admit()
                async with aclosing(deltas):
                    for _ in range(after):
                        await anext(deltas)
                    await anext(deltas)
                    raise AssertionError("not yet")

        task = asyncio.create_task(read())
        while running.engine.load.running < 2 or running.engine.steps < 25 * after + 10:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        task.cancel()
        await asyncio.wait((task,))
        assert task.cancelled()
        assert running.unreleased == (0, 0, 0, 0, 0, 0)
        assert running.engine.load.running == 0
        assert running.engine.aborted == 2
        assert record.usage is not None
        assert record.usage.output_tokens >= 20 * after + 4
    assert bills(tmp_path)[0][2:4] == (record.usage.output_tokens, "cancelled")


async def test_sampled_again(tmp_path: Path) -> None:
    """A blank caption of a piece is generated once more, as that of a full response is."""
    async with service(tmp_path, fake_text=" ", fake_tokens=2) as running:
        answer = await running.compatible(clip_of(FILM), timeline=True)
        assert answer.headers["x-captioner-retried"] == "blank"
        count = len(answer.json()["choices"][0]["message"]["timeline"]["segments"])
        assert len(running.engine.seen) == 2 * count


async def test_no_disk_for_pieces(tmp_path: Path) -> None:
    """A timeline for whose pieces no disk is left is refused with 503; other captions are not."""
    async with service(tmp_path) as running:
        disk = running.app.state.components.pipeline._piece_files
        assert disk.size == 2 * 1024**3
        with disk.acquire(NO_TENANT, disk.size):
            assert (await running.compatible(data_url(wav(1)), timeline=True)).status_code == 503
            assert (await running.compatible(data_url(wav(1)))).status_code == 200
        assert (await running.compatible(data_url(wav(1)), timeline=True)).status_code == 200
        assert running.unreleased == (0, 0, 0, 0, 0, 0)
