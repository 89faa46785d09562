"""Watchdog of audio workers: a worker that is stopped or makes no progress is replaced, and clips go on."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from serving import errors
from serving.audio.worker_pool import AudioWorkerPool
from tests.audio.puppets import PUPPET, pids, prepare, running, say, settings, until

if TYPE_CHECKING:
    from pathlib import Path


async def test_a_stopped_worker_at_work_is_replaced() -> None:
    """The clip of a worker that is stopped goes to another worker within seconds, whatever its own time limit."""
    async with running(audio_workers=1, audio_timeout_s=60) as pool:
        task = asyncio.create_task(prepare(pool, "sleep 0.3"))
        await until(lambda: pool.busy == 1)
        (victim,) = pids(pool)
        os.kill(victim, signal.SIGSTOP)
        began = time.monotonic()
        assert (await task).features.samples == 1600
        assert time.monotonic() - began < 10
        assert victim not in pids(pool)
        assert pool.deaths == 1


async def test_stopped_idle_workers_are_replaced() -> None:
    """Workers that are stopped while idle are replaced before any clip comes, and later clips are decoded."""
    async with running() as pool:
        before = pids(pool)
        for pid in before:
            os.kill(pid, signal.SIGSTOP)
        await until(lambda: not pids(pool) & before and len(pool._idle) == 2)
        assert (await prepare(pool, "samples 160")).features.samples == 160


async def test_a_clip_sent_to_a_stopped_worker_is_decoded() -> None:
    """A clip that is sent to a worker just after it was stopped goes to another worker."""
    async with running(audio_workers=1, audio_timeout_s=60) as pool:
        (victim,) = pids(pool)
        os.kill(victim, signal.SIGSTOP)
        assert (await prepare(pool, "samples 160")).features.samples == 160


async def test_a_clip_whose_workers_are_stopped_twice_fails() -> None:
    """A clip is moved once only: it may be the clip that stops its worker."""
    async with running(audio_workers=1, audio_timeout_s=60) as pool:
        task = asyncio.create_task(prepare(pool, "sleep 30"))
        for deaths in (0, 1):
            await until(lambda deaths=deaths: pool.deaths == deaths and pool.busy == 1)  # type: ignore[misc]
            (victim,) = pids(pool)
            os.kill(victim, signal.SIGSTOP)
        with pytest.raises(errors.AudioUnreadable):
            await task


async def test_a_worker_that_is_stopped_briefly_goes_on() -> None:
    """A worker that is continued at once keeps its clip."""
    async with running(audio_workers=1) as pool:
        task = asyncio.create_task(prepare(pool, "sleep 0.5"))
        await until(lambda: pool.busy == 1)
        (pid,) = pids(pool)
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(0.1)
        os.kill(pid, signal.SIGCONT)
        assert (await task).features.samples == 1600
        assert pids(pool) == {pid}


async def test_a_worker_that_masks_its_signals_is_killed() -> None:
    """A clip that ignores the signals of its limits is ended by the watchdog, and is to blame: it is not moved."""
    masking = PUPPET.replace("def decode(", "signal.signal(signal.SIGPROF, signal.SIG_IGN)\n\ndef decode(", 1)
    pool = AudioWorkerPool(settings(audio_workers=1, audio_timeout_s=0.2), program=("-c", masking))
    await pool.start()
    try:
        with pytest.raises(errors.AudioUnreadable, match="takes too long"):
            async with pool.prepare(say("spin")):
                pass
        assert pool.deaths == 1
    finally:
        await pool.stop()


async def test_a_worker_that_is_stopped_while_it_starts_does_not_fail_the_start() -> None:
    """A worker that is stopped or killed before it is ready is started again; the start of the pool goes on."""
    pool = AudioWorkerPool(settings(audio_workers=1), program=("-c", PUPPET))
    starting = asyncio.create_task(pool.start())
    try:
        await until(lambda: pids(pool))
        (victim,) = pids(pool)
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGSTOP)
        await starting
        assert victim not in pids(pool)
    finally:
        await pool.stop()


async def test_a_file_that_is_gone_is_an_error_of_the_service(tmp_path: Path) -> None:
    """A clip whose file cannot be opened is `Internal`; the worker stays, and the next clip is decoded."""
    async with running(audio_workers=1) as pool:
        before = pids(pool)
        with pytest.raises(errors.Internal):
            async with pool.prepare(tmp_path / "gone"):
                pass
        async with pool.prepare(base64.b64encode(b"samples 160").decode()) as prepared:
            assert prepared.features.samples == 160
        assert pids(pool) == before
