"""Pieces of one audio on their way to the engine: a file without a name, which a worker writes and the pipeline reads.

The log-mel of 40 minutes takes 123 MB. On disk it may wait there while the pieces are captioned; in memory are only the
pieces that are captioned now. The file has the features of the pieces one after the other (float32, 128 rows each) and
then a table of the pieces, as JSON. A worker may have been taken over by a clip: everything in the file is checked.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import tempfile
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from serving.errors import Internal, Overloaded
from serving.types import FRAMES_PER_S, MELS, SAMPLE_RATE, AudioPiece, Features

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self

MAX_TABLE_BYTES = 1024 * 1024
"""Bound on the table of pieces; that of 40 minutes in pieces of 2 s takes a tenth."""

_MOST_CROSSED = 1.25
"""Bound on the audio of the pieces as a multiple of the whole: 5 s, of which 1 s is heard twice."""


def most_bytes(max_audio_s: float) -> int:
    """Return the size of the largest piece file."""
    return int(_MOST_CROSSED * 4 * MELS * FRAMES_PER_S * (max_audio_s + 2)) + MAX_TABLE_BYTES


def frame_bytes(piece: AudioPiece) -> int:
    """Return the size of a piece's features."""
    return 4 * MELS * _frames(piece)


def table(pieces: Sequence[AudioPiece]) -> bytes:
    """Return the table of the pieces, for the end of the file."""
    return json.dumps(
        [
            (each.begin, each.end, each.audio_begin, each.audio_end, each.loudness_db, each.speech_share)
            for each in pieces
        ]
    ).encode()


class PieceFile:
    """The file, from before the worker writes it. A context: leaving it frees its disk.

    `max_piece_s` is the longest piece in seconds.
    """

    def __init__(self, max_piece_s: float, directory: Path | None) -> None:
        """Create the file. Raises `Overloaded` if that is impossible now."""
        self.max_piece_s = max_piece_s
        self.pieces: tuple[AudioPiece, ...] = ()
        self._offsets: tuple[int, ...] = ()
        try:
            self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 - closed by the context
        except OSError:
            raise Overloaded(reason="downloads") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def descriptor(self) -> int:
        """Descriptor of the open file, for a worker."""
        return self._file.fileno()

    @property
    def size_bytes(self) -> int:
        """Disk that the file takes."""
        return os.fstat(self.descriptor).st_size

    def load(self, samples: int, table_bytes: int) -> None:
        """Read the table of pieces of an audio of `samples`. Raises `ValueError` if it is not what a worker writes."""
        if not 0 < table_bytes <= MAX_TABLE_BYTES:
            raise ValueError("the table of pieces has no valid size")
        rows = json.loads(os.pread(self.descriptor, table_bytes, self.size_bytes - table_bytes))
        pieces = tuple(_checked(row) for row in rows)
        if not pieces or pieces[0].begin or pieces[-1].end != samples:
            raise ValueError("the pieces are not those of the audio")
        if any(before.end != after.begin for before, after in pairwise(pieces)):
            raise ValueError("the pieces do not tile the audio")
        longest = self.max_piece_s * SAMPLE_RATE
        if any(not 0 <= each.audio_begin <= each.begin < each.end <= each.audio_end <= samples for each in pieces):
            raise ValueError("a piece is not within the audio")
        if any(each.audio_end - each.audio_begin > longest for each in pieces):
            raise ValueError("a piece is too long")
        self.pieces = pieces
        self._offsets = tuple(accumulate(map(frame_bytes, pieces), initial=0))

    async def features(self, index: int) -> Features:
        """Read the features of a piece into memory. Raises `Internal` if the file does not have them."""
        piece, offset = self.pieces[index], self._offsets[index]
        data = bytearray(frame_bytes(piece))
        read = await asyncio.to_thread(os.preadv, self.descriptor, [data], offset)
        if read != len(data):
            raise Internal
        log_mel = np.frombuffer(data, np.float32).reshape(MELS, _frames(piece))
        return Features(log_mel, piece.audio_end - piece.audio_begin)


def _frames(piece: AudioPiece) -> int:
    return max(1, (piece.audio_end - piece.audio_begin) * FRAMES_PER_S // SAMPLE_RATE)


def _checked(row: Any) -> AudioPiece:
    *samples, loudness_db, speech_share = row
    begin, end, audio_begin, audio_end = samples
    if any(type(each) is not int for each in samples):
        raise ValueError("a piece has times that are not samples")
    if loudness_db is not None and not (isinstance(loudness_db, float) and math.isfinite(loudness_db)):
        raise ValueError("a piece has no valid loudness")
    if not (isinstance(speech_share, float) and 0 <= speech_share <= 1):
        raise ValueError("a piece has no valid share of speech")
    return AudioPiece(begin, end, audio_begin, audio_end, loudness_db, speech_share)
