"""Encoded clips of the audio path's benchmark: a voice-like tone in noise, by PyAV and by libsndfile."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import av
import numpy as np
import soundfile

if TYPE_CHECKING:
    import numpy.typing as npt

    Samples = npt.NDArray[np.float32]

RATE = 48_000
_BLOCK = 4096
"""Longer blocks of Vorbis overflow libsndfile's stack."""


def noisy_stereo(duration_s: float) -> Samples:
    """Return 48 kHz samples of shape (samples, 2): the voice, louder on one channel, in noise."""
    mono = voice(RATE, duration_s)
    noise = np.random.default_rng(0).normal(0, 0.01, (round(RATE * duration_s), 2)).astype(np.float32)
    return np.stack([1.25 * mono, 0.75 * mono], axis=1) + noise


def voice(rate: int, duration_s: float) -> Samples:
    """Return mono samples within ±0.5: a gliding tone of varying loudness, with 13 harmonics below 3 kHz."""
    time_s = np.arange(round(rate * duration_s)) / rate
    phase = 2 * np.pi * np.cumsum(140 + 40 * np.sin(2 * np.pi * 0.6 * time_s)) / rate
    harmonics = sum(np.sin(number * phase) / number for number in range(1, 14))
    loudness = 0.55 + 0.45 * np.sin(2 * np.pi * 3 * time_s)
    return np.asarray(0.25 * loudness * harmonics, np.float32)


def with_av(muxer: str, codec: str, rate: int, bit_rate: int, samples: Samples) -> bytes:
    """Encode with FFmpeg."""
    layout = "stereo" if samples.ndim > 1 else "mono"
    with TemporaryDirectory() as directory:
        path = Path(directory, "clip")  # some muxers seek in their output
        with av.open(path, "w", format=muxer) as out:
            stream = out.add_stream(codec, rate=rate, layout=layout, bit_rate=bit_rate)
            frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="flt", layout=layout)
            frame.sample_rate = rate
            out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
        return path.read_bytes()


def with_soundfile(kind: str, subtype: str, samples: Samples) -> bytes:
    """Encode with libsndfile, 48 kHz stereo."""
    file = BytesIO()
    with soundfile.SoundFile(file, "w", RATE, 2, format=kind, subtype=subtype) as out:
        for start in range(0, len(samples), _BLOCK):
            out.write(samples[start : start + _BLOCK])
    return file.getvalue()


def clips(duration_s: float) -> dict[str, bytes]:
    """Return a clip of each kind."""
    wide, narrow = noisy_stereo(duration_s), voice(8000, duration_s)
    return {
        "MP3 48 kHz stereo": with_av("mp3", "libmp3lame", RATE, 128_000, wide),
        "AAC 48 kHz stereo": with_av("ipod", "aac", RATE, 128_000, wide),
        "Opus 48 kHz stereo": with_av("ogg", "libopus", RATE, 96_000, wide),
        "AMR-NB 8 kHz": with_av("amr", "libopencore_amrnb", 8000, 12_200, narrow),
        "WAV 48 kHz stereo": with_soundfile("WAV", "PCM_16", wide),
        "FLAC 48 kHz stereo": with_soundfile("FLAC", "PCM_16", wide),
        "Vorbis 48 kHz stereo": with_soundfile("OGG", "VORBIS", wide),
    }
