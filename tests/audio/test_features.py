"""Log-mel features against transformers' own extractor.

The two are single precision. Measured: at most 6e-5 apart (a pure tone), each at most 5e-5 off the same computation in
double precision. The tolerance of 1e-4 is 0.004 dB.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from serving.audio import features
from serving.audio.decode import decode
from serving.audio.features import frame_count, log_mel
from tests.audio.clips import clip, sound
from tests.support.lazy import Lazy

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    Samples = npt.NDArray[np.float32]

_TOLERANCE = 1e-4
transformers = Lazy("transformers")


@pytest.fixture(scope="module")
def extractor() -> Any:
    """The feature extractor of the model's processor."""
    return transformers.WhisperFeatureExtractor(
        feature_size=128, sampling_rate=16_000, hop_length=160, n_fft=400, chunk_length=300
    )


def _noise(count: int) -> Samples:
    return np.random.default_rng(1).standard_normal(count, np.float32)


_CLIPS: dict[str, Callable[[], Samples]] = {
    "shortest that transformers takes": lambda: sound(16_000)[:201],
    "two frames less one sample": lambda: sound(16_000)[:319],
    "two frames": lambda: sound(16_000)[:320],
    "0.05 s": lambda: sound(16_000, 0.05),
    "0.05 s and a sample": lambda: sound(16_000)[:801],
    "1 s": lambda: sound(16_000, 1),
    "a block of frames": lambda: _noise(512 * 160) * 0.1,
    "a block and one frame": lambda: _noise(513 * 160) * 0.1,
    "a block and a part of a frame": lambda: _noise(513 * 160 - 1) * 0.1,
    "30 s": lambda: sound(16_000, 30),
    "70 s, odd": lambda: sound(16_000, 70)[:-7],
    "silence": lambda: np.zeros(16_000, np.float32),
    "silence, then a click": lambda: np.eye(1, 16_000, 8000, dtype=np.float32)[0],
    "loud square wave": lambda: np.sign(sound(16_000)),
    "pure tone": lambda: np.sin(np.arange(80_000, dtype=np.float32)) * np.float32(0.9),
    "white noise": lambda: np.clip(_noise(160_000), -1, 1),
    "very quiet": lambda: sound(16_000) * np.float32(1e-5),
    "MP3": lambda: decode(clip("MP3").data, max_duration_s=10),
    "AMR-NB": lambda: decode(clip("AMR-NB").data, max_duration_s=10),
    "Opus": lambda: decode(clip("Ogg Opus").data, max_duration_s=10),
}


def _exact(samples: Samples, mel_filters: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Compute Whisper's features by their definition, in double precision."""
    padded = np.pad(samples.astype(np.float64), 200, "reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, 400)[::160][: samples.size // 160]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    power = np.abs(np.fft.rfft(frames * window)) ** 2
    decades = np.log10(np.maximum(mel_filters.T @ power.T, 1e-10))
    exact: npt.NDArray[np.float64] = np.maximum(decades, decades.max() - 8) / 4 + 1
    return exact


@pytest.mark.parametrize("name", _CLIPS)
def test_features_equal_those_of_transformers(extractor: Any, name: str) -> None:
    """The features have the shape and, within the tolerance, the values of the extractor in the model's processor."""
    samples = _CLIPS[name]()
    theirs = extractor(
        samples, sampling_rate=16_000, padding=True, truncation=False, return_attention_mask=True, return_tensors="np"
    )
    ours = log_mel(samples)
    assert ours.dtype == np.float32
    assert ours.shape == (128, frame_count(samples.size)) == theirs["input_features"][0].shape
    assert theirs["attention_mask"].sum() == ours.shape[1]
    assert np.abs(ours - theirs["input_features"][0]).max() < _TOLERANCE
    assert np.abs(ours - _exact(samples, extractor.mel_filters)).max() < _TOLERANCE


@pytest.mark.parametrize("count", [1, 79, 80, 159, 160, 161, 200])
def test_clips_too_short_to_reflect_are_continued_with_silence(count: int) -> None:
    """A clip that transformers refuses gives one frame, that of the clip followed by silence."""
    samples = sound(16_000)[1000 : 1000 + count]
    longer = np.pad(samples, (0, 201 - count))
    assert log_mel(samples).shape == (128, 1)
    assert (log_mel(samples) == log_mel(longer)).all()


def test_features_are_written_into_a_given_array() -> None:
    """The caller may pass the array to fill, such as shared memory, and gets the same array back."""
    samples = sound(16_000)
    memory = bytearray(4 * 128 * frame_count(samples.size))
    out = np.frombuffer(memory, np.float32).reshape(128, -1)
    assert log_mel(samples, out=out) is out
    assert (out == log_mel(samples)).all()


def test_the_samples_are_left_alone() -> None:
    """Making features does not write into the waveform."""
    samples = sound(16_000)
    samples.flags.writeable = False
    log_mel(samples)


def test_a_worker_imports_neither_torch_nor_transformers() -> None:
    """Decoding and features need light libraries only: a worker starts in a second and stays small."""
    program = "import sys, serving.audio.decode, serving.audio.features; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert "scipy.fft" in modules
    assert not {"torch", "transformers", "scipy.signal", "vllm"} & set(modules)


def test_the_mel_filters_are_those_of_transformers() -> None:
    """The filter bank is computed here, so that workers need not import transformers."""
    theirs = transformers.audio_utils.mel_filter_bank(201, 128, 0.0, 8000.0, 16_000, norm="slaney", mel_scale="slaney")
    assert np.abs(features._mel_filters() - theirs.T).max() < 1e-8
