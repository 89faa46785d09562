"""WAV files of 16-bit mono samples."""

from __future__ import annotations

import base64
import io
import wave


def wav_base64(samples: bytes, sample_rate: int = 16_000) -> str:
    """Return a WAV file of 16-bit mono samples as base64."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(samples)
    return base64.b64encode(buffer.getvalue()).decode()


def wav_data_url(samples: bytes) -> str:
    """Return a 16 kHz WAV file of 16-bit mono samples as a data URL."""
    return f"data:audio/wav;base64,{wav_base64(samples)}"
