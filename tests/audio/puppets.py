"""Pools of audio workers whose decoder does whatever the clip says."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from typing import TYPE_CHECKING

from serving.audio.worker_pool import AudioWorkerPool, Prepared
from serving.config import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

# A worker whose decoder does what the clip says. Without the real decoder it starts quickly.
PUPPET = """
import sys, types
sys.modules["serving.audio.decode"] = types.SimpleNamespace(decode=None)
features = types.SimpleNamespace(MELS=128, frame_count=lambda samples: samples // 160 or 1, log_mel=None)
sys.modules["serving.audio.features"] = features
import ctypes, os, signal, time
import numpy as np
from pathlib import Path
import serving.audio.worker as worker
from serving import errors

def decode(source, *, max_duration_s):
    data = source if isinstance(source, bytes) else source.read()
    word, _, number = data.decode(errors="replace").partition(" ")
    match word:
        case "samples": return np.full(int(number), 0.25, np.float32)
        case "sleep": time.sleep(float(number)); return np.zeros(1600, np.float32)
        case "segfault": ctypes.string_at(0)
        case "exit": os._exit(7)
        case "spin":
            while True: pass
        case "burn":
            end = time.process_time() + float(number)
            while time.process_time() < end: pass
        case "hoard": return np.ones(int(number), np.float32)
        case "raise": raise getattr(errors, number)("from the worker")
        case "bug": raise ZeroDivisionError("an inside")
        case "environment": raise errors.AudioUnreadable(repr(sorted(os.environ.items())))
    return np.zeros(len(word), np.float32)

def log_mel(samples, out=None):
    out[:] = samples[0]
    return out

worker.decode, worker.log_mel = decode, log_mel
worker.main(sys.argv[1:])
"""

MAX_AUDIO_S = 60.0
FRAME_BYTES = 128 * 4


def settings(**changes: object) -> Settings:
    """Return settings: two workers and a longest clip of a minute, unless changed."""
    return Settings.model_validate({"audio_workers": 2, "max_audio_s": MAX_AUDIO_S, "audio_timeout_s": 30, **changes})


@contextlib.asynccontextmanager
async def running(**changes: object) -> AsyncIterator[AudioWorkerPool]:
    """Run a pool of puppets."""
    workers = AudioWorkerPool(settings(**changes), program=("-c", PUPPET))
    await workers.start()
    try:
        yield workers
    finally:
        await workers.stop()


def say(words: str) -> str:
    """Return a clip that makes the puppet follow `words`."""
    return base64.b64encode(words.encode()).decode()


async def prepare(pool: AudioWorkerPool, words: str) -> Prepared:
    """Prepare a clip and release its features at once."""
    async with pool.prepare(say(words)) as prepared:
        return prepared


async def until(condition: Callable[[], object], within_s: float = 20) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - no event reports it
            await asyncio.sleep(0.01)


def pids(pool: AudioWorkerPool) -> set[int]:
    """Return the process ids of the pool's workers."""
    return {worker.process.pid for worker in pool._workers}
