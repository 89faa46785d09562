"""ID3v2 tags: their lengths, true and claimed.

Source: id3.org, "ID3 tag version 2.3.0" and "ID3 tag version 2.4.0".
"""

from __future__ import annotations

import re
from typing import BinaryIO

_HEADER_BYTES = 10
_FRAME_ID = re.compile(rb"[A-Z][A-Z0-9]{2,3}")
_MAX_FRAMES = 256
_SYNCHSAFE = 0x80
"""Each byte of a size in the header holds 7 bits."""


def id3_bytes(prefix: bytes) -> int:
    """Return the length of the ID3v2 tag at the start as its header claims it, 0 if there is none."""
    if not prefix.startswith(b"ID3") or len(prefix) < _HEADER_BYTES or max(prefix[6:10]) >= _SYNCHSAFE:
        return 0
    has_footer = bool(prefix[5] & 0x10)
    return (1 + has_footer) * _HEADER_BYTES + _synchsafe(prefix[6:10])


def id3_frames_end(file: BinaryIO, start: int, claimed_bytes: int) -> int:
    """Return the offset after the last frame of the tag at `start`: where its padding begins, if it has any.

    Writers that get the size of the tag wrong get those of the frames right.
    """
    file.seek(start)
    version = file.read(_HEADER_BYTES)[3]
    id_bytes, header_bytes = (3, 6) if version == 2 else (4, 10)  # noqa: PLR2004 - ID3v2.2 has short headers
    position = start + _HEADER_BYTES
    for _ in range(_MAX_FRAMES):
        file.seek(position)
        header = file.read(header_bytes)
        size = header[id_bytes : id_bytes + id_bytes]
        if len(header) < header_bytes or not _FRAME_ID.fullmatch(header[:id_bytes]):
            break
        is_synchsafe = version == 4 and max(size) < _SYNCHSAFE  # noqa: PLR2004 - since ID3v2.4
        following = position + header_bytes + (_synchsafe(size) if is_synchsafe else int.from_bytes(size))
        if following > start + claimed_bytes:
            break
        position = following
    return position


def _synchsafe(size: bytes) -> int:
    return size[0] << 21 | size[1] << 14 | size[2] << 7 | size[3]
