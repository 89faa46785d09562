"""Log-mel features of the model's audio encoder: those of `WhisperFeatureExtractor`, 128 mels every 10 ms, in NumPy.

They equal those of the Qwen3-Omni processor of transformers (of the clip alone, not padded to 300 s), but take no torch
and half the time: frames in blocks that stay in the cache, and each band of filters times only the bins it reaches.

The last `samples % 160` samples make no separate frame, as in transformers, with which the model was trained. vLLM's
processor pads them with zeros to one more frame instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy.fft import rfft

from serving.types import MELS, SAMPLE_RATE

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

HOP = 160
"""Samples from one frame to the next."""

_WINDOW = 400
_PAD = _WINDOW // 2
_BINS = _WINDOW // 2 + 1
_BLOCK_FRAMES = 512
_BAND_MELS = 16
_GAIN = 1e4
"""Gain of the filters, with which the feature is a quarter of the logarithm and no addition is left."""

_FLOOR = np.float32(1e-10 * _GAIN)
_RANGE_DECADES = 8
"""Dynamic range in decades of power below the loudest value: quieter values are raised to its lower end."""


def frame_count(samples: int) -> int:
    """Return the number of frames that `log_mel` makes of `samples` samples: one per full hop, at least one."""
    return max(1, samples // HOP)


def log_mel(samples: Floats, out: Floats | None = None) -> Floats:
    """Return the log-mel features of 16 kHz mono of at least one sample.

    The result is float32 of shape (128, frame_count(samples.size)), in `out` if that is given. The values are log10 of
    power, limited to 8 decades, over 4, plus 1. Clips too short to be reflected at their ends (up to 200 samples) are
    continued with silence; transformers refuses them.
    """
    count = frame_count(samples.size)
    if out is None:
        out = np.empty((MELS, count), np.float32)
    if samples.size <= _PAD:
        samples = np.pad(samples, (0, _PAD + 1 - samples.size))
    windowed = np.empty((min(count, _BLOCK_FRAMES), _WINDOW), np.float32)
    power = np.empty((len(windowed), _BINS), np.float32)
    loudest = -np.inf
    for first in range(0, count, _BLOCK_FRAMES):
        block = out[:, first : first + _BLOCK_FRAMES]
        frames = block.shape[1]
        np.multiply(_frames(samples, first, frames), _HANN, out=windowed[:frames])
        parts = rfft(windowed[:frames]).view(np.float32)
        np.multiply(parts, parts, out=parts)
        np.add(parts[:, ::2], parts[:, 1::2], out=power[:frames])
        for mels, bins, weights in _BANDS:
            np.matmul(weights, power[:frames, bins].T, out=block[mels])
        np.maximum(block, _FLOOR, out=block)
        np.log(block, out=block)  # vectorised, unlike log10
        np.multiply(block, _QUARTER_DECADE, out=block)
        loudest = max(loudest, block.max())
    np.maximum(out, np.float32(loudest - _RANGE_DECADES / 4), out=out)
    return out


def _frames(samples: Floats, first: int, count: int) -> Floats:
    """Return the windows around each hop, shape (count, 400), reflected where they reach past the clip's ends."""
    begin, end = first * HOP - _PAD, (first + count - 1) * HOP + _PAD
    part = samples[max(begin, 0) : end]
    before, after = max(-begin, 0), max(end - samples.size, 0)
    if before:
        part = np.concatenate((samples[before:0:-1], part))
    if after:
        part = np.concatenate((part, samples[-2 : -2 - after : -1]))
    frames: Floats = sliding_window_view(part, _WINDOW)[::HOP]
    return frames


def _mel_filters() -> Floats:
    """Return the mel filters, shape (128, 201): Slaney's scale and normalisation, 0 to 8 kHz.

    They equal those of `mel_filter_bank` of transformers.
    """
    knee_hz, knee_mel, mel_hz, per_log = 1000.0, 15.0, 200 / 3, 27 / np.log(6.4)
    nyquist_hz = SAMPLE_RATE / 2
    mels = np.linspace(0, knee_mel + per_log * np.log(nyquist_hz / knee_hz), MELS + 2)
    edges = np.where(mels < knee_mel, mels * mel_hz, knee_hz * np.exp((mels - knee_mel) / per_log))
    bins = np.linspace(0, nyquist_hz, _BINS)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = np.minimum((bins - low) / (middle - low), (high - bins) / (high - middle))
    filters: Floats = (np.maximum(triangles, 0) * 2 / (high - low)).astype(np.float32)
    return filters


def _bands(filters: Floats) -> list[tuple[slice, slice, Floats]]:
    """Cut the sparse filters into bands: their mels, the bins that those reach, and the weights."""
    bands = []
    for first in range(0, MELS, _BAND_MELS):
        mels = slice(first, first + _BAND_MELS)
        reached = np.flatnonzero(filters[mels].any(axis=0))
        bins = slice(int(reached[0]), int(reached[-1]) + 1)
        bands.append((mels, bins, np.ascontiguousarray(filters[mels, bins])))
    return bands


_HANN = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_WINDOW) / _WINDOW)).astype(np.float32)
_BANDS = _bands(_mel_filters() * np.float32(_GAIN))
_QUARTER_DECADE = np.float32(1 / (4 * np.log(10)))
