"""Clips for load tests: filtered noise and wavering tones, each from its own seed, so that no two are alike.

They are kept in a directory and made only once: about a CPU-second per half minute of sound.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import av
import numpy as np
from scipy.fft import irfft, next_fast_len, rfft, rfftfreq

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

SAMPLE_RATE = 48_000


class Codec(NamedTuple):
    """How PyAV writes a kind of file. The name of the kind is the file's suffix."""

    container: str
    encoder: str
    sample_rate: int
    layout: str
    bit_rate: int | None = None
    options: dict[str, str] | None = None


CODECS = {
    "mp3": Codec("mp3", "libmp3lame", 48_000, "stereo", 128_000, {"compression_level": "7"}),
    "m4a": Codec("ipod", "aac", 48_000, "stereo", 96_000),
    "opus": Codec("ogg", "libopus", 48_000, "stereo", 64_000),
    "amr": Codec("amr", "libopencore_amrnb", 8_000, "mono", 12_200),
    "wav": Codec("wav", "pcm_s16le", 44_100, "stereo"),
    "flac": Codec("flac", "flac", 48_000, "stereo"),
}
LOSSLESS = ("wav", "flac")
LOSSLESS_MAX_S = 30
"""Longer ones would not fit into a request (10 MiB of base64)."""


@dataclass(frozen=True, slots=True)
class Clip:
    """One audio file. Its kind is its suffix."""

    path: Path
    duration_s: float


def alike(directory: Path, count: int, duration_s: int) -> list[Clip]:
    """`count` clips of one length: 48 kHz stereo MP3."""
    return [Clip(directory / f"{duration_s}s-{seed:05}.mp3", duration_s) for seed in range(count)]


def mixed(directory: Path, count: int, rounds: int) -> list[Clip]:
    """`count` clips for each of `rounds`: 1 s to 10 min, all kinds of file; equal odds for every doubling of length.

    Every round has nearly the same lengths and kinds, in another order and with other sounds.
    """
    clips = []
    for number in range(rounds):
        random = np.random.default_rng(number)
        batch = []
        for place in range(count):
            duration_s = round(600 ** ((place + random.uniform(0, 0.5)) / (count - 0.5)), 2)
            kinds = [kind for kind in CODECS if duration_s <= LOSSLESS_MAX_S or kind not in LOSSLESS]
            name = f"{number}-{place:03}-{duration_s}s.{kinds[place % len(kinds)]}"
            batch.append(Clip(directory / name, duration_s))
        clips += [batch[place] for place in random.permutation(count)]
    return clips


def make(clips: Sequence[Clip]) -> None:
    """Write those files that are not there, on all cores."""
    missing = [(clip, seed) for seed, clip in enumerate(clips) if not clip.path.exists()]
    for directory in {clip.path.parent for clip, _ in missing}:
        directory.mkdir(parents=True, exist_ok=True)
    if missing:
        with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(make_clip, *zip(*missing, strict=True)))


def make_clip(clip: Clip, seed: int) -> None:
    """Write one file: a band of noise that differs between the channels, and four tones that swell and fade."""
    samples = sound(seed, round(clip.duration_s * SAMPLE_RATE))
    codec = CODECS[clip.path.suffix.removeprefix(".")]
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
    frame.sample_rate = SAMPLE_RATE
    unfinished = clip.path.with_name(f"unfinished-{clip.path.name}")
    with av.open(unfinished, "w", format=codec.container) as file:
        stream: Any = file.add_stream(
            codec.encoder, rate=codec.sample_rate, layout=codec.layout, options=codec.options or {}
        )
        if codec.bit_rate:
            stream.bit_rate = codec.bit_rate
        convert = av.AudioResampler(stream.format.name, codec.layout, codec.sample_rate)
        for part in (*convert.resample(frame), *convert.resample(None)):
            part.pts = None
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))
    unfinished.rename(clip.path)


def sound(seed: int, count: int) -> npt.NDArray[np.float32]:
    """`count` samples at 48 kHz in ±1, shape (2, count)."""
    random = np.random.default_rng(seed)
    size = next_fast_len(max(count, math.ceil(0.1 * SAMPLE_RATE)), real=True)
    low_hz, high_hz = sorted(random.uniform(100, 12_000, 2))
    spectrum = rfft(random.standard_normal((2, size), np.float32))
    offset = (rfftfreq(size, 1 / SAMPLE_RATE) - (low_hz + high_hz) / 2) / (high_hz - low_hz + 200)
    samples = irfft(spectrum / (1 + offset.astype(np.float32) ** 4), size)[:, :count] * np.float32(0.1)
    time_s = np.arange(count, dtype=np.float32) / SAMPLE_RATE
    for _ in range(4):
        pitch_hz, sway_hz = random.uniform(80, 4000), random.uniform(0.1, 3)
        samples += 0.05 * np.sin(2 * np.pi * pitch_hz * time_s) * (1 + np.sin(2 * np.pi * sway_hz * time_s))
    bounded: npt.NDArray[np.float32] = samples.clip(-1, 1).astype(np.float32)
    return bounded
