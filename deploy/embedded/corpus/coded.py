"""Lossy codings for training clips. Telephone codings keep nothing above 4 kHz, and model voices, not sounds."""

from __future__ import annotations

from io import BytesIO

import av
import numpy as np
import soundfile
import soxr

from deploy.embedded.corpus.pool import SAMPLE_RATE

NARROW = 8_000
CODINGS = {
    "GSM": ("WAV", "GSM610", NARROW),
    "mu-law": ("WAV", "ULAW", NARROW),
    "Opus": ("OGG", "OPUS", SAMPLE_RATE),
    "MP3": ("MP3", "MPEG_LAYER_III", SAMPLE_RATE),
    "AMR": ("amr", "libopencore_amrnb", NARROW),
}
"""Name of a coding: container and codec as named by soundfile (by PyAV for AMR), and the coded sample rate."""


def through(name: str, samples: np.ndarray) -> np.ndarray:
    """Encode and decode 16 kHz `samples` with the coding `name`; return the same number of samples."""
    container, codec, rate = CODINGS[name]
    plain = soxr.resample(np.clip(samples, -1, 1), SAMPLE_RATE, rate)
    if name == "AMR":
        decoded = _amr(plain, codec)
    else:
        file = BytesIO()
        soundfile.write(file, plain, rate, format=container, subtype=codec)
        file.seek(0)
        decoded, rate = soundfile.read(file, dtype="float32")
    back = soxr.resample(decoded, rate, SAMPLE_RATE)[: len(samples)].astype(np.float32)
    return np.pad(back, (0, len(samples) - len(back)))


def _amr(samples: np.ndarray, codec: str) -> np.ndarray:
    file = BytesIO()
    with av.open(file, "w", "amr") as out:
        stream = out.add_stream(codec, rate=NARROW, layout="mono")
        stream.bit_rate = 12_200
        frame = av.AudioFrame.from_ndarray((samples * 32767).astype(np.int16)[None], "s16", "mono")
        frame.sample_rate = NARROW
        for packet in (*stream.encode(frame), *stream.encode(None)):
            out.mux(packet)
    file.seek(0)
    with av.open(file) as coded:
        pieces = [frame.to_ndarray()[0] for frame in coded.decode(audio=0)]
    decoded = np.concatenate(pieces)
    return decoded.astype(np.float32) / (32768 if decoded.dtype == np.int16 else 1)
