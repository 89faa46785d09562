"""Recognition of a file's format, past the tags, zeros and junk that precede its audio."""

from __future__ import annotations

from typing import BinaryIO

from serving.audio.formats import (
    MP3,
    MPEG_AUDIO,
    PREFIX_BYTES,
    Format,
    is_text,
    sniff,
    sniff_at,
    sniff_magic,
    unsupported,
)
from serving.audio.frame_sync import find_mpeg_audio, mpeg_audio_at
from serving.audio.id3 import id3_bytes, id3_frames_end

_MAX_ZEROS = 16 << 20
"""Number of zeros at the start that are skipped: encoders and interrupted downloads leave them."""

_MAX_JUNK_BYTES = 1 << 20
"""Number of bytes at the start that are searched for MPEG audio."""

_MAX_SKIPS = 8
"""Number of ID3v2 tags and runs of zeros that are skipped."""


def recognise(file: BinaryIO) -> tuple[Format | None, int, bytes]:
    """Return the format of a file, where its audio begins (past any ID3v2 tags and zeros), and the bytes there.

    Bytes of no other format after an ID3v2 tag are taken for MP3.
    """
    size, start, tagged = file.seek(0, 2), 0, False
    for _ in range(_MAX_SKIPS):
        prefix = _read(file, start)
        if unsupported(prefix):
            return None, start, prefix
        if claimed := id3_bytes(prefix):
            tagged = True
            if inside := _audio_in_tag(file, start, claimed, size):
                return inside
            if start + claimed >= size:
                return None, start, prefix
            start += claimed
        elif found := sniff_at(prefix):
            return found[0], start + found[1], prefix[found[1] :]
        elif zeros := _leading_zeros(file, start):
            start += zeros
        else:
            break
    if prefix and (prefix.isspace() or not is_text(prefix)) and (far := _search_mpeg_audio(file, start)):
        return far
    return (MP3 if tagged and prefix else None), start, prefix


def _read(file: BinaryIO, start: int, size: int = PREFIX_BYTES) -> bytes:
    file.seek(start)
    return file.read(size)


def _leading_zeros(file: BinaryIO, start: int) -> int:
    """Return the number of zeros to skip, 0 if nothing but zeros follows.

    Up to three zeros before the first other byte are kept: the size of a box of MP4, or the start code of MPEG-PS.
    """
    position = start
    while position - start < _MAX_ZEROS and (block := _read(file, position)):
        if rest := block.lstrip(b"\0"):
            end = position + len(block) - len(rest)
            for kept in (0, 3, 2):
                if end - kept > start and sniff(_read(file, end - kept, PREFIX_BYTES)):
                    return end - kept - start
            return end - start
        position += len(block)
    return 0


def _audio_in_tag(file: BinaryIO, start: int, claimed: int, size: int) -> tuple[Format, int, bytes] | None:
    """Find audio that begins within the tag at `start`, since the tag claims more bytes than it has."""
    end = id3_frames_end(file, start, claimed)
    if end < start + claimed and (rest := _read(file, end).lstrip(b"\0")):
        begin = min(end + PREFIX_BYTES, size) - len(rest)
        if begin < start + claimed and (demuxer := mpeg_audio_at(rest, 0)):
            return MPEG_AUDIO[demuxer], begin, rest
        if start + claimed >= size and (other := sniff_magic(rest)):
            return other, begin, rest
    return _search_mpeg_audio(file, start + 1) if start + claimed >= size else None


def _search_mpeg_audio(file: BinaryIO, start: int) -> tuple[Format, int, bytes] | None:
    if found := find_mpeg_audio(_read(file, start, _MAX_JUNK_BYTES)):
        begin = start + found[1]
        return MPEG_AUDIO[found[0]], begin, _read(file, begin)
    return None
