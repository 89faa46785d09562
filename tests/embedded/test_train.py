"""Training steps on a corpus of a few clips."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import pytest

from deploy.embedded.batches import IGNORED, KINDS, MEL, Clip, Corpus, _without, audio_tokens, varied
from deploy.embedded.corpus.captions import Event, Facts, caption
from tests.support.lazy import Lazy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch
else:
    torch = Lazy("torch")
train = Lazy("deploy.embedded.train")

LENGTHS = (50, 130, 260, 390, 700)
FACTS = Facts((Event("rain"), Event("man", "French", "slowly")), 2.0)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Train as `train` does, with one thread: threads that wait for each other took ten times the CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Corpus of five clips of noise, one of them long."""
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
    return Corpus(folder, train.build_tokenizer([caption(FACTS)] * 10))


def test_a_batch_labels_each_audio_token(corpus: Corpus) -> None:
    """Only the caption is in the loss, and each audio token has the classes of the sounds at its time."""
    batch = corpus.batch(corpus.clips[1:2], np.random.default_rng(0))
    labels = batch.labels[batch.labels != IGNORED]
    assert corpus.tokenizer.decode(labels) == caption(FACTS) + "<|im_end|>"
    assert batch.features.shape == (MEL, batch.lengths.item())
    assert batch.kinds.shape == (audio_tokens(int(batch.lengths)), len(KINDS))
    assert batch.kinds[0].argmax() == KINDS.index("rain")
    assert batch.kinds[4].argmax() == KINDS.index("man")
    assert batch.language[4] != IGNORED
    assert batch.language[0] == IGNORED


def test_beats_are_counted_per_event(tmp_path: Path) -> None:
    """Each event with a rate has a unique number in the batch, and its loss is that of the beats in its span."""
    facts = Facts((Event("clock", rate=2.0), Event("rain"), Event("beeping", rate=4.0)), 6.0)
    line = {**asdict(facts), "spans_s": [[0, 2], [2, 4], [4, 6]], "first_frame": 0, "frames": 600}
    (tmp_path / "000.jsonl").write_text("\n".join([json.dumps(line)] * 2))
    (tmp_path / "000.f16").write_bytes(
        np.random.default_rng(0).standard_normal((600, MEL)).astype(np.float16).tobytes()
    )
    corpus = Corpus(tmp_path, train.build_tokenizer([caption(facts)] * 10))
    batch = corpus.batch(corpus.clips, np.random.default_rng(1))
    assert sorted(set(batch.beating.tolist())) == [IGNORED, 0, 1, 2, 3]
    assert batch.beats[1] / batch.beats[0] == pytest.approx(2)
    heads = train.HelperHeads(192)
    tokens = torch.zeros(len(batch.beating), 192)
    with torch.no_grad():
        heads.beats.weight.zero_()
        heads.beats.bias.fill_(4 * (1.5 + math.log(2 / 11)))  # a share of 2/13 of a beat in every token
    long = torch.bincount(batch.beating[batch.beating != IGNORED])
    # Half a beat more than the span contains, because the first is at its start; 0.1 keeps the logarithms finite.
    apart = torch.log(2 / 13 * long + 0.1) - torch.log(batch.beats * long / 13 + 0.6)
    assert heads.beats_loss(tokens, batch).item() == pytest.approx(torch.square(apart).mean().item(), rel=1e-3)
    none = corpus.batch([replace(corpus.clips[0], facts=FACTS, spans_s=((0, 3), (3, 6)))], np.random.default_rng(1))
    assert heads.beats_loss(torch.zeros(len(none.beating), 192), none) == 0


