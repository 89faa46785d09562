"""Training steps on a corpus of a few clips."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import pytest

from deploy.embedded.architecture import build_tokenizer
from deploy.embedded.batches import IGNORED, KINDS, MEL, Corpus, audio_tokens
from deploy.embedded.corpus.captions import Event, Facts, caption
from deploy.embedded.train import SHORT_FRAMES, Training, lessons

if TYPE_CHECKING:
    from pathlib import Path

LENGTHS = (50, 130, 260, 390, 700)
FACTS = Facts((Event("rain"), Event("man", "French", "slowly")), 2.0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Five clips of noise, of which one is long."""
    folder = tmp_path_factory.mktemp("train")
    features = np.random.default_rng(0).standard_normal((sum(LENGTHS), MEL)).astype(np.float16)
    (folder / "000.f16").write_bytes(features.tobytes())
    firsts = np.cumsum((0, *LENGTHS[:-1])).tolist()
    spans = [[0, 0.2], [0.3, 0.5]]
    lines = [
        json.dumps({**asdict(FACTS), "spans_s": spans, "first_frame": first, "frames": frames})
        for first, frames in zip(firsts, LENGTHS, strict=True)
    ]
    (folder / "000.jsonl").write_text("\n".join(lines))
    return Corpus(folder, build_tokenizer([caption(FACTS)] * 10))


def test_a_batch_says_what_is_heard_when(corpus: Corpus) -> None:
    """Only the caption counts in the loss, and each audio token knows the sounds of its moment."""
    batch = corpus.batch(corpus.clips[1:2], np.random.default_rng(0))
    told = batch.labels[batch.labels != IGNORED]
    assert corpus.tokenizer.decode(told) == caption(FACTS) + "<|im_end|>"
    assert batch.features.shape == (MEL, 130)
    assert batch.kinds.shape == (audio_tokens(130), len(KINDS))
    assert batch.kinds[0].argmax() == KINDS.index("rain")
    assert batch.kinds[4].argmax() == KINDS.index("man")
    assert batch.language[4] != IGNORED
    assert batch.language[0] == IGNORED


def test_lessons_begin_with_short_clips(corpus: Corpus) -> None:
    """The first half holds short clips only; a run that is taken up again holds the rest of the steps."""
    first, second = list(lessons(corpus, 0, 8)), list(lessons(corpus, 6, 8))
    assert len(first) == 8
    assert len(second) == 2
    assert all(clip.frames <= SHORT_FRAMES for clips in first[:4] for clip in clips)
    assert any(clip.frames > SHORT_FRAMES for clips in first[4:] for clip in clips)


def test_training_learns_and_goes_on(corpus: Corpus, tmp_path: Path) -> None:
    """The loss falls, and a state that was saved is taken up where it was left."""
    training = Training(corpus.tokenizer, tmp_path / "state.pt")
    batch = corpus.batch(next(islice(lessons(corpus, 0, 8), 1)), np.random.default_rng(0))
    losses = [training.learn(batch, 8)[0] for _ in range(6)]
    assert losses[-1] < losses[0]
    training.save()
    again = Training(corpus.tokenizer, tmp_path / "state.pt")
    assert again.step == 6
    assert again.learn(batch, 8) == pytest.approx(training.learn(batch, 8), rel=1e-3)
