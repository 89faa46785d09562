"""Pieces of one audio: written by a worker, checked and read by the service."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import soundfile

from serving import errors
from serving.audio import worker
from serving.audio.features import log_mel
from serving.audio.piece_file import PieceFile, frame_bytes, table
from serving.audio.worker_pool import AudioWorkerPool
from serving.config import Settings
from serving.types import SAMPLE_RATE, AudioPiece
from tests.audio.film import film

if TYPE_CHECKING:
    from collections.abc import Callable

_PIECES = [AudioPiece(0, 16_000, 0, 16_000, -20.0, 0.5), AudioPiece(16_000, 40_000, 16_000, 40_000, None, 0.0)]


async def test_pieces_from_a_worker() -> None:
    """A worker's features of each piece are those of the piece as a separate clip, and nothing is left in memory."""
    story = film(70)
    path = Path(os.environ["CAPTIONER_DATA_DIR"], "film.wav")
    soundfile.write(path, story.samples, SAMPLE_RATE, subtype="FLOAT")
    pool = AudioWorkerPool(Settings(audio_workers=1))
    await pool.start()
    try:
        for max_piece_s in (30.0, 5.0):
            with PieceFile(max_piece_s, None) as file:
                async with pool.prepare(path, piece_file=file) as prepared:
                    assert prepared.features.samples == story.samples.size
                    assert pool.outstanding_bytes == 0
                assert len(file.pieces) >= 70 / max_piece_s
                for index, piece in enumerate(file.pieces):
                    features = await file.features(index)
                    assert np.array_equal(features.log_mel, log_mel(story.samples[piece.audio_begin : piece.audio_end]))
                    assert features.samples == piece.audio_end - piece.audio_begin
        async with pool.prepare(path) as prepared:  # the worker is as it was
            assert prepared.features.log_mel.shape == (128, story.samples.size // 160)
    finally:
        await pool.stop()
        os.unlink(path)  # noqa: PTH108 - blocks no one


def test_full_disk() -> None:
    """A worker that cannot write the pieces says so."""
    clip = io.BytesIO()
    soundfile.write(clip, np.zeros(1600, np.float32), SAMPLE_RATE, format="WAV")
    with Path("/dev/null").open("rb") as unwritable:
        assert worker._cut(unwritable.fileno(), 30.0, clip.getvalue(), 10.0, 0.0) == ({"disk_full": True}, [])


def _filled(rows: bytes) -> PieceFile:
    file = PieceFile(30.0, None)
    os.write(file.descriptor, bytes(sum(map(frame_bytes, _PIECES))) + rows)
    return file


async def test_table_is_read() -> None:
    """The table of a worker is read as it was written, and the features of each piece from their place."""
    rows = table(_PIECES)
    with _filled(rows) as file:
        file.load(40_000, len(rows))
        assert file.pieces == tuple(_PIECES)
        assert (await file.features(1)).log_mel.shape == (128, 150)
        assert file.size_bytes == 4 * 128 * 250 + len(rows)


def _row(index: int, column: int, value: Any) -> Callable[[list[list[Any]]], None]:
    def change(rows: list[list[Any]]) -> None:
        rows[index][column] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _row(0, 0, 1),
        _row(0, 1, 15_999),
        _row(1, 1, 40_001),
        _row(1, 1, 39_999),
        _row(1, 2, -1),
        _row(1, 2, 16_001),
        _row(1, 3, 40_001),
        _row(1, 3, 600_000),
        _row(0, 1, 16_000.0),
        _row(0, 0, False),  # noqa: FBT003
        _row(0, 4, "loud"),
        _row(0, 4, float("nan")),
        _row(0, 5, 1.5),
        _row(0, 5, None),
        lambda rows: rows.pop(),
        lambda rows: rows.clear(),
        lambda rows: rows[0].append(1),
        lambda rows: rows.insert(0, [0, 0, 0, 0, None, 0.0]),
    ],
)
def test_hostile_table(change: Callable[[list[list[Any]]], None]) -> None:
    """A table that no worker writes, as of one that a clip has taken over, is refused."""
    values = json.loads(table(_PIECES))
    change(values)
    rows = json.dumps(values).encode()
    with _filled(rows) as file, pytest.raises((ValueError, TypeError)):
        file.load(40_000, len(rows))


@pytest.mark.parametrize("size", [0, -1, 1 << 30])
def test_table_of_a_hostile_size(size: int) -> None:
    """A table of no size, or of an endless one, is refused before it is read."""
    with _filled(table(_PIECES)) as file, pytest.raises(ValueError, match="size"):
        file.load(40_000, size)


async def test_cut_file() -> None:
    """Features that the file does not have are an internal error."""
    rows = table(_PIECES)
    with _filled(rows) as file:
        file.load(40_000, len(rows))
        os.ftruncate(file.descriptor, 100)
        with pytest.raises(errors.Internal):
            await file.features(1)


def test_no_disk() -> None:
    """The service is overloaded if no file can be made."""
    with pytest.raises(errors.Overloaded):
        PieceFile(30.0, Path("/nonexistent"))
