"""Cuts at pauses: pieces tile the audio, start as events do, and cut none where a pause is within reach."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.audio.segment import CROSS_OVER, cut, loudness_db
from serving.audio.speech import speech_probabilities
from serving.types import SAMPLE_RATE
from tests.audio.film import film, spoken

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from serving.types import AudioPiece
    from tests.audio.film import Film

    Samples = npt.NDArray[np.float32]


def _check_tiling(pieces: Sequence[AudioPiece], samples: int, max_piece_s: float) -> None:
    assert (pieces[0].begin, pieces[-1].end) == (0, samples)
    assert all(before.end == after.begin for before, after in pairwise(pieces))
    for piece in pieces:
        assert 0 <= piece.audio_begin <= piece.begin < piece.end <= piece.audio_end <= samples
        assert piece.audio_end - piece.audio_begin <= max_piece_s * SAMPLE_RATE


def _check_events(pieces: Sequence[AudioPiece], story: Film, longest_s: float) -> int:
    """Check that no cut is inside an event with a pause in the 3 s before; return the number of cuts at an onset."""
    onsets = 0
    for piece in pieces[1:]:
        time_s = piece.begin / SAMPLE_RATE
        event = story.at(time_s)
        if event is not None:
            assert time_s - event.start_s > 3, (time_s, event)
            assert event.end_s - event.start_s > min(3.5, longest_s / 2), (time_s, event)
            continue
        following = min((each.start_s for each in story.events if each.start_s >= time_s), default=None)
        before = next(other for other in pieces if other.end == piece.begin)
        if following is not None and following - time_s > 0.1:
            # The longest piece ends within the pause, or the last piece would be a scrap.
            is_longest = piece.begin - before.audio_begin > 0.99 * longest_s * SAMPLE_RATE
            assert is_longest or piece is pieces[-1], (time_s, following)
        else:
            onsets += 1
    return onsets


@pytest.mark.parametrize("max_piece_s", [30, 12, 5])
@pytest.mark.parametrize("bed_db", [None, -50])
def test_cuts_of_a_film(max_piece_s: float, bed_db: float | None) -> None:
    """No cut is inside an event where a pause is within 3 s, and pieces start at most 0.1 s before an event does."""
    story = film(300, bed_db=bed_db)
    pieces = cut(story.samples, max_piece_s)
    _check_tiling(pieces, story.samples.size, max_piece_s)
    assert _check_events(pieces, story, max_piece_s) > 0.4 * (len(pieces) - 1)


def test_short_audio_is_one_piece() -> None:
    """Audio up to the longest piece is not cut, one sample more is; one sample is a piece."""
    tone = np.full(5 * SAMPLE_RATE + 1, 0.1, np.float32)
    assert len(cut(tone[:-1], 5)) == 1
    assert len(cut(tone, 5)) == 2
    (piece,) = cut(tone[:1], 5)
    assert (piece.begin, piece.end, piece.audio_begin, piece.audio_end) == (0, 1, 0, 1)


def test_hard_cut() -> None:
    """Both pieces of a cut without a pause hear half a second of the other."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(70 * SAMPLE_RATE).astype(np.float32)
    pieces = cut(noise, 30)
    _check_tiling(pieces, noise.size, 30)
    assert [piece.end / SAMPLE_RATE for piece in pieces] == [29.5, 57.5, 70.0]
    assert [piece.audio_begin for piece in pieces] == [0, pieces[1].begin - CROSS_OVER, pieces[2].begin - CROSS_OVER]
    assert [piece.audio_end for piece in pieces] == [30 * SAMPLE_RATE, pieces[1].end + CROSS_OVER, noise.size]
    assert [piece.speech_share for piece in pieces] == [0, 0, 0]


