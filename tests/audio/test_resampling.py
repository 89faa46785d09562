"""Quality of the resampler, by tones of known level: the pass band's end, and the noise that it adds."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile

from serving.audio.decode import decode


def tone_of(frequency_hz: float, rate: int) -> tuple[float, float]:
    """Return the amplitude of a tone of 0.5 after resampling to 16 kHz, and the ratio of it to all else in dB."""
    time_s = np.arange(2 * rate) / rate
    buffer = io.BytesIO()
    samples = 0.5 * np.sin(2 * np.pi * frequency_hz * time_s)
    soundfile.write(buffer, samples, rate, format="WAV", subtype="DOUBLE")
    middle = decode(buffer.getvalue(), max_duration_s=10)[8000:24_000].astype(np.float64)
    phase = 2 * np.pi * frequency_hz * np.arange(8000, 24_000) / 16_000
    basis = np.stack([np.sin(phase), np.cos(phase)], axis=1)
    weights, *_ = np.linalg.lstsq(basis, middle, rcond=None)
    rest = middle - basis @ weights
    return float(np.hypot(*weights)), float(20 * np.log10(np.hypot(*weights) / np.sqrt(2 * np.mean(rest**2))))


@pytest.mark.parametrize("rate", [22_050, 44_100, 48_000])
def test_the_pass_band_reaches_to_its_end_and_little_is_added(rate: int) -> None:
    """A tone of 7.4 kHz keeps its level within 0.5 %, and one of 1 kHz is 125 dB above all that is added.

    Measured with soxr's high quality: 0.3 % and 134 dB at 44.1 kHz; with its medium quality 1 % and 111 dB.
    """
    assert tone_of(7400, rate)[0] == pytest.approx(0.5, rel=0.005)
    assert tone_of(1000, rate)[1] > 125
