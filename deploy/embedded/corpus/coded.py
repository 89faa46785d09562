"""Clips that come through lossy codings: telephones leave nothing above 4 kHz, and model voices, not sounds."""

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
"""Name of a coding: container and codec as soundfile calls them (PyAV for AMR), and the sample rate that is coded."""


def through(name: str, samples: np.ndarray) -> np.ndarray:
    """16 kHz `samples` through the coding `name` and back, as many as before."""
    container, codec, rate = CODINGS[name]
    plain = soxr.resample(np.clip(samples, -1, 1), SAMPLE_RATE, rate)
    if name == "AMR":
        heard = _amr(plain, codec)
    else:
        file = BytesIO()
        soundfile.write(file, plain, rate, format=container, subtype=codec)
        file.seek(0)
        heard, rate = soundfile.read(file, dtype="float32")
    back = soxr.resample(heard, rate, SAMPLE_RATE)[: len(samples)].astype(np.float32)
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
    heard = np.concatenate(pieces)
    return heard.astype(np.float32) / (32768 if heard.dtype == np.int16 else 1)
