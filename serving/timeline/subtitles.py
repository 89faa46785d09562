"""Subtitles of a timeline: SubRip (SRT) and WebVTT.

A cue has at most two lines of 42 characters and is shown for at least four seconds if its segment lasts that long, so
that it can be read. A caption that needs more is split over the time of its segment, at the ends of sentences where
possible; what does not fit the time is left out, and an ellipsis says so. The complete captions are in the JSON form.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from serving.timeline.segments import Segment

LINE_CHARS, LINES = 42, 2
"""Most characters of a line, and most lines of a cue."""

CUE_MS = 4000
"""Least duration of each of several cues of one segment: 21 characters a second at most."""

_ELLIPSIS = "…"
_SENTENCE_END = re.compile(r"(?<=[.!?…]) |(?<=[.!?…][\"'”’)\]]) |(?<=[。！？])")  # noqa: RUF001
_CONTROLS = {code: None for code in range(32) if chr(code) not in "\t\n\v\f\r\x1c\x1d\x1e\x1f"} | {0x7F: None}


@dataclass(frozen=True, slots=True)
class _Cue:
    start_ms: int
    end_ms: int
    lines: tuple[str, ...]


def srt(segments: Iterable[Segment]) -> str:
    """Return the segments as SubRip. Segments without a caption have no cue.

    The format has no escapes: an arrow and angle brackets, which players read as a time or a tag, are replaced by other
    characters that look alike.
    """
    return "".join(
        f"{number}\n{_time(cue.start_ms, ',')} --> {_time(cue.end_ms, ',')}\n{_srt_text(cue)}\n\n"
        for number, cue in enumerate(_cues(segments), 1)
    )


def webvtt(segments: Iterable[Segment]) -> str:
    """Return the segments as WebVTT. Segments without a caption have no cue."""
    return "WEBVTT\n\n" + "".join(
        f"{_time(cue.start_ms, '.')} --> {_time(cue.end_ms, '.')}\n{_webvtt_text(cue)}\n\n" for cue in _cues(segments)
    )


def _time(ms: int, point: str) -> str:
    seconds, ms = divmod(ms, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}{point}{ms:03}"


def _srt_text(cue: _Cue) -> str:
    text = "\n".join(cue.lines).replace("-->", "→").replace("<", "‹").replace(">", "›")  # noqa: RUF001
    return text.replace("{\\", "{")  # the beginning of an override, by which players place or colour a cue


def _webvtt_text(cue: _Cue) -> str:
    return "\n".join(cue.lines).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _cues(segments: Iterable[Segment]) -> Iterator[_Cue]:
    """Yield cues in the order of time: none is empty, and none starts before the one before it has ended."""
    shown_ms = 0
    for segment in segments:
        start_ms, end_ms = max(shown_ms, round(1000 * segment.start_s)), round(1000 * segment.end_s)
        texts = _texts(segment.caption, max(1, (end_ms - start_ms) // CUE_MS)) if end_ms > start_ms else []
        edges = _edges(start_ms, end_ms, [sum(map(len, lines)) for lines in texts])
        for lines, (begin_ms, until_ms) in zip(texts, pairwise(edges), strict=True):
            yield _Cue(begin_ms, until_ms, lines)
        shown_ms = max(shown_ms, end_ms)


def _edges(start_ms: int, end_ms: int, lengths: Sequence[int]) -> list[int]:
    """Divide the time in proportion to the lengths of the texts, half of it equally, so that no cue is too short."""
    if not lengths:
        return []
    share, total = (end_ms - start_ms) / 2, sum(lengths)
    done = (number / len(lengths) + sum(lengths[:number]) / total for number in range(len(lengths) + 1))
    return [start_ms + round(share * each) for each in done]


def _texts(caption: str, most: int) -> list[tuple[str, ...]]:
    """Return the lines of at most `most` cues."""
    cues: list[tuple[str, ...]] = []
    sentences = [each for each in _SENTENCE_END.split(" ".join(caption.translate(_CONTROLS).split())) if each]
    for number, sentence in enumerate(sentences):
        added = _chunks(sentence)
        if cues and len(joined := _wrap(" ".join((*cues[-1], sentence)))) <= LINES:
            cues[-1] = tuple(joined)
        elif len(cues) + len(added) <= most:
            cues += added
        elif number and cues:  # leave out this sentence and all after it
            cues[-1] = _ended(cues[-1])
            return cues
        else:
            return [*added[: most - 1], _ended(added[most - 1])]
    return cues


def _chunks(sentence: str) -> list[tuple[str, ...]]:
    lines = _wrap(sentence)
    return [tuple(lines[first : first + LINES]) for first in range(0, len(lines), LINES)]


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, LINE_CHARS, break_on_hyphens=False)


def _ended(lines: tuple[str, ...]) -> tuple[str, ...]:
    """Return the lines with an ellipsis at their end, within their bounds."""
    last = lines[-1].rstrip(" .,;:")
    if len(last) >= LINE_CHARS:
        last = last[: LINE_CHARS - 1].rsplit(" ", 1)[0].rstrip(" .,;:")
    return (*lines[:-1], last + _ELLIPSIS)