def test_speech_over_a_steady_sound() -> None:
    """A voice that speaks over a sound as loud as itself is cut between two sentences."""
    rng = np.random.default_rng(1)
    gap = np.zeros(SAMPLE_RATE // 2, np.float32)
    parts = [part for number in range(12) for part in (spoken(number), gap)]
    edges_s = np.cumsum([part.size for part in parts]) / SAMPLE_RATE
    voice = np.concatenate(parts)
    noise = rng.standard_normal(voice.size).astype(np.float32)
    pieces = cut(voice + 0.05 * noise, 15)
    assert len(pieces) >= 3
    for piece in pieces[1:]:
        time_s = piece.begin / SAMPLE_RATE
        gaps = [(end, start) for end, start in zip(edges_s[::2], edges_s[1::2], strict=True)]
        assert any(end - 0.1 <= time_s <= start + 0.1 for end, start in gaps), time_s
        assert piece.audio_begin == piece.begin
        assert piece.speech_share > 0.6


def test_silence() -> None:
    """Silence has no loudness and no speech, and is cut where the longest piece ends."""
    pieces = cut(np.zeros(70 * SAMPLE_RATE, np.float32), 30)
    assert [(piece.end / SAMPLE_RATE, piece.loudness_db, piece.speech_share) for piece in pieces] == [
        (30, None, 0),
        (58, None, 0),
        (70, None, 0),
    ]


@st.composite
def _sounds(draw: st.DrawFn) -> Samples:
    """Any sequence of tones, noise, silence and steps, of any level and length."""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    parts = []
    for _ in range(draw(st.integers(1, 6))):
        size = draw(st.integers(1, 12 * SAMPLE_RATE))
        level = 10 ** draw(st.floats(-6, 0))
        shape = draw(st.sampled_from(["silence", "noise", "tone", "step"]))
        time_s = np.arange(size) / SAMPLE_RATE
        parts.append(
            {
                "silence": np.zeros(size),
                "noise": level * np.clip(rng.standard_normal(size), -1, 1),
                "tone": level * np.sin(2 * np.pi * 300 * time_s),
                "step": np.full(size, level),
            }[shape].astype(np.float32)
        )
    return np.concatenate(parts)


@settings(max_examples=25)
@given(_sounds(), st.floats(5, 30))
def test_pieces_tile_any_audio(samples: Samples, max_piece_s: float) -> None:
    """Pieces of any audio tile it, are not too long, and are finite in every number."""
    pieces = cut(samples, max_piece_s)
    _check_tiling(pieces, samples.size, max_piece_s)
    assert all(piece.end - piece.begin >= 0.9 * SAMPLE_RATE for piece in pieces[:-1])
    assert all(0 <= piece.speech_share <= 1 for piece in pieces)
    assert all(piece.loudness_db is None or np.isfinite(piece.loudness_db) for piece in pieces)


def test_loudness() -> None:
    """A sine of 997 Hz at full scale has -3.01 LUFS (ITU-R BS.1770); FFmpeg measures the same of noise."""
    time_s = np.arange(10 * SAMPLE_RATE) / SAMPLE_RATE
    assert loudness_db(np.sin(2 * np.pi * 997 * time_s).astype(np.float32)) == pytest.approx(-3.01, abs=0.01)
    noise = 0.1 * np.random.default_rng(0).standard_normal(10 * SAMPLE_RATE).astype(np.float32)
    assert loudness_db(noise) == pytest.approx(_ffmpeg_loudness(noise), abs=0.15)


def _ffmpeg_loudness(samples: Samples) -> float:
    graph = av.filter.Graph()
    source = graph.add_abuffer(sample_rate=SAMPLE_RATE, format="flt", layout="mono", time_base="1/16000")
    meter, sink = graph.add("ebur128", "metadata=1"), graph.add("abuffersink")
    source.link_to(meter)
    meter.link_to(sink)
    graph.configure()
    frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
    frame.sample_rate = SAMPLE_RATE
    graph.push(frame)
    graph.push(None)
    measured = 0.0
    while True:
        try:
            frame = graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return measured
        measured = float(frame.metadata.get("lavfi.r128.I", measured))


def test_speech_probabilities() -> None:
    """The network's values are those of the package's own weights (silero-vad 6.2.3, in PyTorch, float32)."""
    time_s = np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    pulses = np.sin(2 * np.pi * 110 * time_s) ** 31 * (1 + np.sin(2 * np.pi * 3 * time_s)) / 4
    values = speech_probabilities(pulses.astype(np.float32))
    assert values.size == 63
    assert values[[0, 5, 10, 20, 40, 60]] == pytest.approx(_REFERENCE, abs=0.001)
    assert speech_probabilities(spoken(0)).mean() > 0.9
    assert speech_probabilities(np.zeros(SAMPLE_RATE, np.float32)).max() < 0.1


_REFERENCE = [0.2216, 0.0187, 0.0370, 0.0176, 0.0188, 0.0313]
