"""Cuts: divide 16 kHz mono into pieces at pauses, each short enough for one caption.

A pause is a stretch that is much quieter than what is around it, or, where the sound is steady (music, rain, a motor),
one between two words of a voice. The longest pause within reach is chosen, the later one of equals, and the cut is
placed just before the sound that ends it, so that a piece starts as its first event does. Where there is no pause, the
cut is hard: the audio of both pieces crosses it, so that what it cuts is heard whole in one of them.

Pieces tile the audio: each begins at the sample where the one before ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.fft import rfft
from scipy.ndimage import uniform_filter1d

from serving.audio.speech import CHUNK, speech_probabilities
from serving.types import SAMPLE_RATE, AudioPiece

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

CROSS_OVER = SAMPLE_RATE // 2
"""Samples of the neighbour's audio that a piece has on its side of a hard cut: 0.5 s, longer than most words."""

_FRAME = SAMPLE_RATE // 100
"""Samples of a frame, the unit of levels and of cuts: 10 ms."""

_FRAMES_PER_S = 100
_SILENCE_DB = -90.0
"""Level of digital silence, in dB of full scale."""

_LEAST_SHARE = 0.4
"""Least length of a piece, as a share of the longest, unless the audio ends."""

_LEAST_REACH_S, _LEAST_REST_S = 3.0, 1.0
"""Least stretch before a hard cut in which a pause is searched, and least length of the last piece."""

_LEAST_PAUSE = 15
"""Frames of the shortest pause: the closure of a consonant within a word is shorter than 150 ms."""

_LONG_PAUSE = 100
"""Frames of a pause beyond which a longer one is no better."""

_ONSET = 8
"""Frames from a cut to the sound that ends the pause: 80 ms."""

_DIP_DB, _NEAR_FLOOR_DB, _QUIET_DB = 12.0, 8.0, -65.0
"""A pause is this much below the loud parts, at most this much above the quiet ones; anything is one below the last."""

_SPEECH, _NO_SPEECH = 0.5, 0.3
"""Probabilities above which somebody speaks, and below which nobody does."""

_LOUDNESS_BLOCK = 1600
_LOUDNESS_OFFSET_DB = -0.691
"""Constant of ITU-R BS.1770, by which a sine of 997 Hz and 0 dB of full scale has -3.01 LUFS."""


class _Cut(NamedTuple):
    frame: int
    hard: bool


