"""The application without its helper processes: clips are decoded, and URLs downloaded, by threads of the test.

For tests of other components, each of which starts the application: two processes cost 0.9 s of CPU each time. Tests of
the processes, and of the features' shared memory, use the real ones.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import numpy as np

from serving.audio.base64_text import decode_base64
from serving.audio.decode import decode
from serving.audio.download_process import DownloadProcess
from serving.audio.features import log_mel
from serving.audio.fetch import Fetcher
from serving.audio.piece_file import table
from serving.audio.segment import cut
from serving.audio.worker_pool import AudioWorkerPool, Prepared
from serving.errors import NotReady
from serving.types import MELS, NO_TENANT, Features

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from serving.audio.piece_file import PieceFile
    from serving.audio.worker_process import Clip
    from serving.config import Settings
    from serving.types import SchedulingClass

_MAX_S = 60
"""Longest clip in seconds: room for 40 minutes would be 146 MiB of the test's process for each clip."""

_MAX_CUT_S = 600
"""Longest clip of a timeline in seconds."""

_DECODING = threading.Lock()
"""One at a time: `decode` limits the memory of the process that it runs in, and lifts the limit afterwards."""


class AudioThreads(AudioWorkerPool):
    """A pool without processes, queue or sandbox. It counts the memory of features as the real one does."""

    async def start(self) -> None:
        """Accept clips."""
        self._running = True

    async def stop(self) -> None:
        """Refuse clips."""
        self._running = False

    @asynccontextmanager
    async def prepare(
        self, clip: Clip, scheduling_class: SchedulingClass = NO_TENANT, *, piece_file: PieceFile | None = None
    ) -> AsyncIterator[Prepared]:
        """See `AudioWorkerPool`."""
        if not self._running:
            raise NotReady
        if piece_file is not None:
            samples = await asyncio.to_thread(_cut, clip, piece_file)
            yield Prepared(Features(np.empty((MELS, 0), np.float32), samples), 0.0, 0.0, 0.0)
            return
        with self._features.permit(scheduling_class) as permit:
            features = await asyncio.to_thread(_features, clip)
            permit.count(features.log_mel.nbytes)
            yield Prepared(features, 0.0, 0.0, 0.0)


class DownloadThreads(DownloadProcess):
    """Downloads in the test's own event loop."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._fetcher = Fetcher(settings)

    async def start(self) -> None:
        """Accept URLs."""
        await self._fetcher.start()

    async def stop(self) -> None:
        """Refuse URLs."""
        await self._fetcher.stop()

    @asynccontextmanager
    async def fetch(self, url: str, scheduling_class: SchedulingClass = NO_TENANT) -> AsyncIterator[Path]:
        """See `Fetcher`."""
        async with self._fetcher.fetch(url, scheduling_class) as path:
            yield path


def _features(clip: Clip) -> Features:
    with _DECODING:
        samples = decode(decode_base64(clip.encode()) if isinstance(clip, str) else clip, max_duration_s=_MAX_S)
    return Features(log_mel(samples), samples.size)


def _cut(clip: Clip, piece_file: PieceFile) -> int:
    """Write the pieces as a worker does; return the samples of the clip."""
    with _DECODING:
        samples = decode(decode_base64(clip.encode()) if isinstance(clip, str) else clip, max_duration_s=_MAX_CUT_S)
    pieces = cut(samples, piece_file.max_piece_s)
    rows = table(pieces)
    with open(piece_file.descriptor, "wb", closefd=False) as file:
        file.writelines(log_mel(samples[piece.audio_begin : piece.audio_end]).data for piece in pieces)
        file.write(rows)
    piece_file.load(samples.size, len(rows))
    return samples.size
