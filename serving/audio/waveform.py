"""Waveform: one array, into which blocks of mono of any rate are resampled, and the level of what exceeds full scale.

Float files and lossy codecs hold values beyond ±1. Clipping them would change the sound, so a clip that really exceeds
full scale is decoded a second time with a gain below 1. A second pass costs the memory of a block, and the resampler
sees neither values that are later clipped nor garbage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import soxr

from serving.audio.reader_errors import ReaderError
from serving.errors import AudioTooLong
from serving.types import SAMPLE_RATE

if TYPE_CHECKING:
    import numpy.typing as npt

    Samples = npt.NDArray[np.float32]

PADDING_S = 0.1
"""Tolerance over the duration limit, since codecs pad (PROTOCOL 7.4)."""

LOSSY_OVERSHOOT = 1.5
"""Level up to which a lossy codec's own error explains values over full scale: they are clipped (+3.5 dB)."""

_SAMPLE_RATES = range(1_000, 768_001)
"""Sample rates in Hz at which sound is recorded. A header with any other rate is forged."""


class Waveform:
    """The growing result.

    `overshoot` is the level up to which the current reader's values are clipped, although they exceed full scale.
    """

    def __init__(self, max_duration_s: float) -> None:
        self.overshoot = 1.0
        self._array = np.empty(int((max_duration_s + PADDING_S) * SAMPLE_RATE), np.float32)
        self._end = 0  # of the current reader's samples
        self._earlier = 0  # the most that any earlier reader has decoded
        self._rate = SAMPLE_RATE
        self._resampler: soxr.ResampleStream | None = None
        self._gain = np.float32(1)
        self._overs = _Overs()

    @property
    def size(self) -> int:
        return max(self._end, self._earlier)

    @property
    def samples(self) -> Samples:
        return self._array[: self.size]

    @property
    def gain(self) -> float:
        """Gain at which the clip must be decoded to be within ±1; 1 if it is, or if all but garbage is."""
        level = self._overs.level()
        return 1 / level if level > self.overshoot else 1.0

    def restart(self, gain: float) -> None:
        """Prepare for decoding the same clip at another gain."""
        self._end = self._earlier = 0
        self._gain, self._overs = np.float32(gain), _Overs()

    def rewind(self) -> None:
        """Prepare for another reader. If it ends earlier, the rest of the previous reader's samples is kept."""
        self._earlier = self.size
        self._end = 0

    def mark(self) -> int:
        """Return the current end, for `undo`."""
        self.flush()
        return self._end

    def undo(self, mark: int) -> None:
        """Discard what was added since `mark`."""
        self.flush()
        self._end = mark

    def append(self, rate: int, mono: Samples) -> None:
        """Add samples, which are changed. Raises `AudioTooLong`."""
        if self._gain != 1:
            mono *= self._gain
        peak = max(mono.max(initial=0), -mono.min(initial=0))
        if not peak <= 1:  # also if it is NaN: one would spoil all later samples
            self._overs.add(mono)
            np.clip(mono, -1, 1, out=mono)
            np.nan_to_num(mono, copy=False)
        elif peak:
            self._overs.samples += mono.size
        if rate != self._rate:
            self.flush()
            if rate not in _SAMPLE_RATES:
                raise ReaderError(f"it has a sample rate of {rate} Hz")
            self._rate = rate
        if rate == SAMPLE_RATE:
            self._write(mono)
            return
        if self._resampler is None:
            self._resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
        self._write(self._resampler.resample_chunk(mono))

    def flush(self) -> None:
        """Add the samples that the resampler still buffers."""
        if resampler := self._resampler:
            self._resampler = None
            self._write(resampler.resample_chunk(np.empty(0, np.float32), last=True))

    def _write(self, samples: Samples) -> None:
        end = self._end + samples.size
        if end > self._array.size:
            raise AudioTooLong
        np.clip(samples, -1, 1, out=self._array[self._end : end])
        self._end = end


class _Overs:
    """Histogram of the samples over full scale, to distinguish signal from garbage.

    Signal are peaks up to +24 dB, and samples on another scale (integers stored as floats), of which most exceed 1.
    Garbage is rare, or, in a damaged file, spread over all exponents of a float.
    """

    _BINS_PER_OCTAVE = 8
    _HOT_BINS = 4 * _BINS_PER_OCTAVE  # up to 16 times full scale, +24 dB
    _BINS = 33 * _BINS_PER_OCTAVE  # up to that of 32-bit integers; the last bin counts everything above
    _RARE, _FEW = 1e-5, 8
    """Share, or else number, of the samples that may exceed the level: single ones are garbage."""

    _GARBAGE = 0.01
    """Share of the samples over full scale above which those over every scale are no accident."""

    def __init__(self) -> None:
        self.samples = 0
        self._counts = np.zeros(self._BINS + 1, np.int64)

    def add(self, mono: Samples) -> None:
        magnitudes = np.abs(mono)
        self.samples += int(np.count_nonzero(magnitudes))
        overs = magnitudes[magnitudes > 1]  # not NaN
        bins = np.minimum(np.log2(overs) * self._BINS_PER_OCTAVE, self._BINS).astype(np.int64)
        self._counts += np.bincount(bins, minlength=self._BINS + 1)

    def level(self) -> float:
        """Return the level that the signal reaches, garbage aside; 1 if nothing exceeds full scale."""
        all_overs, garbage = int(self._counts.sum()), int(self._counts[-1])
        hot = int(self._counts[: self._HOT_BINS].sum())
        if all_overs > self.samples / 2 and garbage <= self._GARBAGE * all_overs:
            counts = self._counts[:-1]
        elif hot * 2 >= all_overs:
            counts = self._counts[: self._HOT_BINS]
        else:
            return 1.0
        at_least = np.cumsum(counts[::-1])[::-1]  # number of samples in each bin and above
        reached = np.flatnonzero(at_least > max(self._FEW, self._RARE * self.samples))
        return float(2 ** ((reached[-1] + 1) / self._BINS_PER_OCTAVE)) if reached.size else 1.0