def cut(samples: Floats, max_piece_s: float) -> list[AudioPiece]:
    """Divide the samples into pieces of at most `max_piece_s`, what they share at hard cuts included."""
    speech = speech_probabilities(samples)
    levels, voiced = _levels(samples), _by_frame(speech, samples.size)
    longest, total = int(max_piece_s * _FRAMES_PER_S), -(-samples.size // _FRAME)
    pieces: list[AudioPiece] = []
    begin, was_hard = 0, False
    while begin < total:
        before = CROSS_OVER // _FRAME if was_hard else 0
        if total - begin + before <= longest:
            next_cut = _Cut(total, hard=False)
        else:
            next_cut = _next_cut(levels, voiced, begin, longest, before)
        pieces.append(_piece(samples, speech, begin, next_cut, before))
        begin, was_hard = next_cut
    return pieces


def _piece(samples: Floats, speech: Floats, begin: int, end: _Cut, before: int) -> AudioPiece:
    first, last = begin * _FRAME, min(samples.size, end.frame * _FRAME)
    chunks = speech[first // CHUNK : max(first // CHUNK + 1, -(-last // CHUNK))]
    return AudioPiece(
        begin=first,
        end=last,
        audio_begin=first - before * _FRAME,
        audio_end=min(samples.size, last + CROSS_OVER) if end.hard else last,
        loudness_db=loudness_db(samples[first:last]),
        speech_share=float(np.mean(chunks > _SPEECH)),
    )


def _next_cut(levels: Floats, voiced: Floats, begin: int, longest: int, before: int) -> _Cut:
    """Return the best cut of a piece that begins at a frame and has `before` frames of its neighbour's audio."""
    rest, reach = len(levels) - begin, int(_LEAST_REACH_S * _FRAMES_PER_S)
    most = longest - before
    least = int(_LEAST_SHARE * longest)
    if rest - most < least:  # the next piece is the last: it should not be a scrap
        most = min(most, max(rest - least, least + reach), rest - int(_LEAST_REST_S * _FRAMES_PER_S))
    low, high = begin + min(least, most - reach - CROSS_OVER // _FRAME - _ONSET), begin + most
    # A pause may begin before the stretch and end after it.
    first, last = max(begin, low - _LONG_PAUSE), min(len(levels), high + _LONG_PAUSE)
    quiet = _quiet(levels, first, last, begin) & (voiced[first:last] < _SPEECH)
    found = _best_pause(quiet, first, low, high)
    if found is None and voiced[begin:high].max(initial=0) > _SPEECH:
        found = _best_pause(voiced[first:last] < _NO_SPEECH, first, low, high)
    if found is not None:
        return _Cut(found, hard=False)
    return _Cut(high - CROSS_OVER // _FRAME, hard=True)


def _quiet(levels: Floats, first: int, last: int, begin: int) -> npt.NDArray[np.bool_]:
    """Return the frames that are quieter than what is around them."""
    loud = float(np.percentile(levels[begin:last], 90))
    floor = float(np.percentile(levels[first:last], 5))
    quiet: npt.NDArray[np.bool_] = levels[first:last] <= max(min(loud - _DIP_DB, floor + _NEAR_FLOOR_DB), _QUIET_DB)
    return quiet


def _best_pause(quiet: npt.NDArray[np.bool_], first: int, low: int, high: int) -> int | None:
    """Return the frame of the cut in the best pause that reaches into `low` to `high`, `None` if there is none."""
    edges = np.flatnonzero(np.diff(quiet, prepend=False, append=False)) + first
    best, best_score = None, 0.0
    for start, end in edges.reshape(-1, 2):
        frame = min(int(end) - _ONSET, high)
        if end - start < _LEAST_PAUSE or not low <= frame or start > high:
            continue
        score = min(end - start, _LONG_PAUSE) / _LONG_PAUSE + 0.5 * (frame - low) / max(1, high - low)
        if score > best_score:
            best, best_score = max(frame, int(start)), score
    return best


def _levels(samples: Floats) -> Floats:
    """Return the level of each frame in dB of full scale, averaged over 30 ms."""
    whole = samples[: samples.size // _FRAME * _FRAME].reshape(-1, _FRAME)
    powers = np.einsum("fs,fs->f", whole, whole) / _FRAME
    if rest := samples.size % _FRAME:
        powers = np.append(powers, np.square(samples[-rest:]).mean(dtype=np.float64))
    smooth = uniform_filter1d(powers.astype(np.float64), 3, mode="nearest")
    levels: Floats = (10 * np.log10(np.maximum(smooth, 10 ** (_SILENCE_DB / 10)))).astype(np.float32)
    return levels


def _by_frame(speech: Floats, samples: int) -> Floats:
    """Return the probability of speech of each frame: that of the chunk in which it begins."""
    voiced: Floats = speech[np.arange(0, samples, _FRAME) // CHUNK]
    return voiced


def loudness_db(samples: Floats) -> float | None:
    """Return the loudness in LUFS by ITU-R BS.1770, without gates; `None` for silence, below -90 LUFS."""
    power = 0.0
    for first in range(0, samples.size, _LOUDNESS_BLOCK * 64):
        part = samples[first : first + _LOUDNESS_BLOCK * 64]
        blocks = np.pad(part, (0, -part.size % _LOUDNESS_BLOCK)).reshape(-1, _LOUDNESS_BLOCK)
        power += float((np.abs(rfft(blocks)) ** 2 @ _K_WEIGHTS).sum())
    mean = power / max(1, samples.size)
    loudness = _LOUDNESS_OFFSET_DB + 10 * np.log10(max(mean, 1e-20))
    return float(loudness) if loudness >= _SILENCE_DB else None


def _k_weights() -> Floats:
    """Return the weight of each bin's power: the standard's two filters, given for 48 kHz."""
    at = np.exp(-2j * np.pi * np.arange(_LOUDNESS_BLOCK // 2 + 1) * SAMPLE_RATE / _LOUDNESS_BLOCK / 48_000)
    shelf = np.polyval([1.19839281085285, -2.69169618940638, 1.53512485958697], at)
    shelf /= np.polyval([0.73248077421585, -1.69065929318241, 1.0], at)
    high_pass = np.polyval([1.0, -2.0, 1.0], at) / np.polyval([0.99007225036621, -1.99004745483398, 1.0], at)
    weights = np.abs(shelf * high_pass) ** 2 * 2 / _LOUDNESS_BLOCK  # a bin stands for its negative frequency, too
    weights[[0, -1]] /= 2
    return weights.astype(np.float32)


_K_WEIGHTS = _k_weights()
