"""Segments of a transcription: captions with times, as SubRip (SRT) and WebVTT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_MS_PER_S, _S_PER_MINUTE, _S_PER_HOUR = 1000, 60, 3600


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of the audio, in seconds from its start, and its caption."""

    index: int
    start_s: float
    end_s: float
    caption: str


def segments_of(caption: str, audio_s: float) -> list[Segment]:
    """Return the segments of a clip of `audio_s` seconds: one, with the caption of all of it."""
    return [Segment(0, 0.0, audio_s, caption.strip())]


def srt(segments: Iterable[Segment]) -> str:
    """Return the segments as SubRip cues; a segment without a caption has none."""
    cues = [segment for segment in segments if segment.caption]
    return "".join(
        f"{number}\n{_time(cue.start_s, ',')} --> {_time(cue.end_s, ',')}\n{_line(cue.caption)}\n\n"
        for number, cue in enumerate(cues, 1)
    )


def webvtt(segments: Iterable[Segment]) -> str:
    """Return the segments as a WebVTT file; a segment without a caption has no cue."""
    cues = (segment for segment in segments if segment.caption)
    return "WEBVTT\n\n" + "".join(
        f"{_time(cue.start_s, '.')} --> {_time(cue.end_s, '.')}\n{_escaped(_line(cue.caption))}\n\n" for cue in cues
    )


def _line(text: str) -> str:
    """Return the text in one line: an empty line ends a cue, and an arrow may begin another one."""
    return " ".join(text.split()).replace("-->", "→")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _time(seconds: float, point: str) -> str:
    whole_s, ms = divmod(round(seconds * _MS_PER_S), _MS_PER_S)
    minutes, s = divmod(whole_s % _S_PER_HOUR, _S_PER_MINUTE)
    return f"{whole_s // _S_PER_HOUR:02}:{minutes:02}:{s:02}{point}{ms:03}"
