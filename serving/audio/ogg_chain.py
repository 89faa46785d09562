"""Chained Ogg files: byte ranges of the complete Ogg files, each with its own headers, that one file concatenates.

Radio recordings and simple concatenation make them. FFmpeg and libsndfile both stop after the first one and report
nothing. Source: RFC 3533, sections 4 and 6.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEADER_BYTES = 27
_BEGIN_OF_STREAM = 2
_SEARCH_BYTES = 65_536


def chain_parts(file: BinaryIO, start: int = 0) -> Iterator[tuple[int, int]]:
    """Yield the offsets (begin, end) of each part of the chain. A part begins with the pages that begin its streams."""
    begin, position, in_beginnings = start, start, True
    while True:
        file.seek(position)
        header = file.read(_HEADER_BYTES + 255)
        if not header.startswith(b"OggS"):
            if (position := _next_page(file, position)) < 0:
                break
            continue
        is_beginning = bool(header[5:6] > b"\0" and header[5] & _BEGIN_OF_STREAM)
        if is_beginning and not in_beginnings:
            yield begin, position
            begin = position
        in_beginnings = is_beginning
        segments = header[_HEADER_BYTES - 1] if len(header) >= _HEADER_BYTES else 0
        position += _HEADER_BYTES + segments + sum(header[_HEADER_BYTES : _HEADER_BYTES + segments])
    yield begin, file.seek(0, 2)


def _next_page(file: BinaryIO, position: int) -> int:
    """Return the offset of the first page from `position` on, where one was expected; -1 if there is none."""
    file.seek(position)
    tail = b""
    while chunk := file.read(_SEARCH_BYTES):
        data = tail + chunk
        if (found := data.find(b"OggS")) >= 0:
            return position - len(tail) + found
        position += len(chunk)
        tail = data[-3:]
    return -1
