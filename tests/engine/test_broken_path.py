"""The audio path broken on purpose, part by part: the check that passes for the intact path fails for each fault."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import soxr

from serving.audio import decode, features
from serving.audio.ffmpeg_reader import averaged
from serving.audio.waveform import Waveform
from serving.types import SAMPLE_RATE, Features
from tests.audio.clips import with_soundfile
from tests.embedded.known_sounds import assert_states, in_turn, recorded, sound
from tests.engine.conftest import caption

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from serving.engine.vllm.engine import VllmEngine

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

RATE = 48_000
SCENE = recorded(in_turn(sound(2, "siren", 3.0), sound(2, "telephone", 3.0)))
OTHER = recorded(in_turn(sound(2, "buzzer", 3.0), sound(2, "dialling", 3.0)))


def in_stereo() -> bytes:
    """Return the scene as a WAV of 48 kHz: its siren in the left channel, its telephone in the right."""
    stereo = 2 * np.repeat(soxr.resample(SCENE.samples, SAMPLE_RATE, RATE)[:, None], 2, axis=1)
    stereo[: len(stereo) // 2, 1] = 0
    stereo[len(stereo) // 2 :, 0] = 0
    return with_soundfile("WAV", "PCM_16", RATE, samples=stereo)


async def describe(engine: VllmEngine) -> str:
    """Return the scene's caption from the service's own decoder, features and engine."""
    samples = decode.decode(in_stereo(), max_duration_s=60)
    return (await caption(engine, Features(features.log_mel(samples), samples.size))).text


async def test_the_intact_path_describes_the_scene(engine: VllmEngine) -> None:
    """Without a fault, the caption states the facts of the scene."""
    assert_states(await describe(engine), SCENE.facts)


def _resampler_of(factor: float) -> Callable[..., soxr.ResampleStream]:
    real = soxr.ResampleStream
    return lambda rate, *others, **named: real(rate * factor, *others, **named)


def _one_channel(index: int) -> Callable[..., Any]:
    real = averaged
    return lambda frames, full_scale: real(frames[:, [index]], 2 * full_scale)


def _every_second_block() -> Callable[..., None]:
    real, blocks = Waveform.append, iter(range(1_000))

    def append(waveform: Any, rate: int, mono: npt.NDArray[np.float32]) -> None:
        if next(blocks) % 2:
            real(waveform, rate, mono)

    return append


def _frames_in(order: Callable[[int], Any]) -> Callable[..., Any]:
    real = features._frames
    return lambda samples, first, count: real(samples, first, count)[order(count)]


def _first_bands_last() -> list[Any]:
    widths = [(mels.stop - mels.start, bins, weights) for mels, bins, weights in features._BANDS]
    at, bands = 0, []
    for width, bins, weights in reversed(widths):
        bands.append((slice(at, at + width), bins, weights))
        at += width
    return bands


def _amplify(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Waveform, "gain", 1.0)  # else it would be scaled
    patch.setattr(
        "serving.audio.decode.averaged",
        lambda frames, full_scale: np.float32(20) * frames.mean(1).astype(np.float32) / full_scale,
    )


BROKEN: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the resampler takes 48 for 96 kHz": lambda patch: patch.setattr(soxr, "ResampleStream", _resampler_of(2)),
    "the resampler takes 48 for 24 kHz": lambda patch: patch.setattr(soxr, "ResampleStream", _resampler_of(0.5)),
    "only the left channel is read": lambda patch: patch.setattr("serving.audio.decode.averaged", _one_channel(0)),
    "only the right channel is read": lambda patch: patch.setattr("serving.audio.decode.averaged", _one_channel(1)),
    "every second block is lost": lambda patch: patch.setattr(Waveform, "append", _every_second_block()),
    "the decoded samples are too loud": _amplify,
    "frames are shuffled": lambda patch: patch.setattr(
        features, "_frames", _frames_in(lambda count: np.random.default_rng(0).permutation(count))
    ),
    "frames come in reverse": lambda patch: patch.setattr(
        features, "_frames", _frames_in(lambda count: np.arange(count)[::-1])
    ),
    "the filters are in another order": lambda patch: patch.setattr(features, "_BANDS", _first_bands_last()),
    "features of another clip": lambda patch: patch.setattr(
        features, "log_mel", lambda _, real=features.log_mel: real(OTHER.samples)
    ),
}


@pytest.mark.parametrize("how", BROKEN)
async def test_a_broken_path_is_noticed(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """With a fault, the caption no longer states the facts of the scene."""
    BROKEN[how](monkeypatch)
    text = await describe(engine)
    with pytest.raises(AssertionError):
        assert_states(text, SCENE.facts)
