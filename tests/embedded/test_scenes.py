"""Scenes from pools of sounds."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest

from deploy.embedded.batches import TOKENS_PER_S, audio_tokens
from deploy.embedded.corpus.captions import caption, parse
from deploy.embedded.corpus.coded import CODINGS, through
from deploy.embedded.corpus.pool import HELD_OUT, SAMPLE_RATE, TRAIN, Pool, trimmed, write_pool
from deploy.embedded.corpus.scenes import PEAK_DB, SceneMaker

if TYPE_CHECKING:
    from pathlib import Path

TWO_S = np.sin(np.arange(2 * SAMPLE_RATE) / 5)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small pools: a voice, an instrument and an effect per split."""
    folder = tmp_path_factory.mktemp("pools")
    both = [(split, f"{split} one") for split in (TRAIN, HELD_OUT)]
    pools: dict[str, dict[str, object]] = {
        "speech": {"kind": "man", "language": "German", "manner": "slowly"},
        "music": {"kind": "piano", "manner": "melody", "rate": 2.0},
        "effects": {"kind": "dog"},
    }
    for name, facts in pools.items():
        write_pool(folder / name, [(TWO_S, {**facts, "split": split, "origin": origin}) for split, origin in both])
    return folder


def test_a_pool_returns_the_written_sounds(cache: Path) -> None:
    """Samples have the pool's peak, and facts are unchanged."""
    pool = Pool(cache / "music")
    assert [entry.split for entry in pool.entries] == [TRAIN, HELD_OUT]
    assert pool.read(pool.entries[1]) == pytest.approx(TWO_S * 0.9 / np.abs(TWO_S).max(), abs=1e-4)


def test_silence_at_the_ends_is_cut() -> None:
    """Only the part near the peak stays, and silence becomes empty."""
    padded = np.concatenate([np.zeros(8000), TWO_S, np.zeros(8000)])
    assert len(trimmed(padded)) == pytest.approx(len(TWO_S), abs=700)
    assert len(trimmed(np.zeros(100))) == 0


@pytest.mark.parametrize("split", [TRAIN, HELD_OUT])
def test_scenes_match_their_split_and_their_facts(cache: Path, split: str) -> None:
    """Each scene has the duration and level of its facts, only sources of its split, and its events in the caption."""
    maker = SceneMaker(cache, split)
    for seed in range(40):
        scene = maker.make(seed)
        assert all(origin == "formula" or origin.startswith(split) for origin in scene.origins)
        assert len(scene.samples) == pytest.approx(scene.facts.duration_s * SAMPLE_RATE, abs=1)
        assert 0.4 <= scene.facts.duration_s <= 30.5
        low, high = PEAK_DB[scene.facts.loudness]
        assert low - 0.1 <= 20 * np.log10(np.abs(scene.samples).max()) <= high + 0.1
        stated = parse(caption(scene.facts))
        assert stated is not None
        assert [event.kind for event in stated.events] == [event.kind for event in scene.facts.events]
        if not scene.facts.overlap:
            assert all(end <= start for (_, end), (start, _) in pairwise(scene.spans_s))


def test_a_seed_fixes_a_scene(cache: Path) -> None:
    """The corpus is reproducible, and the splits do not share scenes."""
    first, again = (SceneMaker(cache, TRAIN).make(7) for _ in range(2))
    assert first.facts == again.facts
    assert (first.samples == again.samples).all()
    assert SceneMaker(cache, HELD_OUT).make(7).facts != first.facts


@pytest.mark.parametrize("seconds", [1, 7, 30])
def test_a_second_of_audio_is_thirteen_tokens(seconds: int) -> None:
    """The number is that of the audio tower; a remainder rounds up to a full token."""
    assert audio_tokens(seconds * 100) == seconds * TOKENS_PER_S
    assert audio_tokens(seconds * 100 + 1) == seconds * TOKENS_PER_S + 1


@pytest.mark.parametrize("name", CODINGS)
def test_a_coding_keeps_the_sound_and_its_length(name: str) -> None:
    """Length and sound are the same up to a few milliseconds of delay; telephones keep no high frequencies."""
    t = np.arange(2 * SAMPLE_RATE + 7) / SAMPLE_RATE
    low, high = 0.3 * np.sin(2 * np.pi * (300 + 200 * t) * t), 0.2 * np.sin(2 * np.pi * 6_000 * t)
    heard = through(name, (low + high).astype(np.float32))
    assert len(heard) == len(t)
    spectra = [np.abs(np.fft.rfft(samples)) for samples in (heard, low + high)]
    likeness = np.fft.irfft(np.fft.rfft(heard) * np.conj(np.fft.rfft(low)))[:200].max()
    assert likeness > 0.6 * np.square(low).sum()
    above = [spectrum[len(spectrum) // 2 :].max() for spectrum in spectra]
    assert above[0] < 0.05 * above[1] if CODINGS[name][2] == 8_000 else above[0] > 0.5 * above[1]
