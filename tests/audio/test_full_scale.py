"""Sound over full scale is scaled as a whole, so that its shape survives; garbage among the samples changes nothing."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile

from serving.audio.decode import decode
from tests.audio.clips import clip, sound, stereo, with_av, with_soundfile
from tests.audio.containers import bw64

if TYPE_CHECKING:
    import numpy.typing as npt

    Samples = npt.NDArray[np.float32]

_FLOAT_FILES = [
    *(("WAV", "FLOAT"), ("WAV", "DOUBLE"), ("WAVEX", "FLOAT"), ("RF64", "FLOAT"), ("W64", "FLOAT"), ("W64", "DOUBLE")),
    *(("AIFF", "FLOAT"), ("AIFF", "DOUBLE"), ("CAF", "FLOAT"), ("CAF", "DOUBLE"), ("AU", "FLOAT"), ("AU", "DOUBLE")),
]


def _decode(data: bytes) -> Samples:
    return decode(data, max_duration_s=60)


def _likeness(one: Samples, other: Samples) -> float:
    size = min(one.size, other.size)
    return float(np.corrcoef(one[:size], other[:size])[0, 1])


def _at(decibels: float, rate: int = 44_100) -> Samples:
    """Return the sound with its average of both channels peaking at this level over full scale."""
    samples = stereo(rate)
    gain = 10 ** (decibels / 20) / float(np.abs(samples.mean(axis=1)).max())
    return np.asarray(samples * gain, np.float32)


@pytest.mark.parametrize(("kind", "subtype"), _FLOAT_FILES)
@pytest.mark.parametrize("decibels", [1, 3, 6, 12, 24])
def test_float_files_over_full_scale_are_scaled(kind: str, subtype: str, decibels: float) -> None:
    """The shape of a file at up to +24 dBFS is that of the same file within ±1, and its peak is near 1."""
    quiet = _decode(with_soundfile(kind, subtype, samples=_at(-3)))
    hot = _decode(with_soundfile(kind, subtype, samples=_at(decibels)))
    assert _likeness(hot, quiet) > 0.9999
    assert 0.85 < np.abs(hot).max() <= 1


@pytest.mark.parametrize("rate", [8000, 16_000, 48_000, 192_000])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_every_rate_and_number_of_channels_is_scaled(rate: int, channels: int) -> None:
    """Resampling and mixing come after the gain, so neither clips."""
    mono = sound(rate)
    samples = np.repeat(mono[:, None] * 8, channels, axis=1)
    hot = _decode(with_soundfile("WAV", "FLOAT", rate, samples=samples))
    assert _likeness(hot, _decode(with_soundfile("WAV", "FLOAT", rate, samples=mono))) > 0.9999


def test_containers_that_soundfile_does_not_read_are_scaled() -> None:
    """Float in BW64, MKV and MOV is scaled."""
    quiet = _decode(with_soundfile("WAV", "FLOAT", samples=_at(-3)))
    hot = _at(12)
    for data in (
        bw64(with_soundfile("WAV", "FLOAT", samples=hot)),
        with_av("matroska", "pcm_f32le", samples=hot),
        with_av("mov", "pcm_f32be", samples=hot),
        with_av("mov", "pcm_f64le", samples=hot),
    ):
        assert _likeness(_decode(data), quiet) > 0.9999


def test_integers_stored_as_floats_are_scaled() -> None:
    """Files in the range of 16, 24 and 32-bit integers, as scripts write them, sound like those within ±1."""
    quiet = _decode(with_soundfile("WAV", "FLOAT", samples=stereo(44_100)))
    for full_scale in (2**7, 2**15, 2**23, 2**31):
        samples = np.round(stereo(44_100) * full_scale).astype(np.float32)
        samples[:30_000] = 0
        assert _likeness(_decode(with_soundfile("WAV", "FLOAT", samples=samples))[11_000:], quiet[11_000:]) > 0.999


@pytest.mark.parametrize(("kind", "subtype"), [("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III"), ("OGG", "OPUS")])
@pytest.mark.parametrize("decibels", [6, 12])
def test_lossy_codecs_of_hot_sound_are_scaled(kind: str, subtype: str, decibels: float) -> None:
    """A lossy file of sound far over full scale keeps its shape."""
    quiet = _decode(with_soundfile(kind, subtype, 48_000, samples=_at(-6, 48_000)))
    hot = _decode(with_soundfile(kind, subtype, 48_000, samples=_at(decibels, 48_000)))
    assert _likeness(hot, quiet) > 0.994
    assert np.abs(hot).max() <= 1


@pytest.mark.parametrize(("kind", "subtype"), [("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")])
def test_the_overshoot_of_a_lossy_codec_is_clipped(kind: str, subtype: str) -> None:
    """Sound at full scale comes out of a lossy codec a little over it: its loudness stays as it is."""
    square = np.asarray(0.98 * np.sign(sound(48_000)), np.float32)
    decoded = _decode(with_soundfile(kind, subtype, 48_000, samples=square))
    assert np.abs(decoded).max() == 1
    assert np.sqrt(np.mean(decoded**2)) > 0.85


@pytest.mark.parametrize("value", [1e30, 3e38, np.inf, -np.inf, np.nan, 50_000, 204])
@pytest.mark.parametrize("count", [1, 30, 1000])
def test_garbage_does_not_silence_the_clip(value: float, count: int) -> None:
    """Single values of any size are clipped alone, in files within full scale and over it."""
    places = np.random.default_rng(0).integers(0, 88_200, count)
    for decibels in (-3, 12):
        intact = _decode(with_soundfile("WAV", "FLOAT", samples=_at(decibels)))
        samples = _at(decibels)
        samples[places] = value
        damaged = _decode(with_soundfile("WAV", "FLOAT", samples=samples))
        loudness = np.sqrt(np.mean(intact**2))
        assert np.isfinite(damaged).all()
        assert np.sqrt(np.mean(damaged**2)) > 0.7 * loudness
        if count <= 30:
            assert _likeness(damaged, intact) > 0.99


def test_a_few_spurious_values_a_little_over_full_scale_are_clipped() -> None:
    """Five samples of 12 in two seconds are no signal."""
    samples = stereo(44_100)
    samples[::20_000] = 12
    intact = _decode(with_soundfile("WAV", "FLOAT"))
    assert _likeness(_decode(with_soundfile("WAV", "FLOAT", samples=samples)), intact) > 0.995


def test_a_lost_byte_in_a_float_file_does_not_silence_the_part_before() -> None:
    """The floats after the lost byte have any exponent; those before keep their loudness."""
    data = bytearray(with_soundfile("WAV", "FLOAT"))
    del data[500_000]
    samples = _decode(bytes(data))
    intact = _decode(with_soundfile("WAV", "FLOAT"))
    assert np.abs(samples[:20_000] - intact[:20_000]).max() < 1e-6


def test_a_file_that_is_mostly_garbage_keeps_the_loudness_of_the_rest() -> None:
    """Floats of any exponent in two thirds of a file are no scale of the sound in the last third."""
    samples = stereo(44_100)
    garbage = 10 ** np.random.default_rng(0).uniform(0.1, 38, (60_000, 1))
    samples[:60_000] = garbage.astype(np.float32)
    intact = _decode(with_soundfile("WAV", "FLOAT"))
    damaged = _decode(with_soundfile("WAV", "FLOAT", samples=samples))
    assert np.abs(damaged[23_000:] - intact[23_000:]).max() < 1e-5


def test_files_within_full_scale_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No gain is applied, and no second pass is made, for any clip whose sound is within full scale."""
    passes: list[float] = []
    monkeypatch.setattr("serving.audio.waveform.Waveform.restart", lambda _, gain: passes.append(gain))
    for name in ("WAV float 32", "WAV PCM 16", "MP3", "AAC (ADTS)", "Ogg Opus", "WavPack", "FLAC 16"):
        _decode(clip(name).data)
    loud = np.ones((44_100, 2), np.float32)
    _decode(with_soundfile("WAV", "FLOAT", samples=loud))
    assert passes == []


def test_int_files_at_full_scale_are_unchanged() -> None:
    """An integer never exceeds full scale, however loud the file is."""
    full = np.tile(np.array([-32_768, 32_767], "<i2"), 8000)
    file = io.BytesIO()
    soundfile.write(file, full, 16_000, format="WAV", subtype="PCM_16")
    assert _decode(file.getvalue()).tolist() == (full / 32_768).tolist()