def test_each_visit_varies_a_clip_and_its_facts() -> None:
    """Duration and rate change by the same factor; level and range stay; speech changes little."""
    mel = np.random.default_rng(0).uniform(-0.5, 1.5, (800, MEL)).astype(np.float32)
    beats = Clip(0, 0, 800, Facts((Event("clock", rate=2.0),), 8.0), ((1.0, 7.0),))
    speech = Clip(0, 0, 800, FACTS, ((0.0, 1.0), (1.0, 2.0)))
    lengths = []
    for seed in range(20):
        changed, clip = varied(mel.copy(), beats, np.random.default_rng(seed))
        assert changed.shape == (clip.frames, MEL)
        faster = 800 / clip.frames
        assert clip.facts.events[0].rate == pytest.approx(2 * faster)
        assert clip.facts.duration_s == pytest.approx(8 / faster)
        assert clip.spans_s[0] == pytest.approx((1 / faster, 7 / faster))
        assert changed.max() == pytest.approx(mel.max(), abs=0.02)
        assert changed.min() >= mel.min() - 0.01
        lengths.append(clip.frames)
        assert abs(varied(mel.copy(), speech, np.random.default_rng(seed))[1].frames - 800) <= 45
    assert min(lengths) < 720
    assert max(lengths) > 880


def test_some_visits_are_narrow_band() -> None:
    """Bins above the edge are empty, the level stays, and a sound above the edge is never removed."""
    mel = np.random.default_rng(0).uniform(0.5, 1.5, (400, MEL)).astype(np.float32)
    high = np.full((400, MEL), -0.5, np.float32)
    high[:, 120:124] = 1.5
    clip = Clip(0, 0, 400, Facts((Event("rain"),), 4.0), ((0.0, 4.0),))
    draws = [np.random.default_rng(seed) for seed in range(40)]
    cut = [changed for rng in draws if (changed := varied(mel, clip, rng)[0])[:, -1].max() == changed.min()]
    assert len(cut) > 5
    assert all(changed.max() == pytest.approx(mel.max(), abs=0.02) for changed in cut)
    assert all((varied(high, clip, np.random.default_rng(seed))[0] > 1).any() for seed in range(40))


def test_no_mask_removes_a_complete_sound() -> None:
    """Bins that contain one of two sounds are kept, even if the other, louder sound is in other bins."""
    mel = np.full((400, MEL), -0.5, np.float32)
    mel[:200, 20:40] = 1.5
    mel[200:, 90:94] = 1.0
    spans = ((0.0, 2.0), (2.0, 4.0))
    assert _without(mel, slice(88, 96), -0.5, spans) is mel
    assert _without(mel, slice(88, 96), -0.5, spans[:1]).max(axis=0)[90] == pytest.approx(-0.5)
    assert (_without(mel, slice(60, 70), -1.0, spans)[:, 60:70] == -1.0).all()


def test_lessons_begin_with_short_clips(corpus: Corpus) -> None:
    """The first tenth has only short clips; a resumed run has the remaining steps."""
    first, second = list(train.lessons(corpus, 0, 80, (0, 1))), list(train.lessons(corpus, 60, 80, (0, 1)))
    assert len(first) == 80
    assert len(second) == 20
    assert all(clip.frames <= train.SHORT_FRAMES for clips in first[:8] for clip in clips)
    assert any(clip.frames > train.SHORT_FRAMES for clips in first[8:] for clip in clips)


def test_processes_share_each_step(corpus: Corpus) -> None:
    """Two processes alternate in the same order of batches."""
    batches = list(train.lessons(corpus, 60, 80, (0, 1)))
    halves = [list(train.lessons(corpus, 60, 80, (rank, 2))) for rank in (0, 1)]
    assert [len(half) for half in halves] == [20, 20]
    alternating = [clips for pair in zip(*halves, strict=True) for clips in pair]
    assert alternating[: len(batches)] == batches


def test_training_learns_and_resumes(corpus: Corpus, tmp_path: Path) -> None:
    """The loss falls, and a saved state is resumed at its step."""
    training = train.Training(corpus.tokenizer, tmp_path / "state.pt")
    batch = corpus.batch(next(islice(train.lessons(corpus, 0, 80, (0, 1)), 1)), np.random.default_rng(0))
    losses = [training.learn(batch, 12) for _ in range(10)]
    alone = int(training.plan.tower_until * 12)
    assert losses[alone - 1][1] < losses[0][1], "the audio tower learns, alone"
    assert all(loss == 0 for loss, *_ in losses[:alone])
    assert losses[-1][0] < losses[alone][0], "then the captions"
    training.save()
    again = train.Training(corpus.tokenizer, tmp_path / "state.pt")
    assert again.step == 10
    assert again.learn(batch, 12) == pytest.approx(training.learn(batch, 12), rel=1e-3)
