"""Clips for load tests: filtered noise and wavering tones, each from its own seed, so that no two are alike."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING

import av
import numpy as np
from scipy.fft import irfft, rfft, rfftfreq

if TYPE_CHECKING:
    from pathlib import Path

SAMPLE_RATE = 48_000


def make_clips(directory: Path, count: int, duration_s: int) -> list[Path]:
    """Make `count` stereo MP3 files of 48 kHz and 128 kbit/s, on all cores. About a CPU-second per 30 s clip."""
    paths = [directory / f"{seed:05}.mp3" for seed in range(count)]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for _ in pool.map(make_clip, paths, range(count), [duration_s] * count):
            pass
    return paths


def make_clip(path: Path, seed: int, duration_s: int) -> None:
    """Write one MP3 file: a band of noise that differs between the channels, and four tones that swell and fade."""
    random = np.random.default_rng(seed)
    count = duration_s * SAMPLE_RATE
    low_hz, high_hz = sorted(random.uniform(100, 12_000, 2))
    spectrum = rfft(random.standard_normal((2, count), np.float32))
    offset = (rfftfreq(count, 1 / SAMPLE_RATE) - (low_hz + high_hz) / 2) / (high_hz - low_hz + 200)
    samples = irfft(spectrum / (1 + offset.astype(np.float32) ** 4), count) * np.float32(0.1)
    time_s = np.arange(count, dtype=np.float32) / SAMPLE_RATE
    for _ in range(4):
        pitch_hz, sway_hz = random.uniform(80, 4000), random.uniform(0.1, 3)
        samples += 0.05 * np.sin(2 * np.pi * pitch_hz * time_s) * (1 + np.sin(2 * np.pi * sway_hz * time_s))
    frame = av.AudioFrame.from_ndarray(samples.clip(-1, 1).astype(np.float32), format="fltp", layout="stereo")
    frame.sample_rate = SAMPLE_RATE
    with av.open(path, "w", format="mp3") as file:
        stream = file.add_stream(
            "libmp3lame", rate=SAMPLE_RATE, layout="stereo", bit_rate=128_000, options={"compression_level": "7"}
        )
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
