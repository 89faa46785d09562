"""Joined files: byte ranges of the complete files that one file concatenates, where FFmpeg stops after the first."""

from __future__ import annotations

import re
from io import SEEK_END
from typing import TYPE_CHECKING, BinaryIO

from serving.audio.ogg_chain import chain_parts

if TYPE_CHECKING:
    from collections.abc import Iterator

_FLV_HEADER = re.compile(rb"FLV\x01[\x00-\x07]\x00\x00\x00\x09\x00\x00\x00\x00")
_FLV_HEADER_BYTES = 13
_SEARCH_BYTES = 1 << 20


def joined_parts(file: BinaryIO, start: int, demuxer: str) -> Iterator[tuple[int, int]]:
    """Yield the offsets (begin, end) of each complete file from `start` on: of Ogg, FLV, or any other format (one)."""
    match demuxer:
        case "ogg":
            yield from chain_parts(file, start)
        case "flv":
            yield from _flv_parts(file, start)
        case _:
            yield start, file.seek(0, SEEK_END)


def _flv_parts(file: BinaryIO, start: int) -> Iterator[tuple[int, int]]:
    begin, position = start, start + 1
    while True:
        file.seek(position)
        if len(data := file.read(_SEARCH_BYTES)) < _FLV_HEADER_BYTES:
            break
        if found := _FLV_HEADER.search(data):
            yield begin, position + found.start()
            begin = position + found.start()
            position = begin + 1
        else:
            position += len(data) - _FLV_HEADER_BYTES + 1
    yield begin, file.seek(0, SEEK_END)
