"""Sounds made by formula."""

from __future__ import annotations

import numpy as np
import pytest

from deploy.embedded.corpus import procedural
from deploy.embedded.corpus.captions import SOUNDS
from deploy.embedded.corpus.pool import SAMPLE_RATE

KINDS = [*procedural.RHYTHMIC, *procedural.STEADY]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_words_and_the_length_asked_for(kind: str) -> None:
    """Each kind is audible, finite, as long as asked for, and can be named in a caption."""
    for seconds in (0.5, 2.25):
        samples, _ = procedural.make(np.random.default_rng(1), kind, seconds)
        assert len(samples) == int(seconds * SAMPLE_RATE)
        assert np.isfinite(samples).all()
        assert np.abs(samples).max() > 0.01
    assert kind in SOUNDS


@pytest.mark.parametrize("kind", ["hammering", "knocking", "beeping", "clicking"])
def test_a_rate_is_what_can_be_counted(kind: str) -> None:
    """The rate that a caption will tell is the number of beats per second in the samples."""
    for seed in range(4):
        samples, rate = procedural.make(np.random.default_rng(seed), kind, 6.0)
        envelope = np.abs(samples)[: len(samples) // 160 * 160].reshape(-1, 160).max(axis=1)
        loud = envelope > 0.35 * envelope.max()
        onsets = int((loud[1:] & ~loud[:-1]).sum()) + int(loud[0])
        assert onsets / 6 == pytest.approx(rate, rel=0.2)


def test_a_seed_fixes_the_sound() -> None:
    """The same seed gives the same samples, another seed others."""
    first, again, other = (procedural.make(np.random.default_rng(seed), "rain", 1.0)[0] for seed in (3, 3, 4))
    assert (first == again).all()
    assert not (first == other).all()
