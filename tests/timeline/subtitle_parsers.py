"""Strict parsers of SubRip and WebVTT, written from the formats' descriptions and not from our writers.

WebVTT: https://www.w3.org/TR/webvtt1/, the syntax that authors must keep. SubRip has no standard: the parser takes what
players agree on.
"""

from __future__ import annotations

import html
import re
from typing import NamedTuple

_SRT_TIME = re.compile(r"(\d{2,}):([0-5]\d):([0-5]\d),(\d{3})")
_WEBVTT_TIME = re.compile(r"(\d{2,}):([0-5]\d):([0-5]\d)\.(\d{3})")


class Cue(NamedTuple):
    """One cue: milliseconds, and the lines as a viewer reads them."""

    start_ms: int
    end_ms: int
    lines: tuple[str, ...]


def parse_srt(text: str) -> list[Cue]:
    """Return the cues. Raises `ValueError` for anything that is not plain SubRip."""
    cues = []
    for number, block in enumerate(_blocks(text), 1):
        index, times, *lines = block
        if index != str(number):
            raise ValueError(f"cue {number} has the number {index}")
        cues.append(_cue(times, lines, _SRT_TIME))
        if any("<" in line or "-->" in line or "{\\" in line for line in lines):
            raise ValueError(f"cue {number} has text that players interpret: {lines}")
    return _in_order(cues)


def parse_webvtt(text: str) -> list[Cue]:
    """Return the cues. Raises `ValueError` for anything that is not WebVTT without identifiers, settings and tags."""
    signature, rest = text[:8], text[8:]
    if signature != "WEBVTT\n\n":
        raise ValueError("no signature")
    cues = []
    for times, *lines in _blocks(rest):
        if any(re.search(r"<|-->|&(?!amp;|lt;|gt;)", line) for line in lines):
            raise ValueError(f"an unescaped character: {lines}")
        cues.append(_cue(times, [html.unescape(line) for line in lines], _WEBVTT_TIME))
    return _in_order(cues)


def _blocks(text: str) -> list[list[str]]:
    if "\r" in text or "\0" in text:
        raise ValueError("a control character")
    if text and not text.endswith("\n\n"):
        raise ValueError("the last cue is not complete")
    blocks = [block.split("\n") for block in text[:-2].split("\n\n")] if text else []
    if any(not line for block in blocks for line in block):
        raise ValueError("a blank line in a cue")
    return blocks


def _cue(times: str, lines: list[str], pattern: re.Pattern[str]) -> Cue:
    start, arrow, end = times.partition(" --> ")
    if not arrow or not lines:
        raise ValueError(f"no times or no text: {times} {lines}")
    return Cue(_ms(start, pattern), _ms(end, pattern), tuple(lines))


def _ms(text: str, pattern: re.Pattern[str]) -> int:
    if not (match := pattern.fullmatch(text)):
        raise ValueError(f"no time: {text}")
    hours, minutes, seconds, ms = map(int, match.groups())
    return ((hours * 60 + minutes) * 60 + seconds) * 1000 + ms


def _in_order(cues: list[Cue]) -> list[Cue]:
    shown_ms = 0
    for cue in cues:
        if not shown_ms <= cue.start_ms < cue.end_ms:
            raise ValueError(f"not in the order of time: {cue}")
        shown_ms = cue.end_ms
    return cues
