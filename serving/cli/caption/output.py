"""Captions as text, JSON Lines, Markdown or subtitles, to standard output in order or to one file for each clip."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from typing import TYPE_CHECKING, Any, TextIO

from serving.cli.terminal import BOLD, paint

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from serving.cli.caption.client import Caption, ServiceError
    from serving.cli.caption.sources import Source

SUBTITLES = {"srt": "srt", "vtt": "webvtt"}
"""Formats of subtitles, and the function of `serving.timeline.subtitles` that writes each."""

_SUFFIXES = {"text": ".txt", "json": ".json", "md": ".md", "srt": ".srt", "vtt": ".vtt"}


def formats() -> list[str]:
    """Return the formats that this version writes: subtitles only where it makes timelines."""
    return ["text", "json", "md", *(SUBTITLES if importlib.util.find_spec("serving.timeline") else ())]


def render(source: Source, caption: Caption, form: str) -> str:
    """Return the caption of one clip in a format, as its only one."""
    match form:
        case "json":
            return json.dumps(_described(source, caption), ensure_ascii=False) + "\n"
        case "md":
            return f"## {source.name}\n\n{_markdown(caption)}\n"
        case "text":
            return f"{_text(caption)}\n"
        case _:
            return _subtitles(caption, form)


def destination(source: Source, directory: Path, form: str) -> Path:
    """Return the file of a clip's result: its own name with the suffix of the format added."""
    return directory / source.relative.with_name(source.relative.name + _SUFFIXES[form])


def write(path: Path, content: str) -> None:
    """Write a file, which is there in full or not at all. Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(content, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


class Printer:
    """Results on a stream. `several`: more than one clip, so that each has its name above it."""

    def __init__(self, stream: TextIO, form: str, *, several: bool) -> None:
        self._stream = stream
        self._form = form
        self._several = several
        self._count = 0
        self._streaming = False

    @property
    def within_line(self) -> bool:
        """True while a streamed caption has begun and has not ended."""
        return self._streaming

    def text(self, source: Source, piece: str) -> None:
        """Print a piece of a streamed caption; only the format `text` is streamed."""
        if not self._streaming:
            self._streaming = True
            self._heading(source)
        self._print(piece)

    def finish(self, source: Source, caption: Caption) -> None:
        """Print a caption, or end it if it was streamed."""
        if self._streaming:
            self._streaming = False
            self._print("\n")
            return
        if self._form == "text":
            self._heading(source)
        elif self._form == "md" and self._count:
            self._print("\n")
        self._count += 1
        self._print(render(source, caption, self._form))

    def fail(self, source: Source, error: Exception) -> None:
        """Print a failure where the format has a place for it: JSON."""
        if self._streaming:
            self._streaming = False
            self._print("\n")
        if self._form == "json":
            self._print(json.dumps(failed(source, error), ensure_ascii=False) + "\n")

    def _heading(self, source: Source) -> None:
        if self._several:
            gap = "\n" if self._count else ""
            self._print(f"{gap}{paint(f'==> {source.name} <==', BOLD, self._stream)}\n")
            self._count += 1

    def _print(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def failed(source: Source, error: Exception | ServiceError) -> dict[str, Any]:
    """Return the failure of a clip as a JSON object."""
    about = {"message": str(error), "code": getattr(error, "code", None), "status": getattr(error, "status", 0) or None}
    return {"file": source.name, "error": about}


def _described(source: Source, caption: Caption) -> dict[str, Any]:
    described: dict[str, Any] = {"file": source.name, "caption": caption.text, "finish_reason": caption.finish_reason}
    if caption.stopped:
        described["stopped"] = caption.stopped
    if caption.segments is not None:
        described["segments"] = [dict(segment) for segment in caption.segments]
    return described | {"usage": dict(caption.usage)}


def _text(caption: Caption) -> str:
    if caption.segments is None:
        return caption.text
    return "\n".join(f"{_span(segment)}  {_said(segment)}".rstrip() for segment in caption.segments)


def _markdown(caption: Caption) -> str:
    if caption.segments is None:
        return caption.text
    rows = (f"| {_span(each)} | {_said(each).replace('|', '&#124;')} |" for each in caption.segments)
    return "\n".join(("| Time | Caption |", "|---|---|", *(" ".join(row.split()) for row in rows)))


def _said(segment: Mapping[str, Any]) -> str:
    """Return the caption of a segment, or in brackets why there is none."""
    error = segment.get("error")
    return " ".join(str(segment.get("caption") or (f"[{error}]" if error else "")).split())


def _span(segment: Mapping[str, Any]) -> str:
    return f"{_clock(float(segment['start']))}-{_clock(float(segment['end']))}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02}:{rest:04.1f}" if hours else f"{minutes}:{rest:04.1f}"


def _subtitles(caption: Caption, form: str) -> str:
    # Its module is imported only for subtitles, because it and its types are the service's.
    segments = importlib.import_module("serving.timeline.segments")
    subtitles = importlib.import_module("serving.timeline.subtitles")
    found = [
        segments.Segment(number, float(each["start"]), float(each["end"]), str(each.get("caption") or ""), None, None)
        for number, each in enumerate(caption.segments or ())
    ]
    text: str = getattr(subtitles, SUBTITLES[form])(found)
    return text
