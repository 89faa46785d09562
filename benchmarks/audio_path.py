"""How fast audio becomes features on one core: `python benchmarks/audio_path.py [SECONDS]` of each clip, default 60.

Unlike the other benchmarks this one looks inside the service. It sets our decoding, with mixing and resampling, against
the same library that decodes and does nothing else, and our log-mel against transformers'. They are timed by turns, and
the best of each counts, for the machine's noise only ever adds.
"""

from __future__ import annotations

import io
import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
import soundfile
import torch
from transformers import WhisperFeatureExtractor

sys.path.insert(0, str(Path(__file__).parents[1]))
from serving.audio.decode import decode
from serving.audio.features import log_mel
from tests.audio.clips import sound, stereo, with_av, with_soundfile

if TYPE_CHECKING:
    from collections.abc import Callable

_ROUNDS = 7


def main(duration_s: float) -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    noise = np.random.default_rng(0).normal(0, 0.01, (round(48_000 * duration_s), 2)).astype(np.float32)
    wide = stereo(48_000, duration_s) + noise
    narrow = sound(8000, duration_s)
    clips = {
        "WAV 48 kHz stereo": with_soundfile("WAV", "PCM_16", 48_000, samples=wide),
        "FLAC 48 kHz stereo": with_soundfile("FLAC", "PCM_16", 48_000, samples=wide),
        "MP3 48 kHz stereo": with_av("mp3", "libmp3lame", 48_000, samples=wide, bit_rate=128_000),
        "AAC 48 kHz stereo": with_av("ipod", "aac", 48_000, samples=wide, bit_rate=128_000),
        "Vorbis 48 kHz stereo": with_soundfile("OGG", "VORBIS", 48_000, samples=wide),
        "Opus 48 kHz stereo": with_av("ogg", "libopus", 48_000, samples=wide, bit_rate=96_000),
        "AMR-NB 8 kHz": with_av("amr", "libopencore_amrnb", 8000, samples=narrow, bit_rate=12_200),
    }
    print(f"| {duration_s:g} s of | To 16 kHz mono, ms | x real time | Decoding alone, ms | Our speed of that |")
    print("|---|---:|---:|---:|---:|")
    for name, data in clips.items():
        raw = _soundfile_only if name.startswith("WAV") else _av_only
        ours_s, raw_s = _timed(partial(decode, data, max_duration_s=2400), partial(raw, data))
        print(f"| {name} | {1e3 * ours_s:.1f} | {duration_s / ours_s:.0f} | {1e3 * raw_s:.1f} | {raw_s / ours_s:.2f} |")
    print()

    extractor = WhisperFeatureExtractor(
        feature_size=128, sampling_rate=16_000, hop_length=160, n_fft=400, chunk_length=300
    )
    print("| Log-mel of | Ours, ms | x real time | transformers, ms | Faster by |")
    print("|---|---:|---:|---:|---:|")
    for length_s in (5, 30, 300):
        samples = sound(16_000, length_s)
        theirs = partial(extractor, samples, sampling_rate=16_000, padding=True)
        ours_s, theirs_s = _timed(partial(log_mel, samples), theirs)
        speed = length_s / ours_s
        print(f"| {length_s} s | {1e3 * ours_s:.2f} | {speed:.0f} | {1e3 * theirs_s:.2f} | {theirs_s / ours_s:.1f} |")


def _timed(*functions: Callable[[], object]) -> list[float]:
    """CPU seconds of each, by turns, the best of several rounds."""
    best = [float("inf")] * len(functions)
    for _ in range(_ROUNDS):
        for index, function in enumerate(functions):
            began = time.process_time()
            function()
            best[index] = min(best[index], time.process_time() - began)
    return best


def _soundfile_only(data: bytes) -> None:
    with soundfile.SoundFile(io.BytesIO(data)) as sound_file:
        block = np.empty((65_536, sound_file.channels), np.float32)
        while len(sound_file.read(out=block)):
            pass


def _av_only(data: bytes) -> None:
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.audio[0]
        decoder = stream.codec_context
        if decoder.name == "amrnb":
            decoder = av.CodecContext.create("libopencore_amrnb", "r")
        for packet in container.demux(stream):
            decoder.decode(packet)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60)
