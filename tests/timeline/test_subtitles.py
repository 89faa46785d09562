"""Subtitles: valid for strict parsers and FFmpeg, readable, in the order of time."""

from __future__ import annotations

import io
from itertools import pairwise

import av
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.timeline.segments import Segment
from serving.timeline.subtitles import CUE_MS, LINE_CHARS, LINES, srt, webvtt
from tests.timeline.subtitle_parsers import Cue, parse_srt, parse_webvtt

_LONG = (
    "A man greets the audience in a warm voice. Then he explains, over quiet piano music, that the train to the coast "
    "leaves from platform nine at half past six in the morning. People applaud! The music fades out slowly, and a door "
    "is closed."
)


def _segment(start_s: float, end_s: float, caption: str) -> Segment:
    return Segment(0, start_s, end_s, caption, None, None)


def test_srt_text() -> None:
    """The text of SubRip is this, to the byte; a segment without a caption has no cue."""
    segments = [_segment(0, 4.5004, "A dog barks."), _segment(4.5004, 9, " \n"), _segment(9, 3725.25, "Rain falls.")]
    assert srt(segments) == (
        "1\n00:00:00,000 --> 00:00:04,500\nA dog barks.\n\n2\n00:00:09,000 --> 01:02:05,250\nRain falls.\n\n"
    )


def test_webvtt_text() -> None:
    """The text of WebVTT is this, to the byte."""
    segments = [_segment(0, 4.5, "A dog barks."), _segment(4.5, 9, "Q & A: <b>1 --> 2</b>")]
    assert webvtt(segments) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:04.500\nA dog barks.\n\n"
        "00:00:04.500 --> 00:00:09.000\nQ &amp; A: &lt;b&gt;1 --&gt; 2&lt;/b&gt;\n\n"
    )


def test_srt_markup() -> None:
    """Text that players would take for a time, a tag or an override is shown as text."""
    (cue,) = parse_srt(srt([_segment(0, 4, "<i>1 --> 2</i> {\\an8}end")]))
    assert cue.lines == ("‹i›1 → 2‹/i› {an8}end",)  # noqa: RUF001


def test_no_segments() -> None:
    """A timeline without captions gives valid, empty files."""
    assert srt([]) == ""
    assert webvtt([_segment(0, 4, "")]) == "WEBVTT\n\n"


def test_hours_over_99() -> None:
    """Hours have as many digits as they need."""
    assert "\n100:00:00,000 --> 123:04:05,678\n" in srt([_segment(360_000, 443_045.678, "Rain.")])


def test_long_caption() -> None:
    """A long caption is split over the segment's time at the ends of sentences."""
    cues = parse_webvtt(webvtt([_segment(10, 40, _LONG)]))
    assert [" ".join(cue.lines) for cue in cues] == [
        "A man greets the audience in a warm voice.",
        "Then he explains, over quiet piano music, that the train to the coast leaves from",
        "platform nine at half past six in the morning. People applaud!",
        "The music fades out slowly, and a door is closed.",
    ]
    assert cues[0].start_ms == 10_000
    assert cues[-1].end_ms == 40_000
    assert all(before.end_ms == after.start_ms for before, after in pairwise(cues))


def test_shortened_caption() -> None:
    """A caption that cannot be read in the segment's time loses its last sentences, and an ellipsis says so."""
    (cue,) = parse_srt(srt([_segment(0, 5, _LONG)]))
    assert cue == Cue(0, 5000, ("A man greets the audience in a warm voice…",))


def test_shortened_sentence() -> None:
    """A single sentence that is too long ends at a word."""
    (cue,) = parse_srt(srt([_segment(0, 5, "a distant voice reads the news " * 20)]))
    assert cue.lines == ("a distant voice reads the news a distant", "voice reads the news a distant voice…")


captions = st.text(max_size=400) | st.sampled_from(
    [_LONG, "-->", "WEBVTT", "1\n\n2", "NOTE x", "STYLE", "&amp;", "a" * 300, "<" * 50, "好。" * 60]
)


@st.composite
def _timelines(draw: st.DrawFn) -> list[Segment]:
    edges = sorted(draw(st.lists(st.floats(0, 400_000, allow_nan=False), min_size=2, max_size=6)))
    return [_segment(start, end, draw(captions)) for start, end in pairwise(edges)]


@given(_timelines())
def test_any_segments(segments: list[Segment]) -> None:
    """Subtitles of any captions and times are valid and readable, and both formats have the same cues."""
    cues = parse_webvtt(webvtt(segments))
    assert [cue[:2] for cue in parse_srt(srt(segments))] == [cue[:2] for cue in cues]
    for cue in cues:
        assert len(cue.lines) <= LINES
        assert all(0 < len(line) <= LINE_CHARS for line in cue.lines)
        (segment,) = [each for each in segments if _contains(each, cue)][:1]
        within = [other for other in cues if _contains(segment, other)]
        assert len(within) == 1 or segment.end_s - segment.start_s >= len(within) * CUE_MS / 1000 - 0.002


def _contains(segment: Segment, cue: Cue) -> bool:
    return round(1000 * segment.start_s) <= cue.start_ms and cue.end_ms <= round(1000 * segment.end_s)


@pytest.mark.parametrize(("write", "form"), [(srt, "srt"), (webvtt, "webvtt")])
def test_ffmpeg_reads(write: object, form: str) -> None:
    """FFmpeg reads the same times and texts as were written."""
    assert callable(write)
    text = write([_segment(0, 4.5, "A dog & a cat <b>play</b>."), _segment(4.5, 34.5, _LONG)])
    with av.open(io.BytesIO(text.encode()), format=form) as file:
        packets = [packet for packet in file.demux() if packet.size]
        base = file.streams[0].time_base
    times = [
        (round(1000 * packet.pts * base), round(1000 * (packet.pts + packet.duration) * base)) for packet in packets
    ]
    parse = parse_srt if form == "srt" else parse_webvtt
    assert times == [cue[:2] for cue in parse(text)]
    assert len(times) == 5
    assert bytes(packets[1]).decode() == "A man greets the audience in a warm voice."
