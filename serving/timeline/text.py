"""Readable text of a segment, for where a client reads text alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serving.timeline.segments import Segment


def readable(segment: Segment) -> str:
    """Return the times of a segment and its caption, or the code of the error that it has instead."""
    times = f"[{_time(segment.start_s)} - {_time(segment.end_s)}]"
    return f"{times} {segment.caption}" if segment.error is None else f"{times} (no caption: {segment.error})"


def _time(seconds: float) -> str:
    ms = round(1000 * seconds)
    return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02}.{ms % 1000:03}"
