"""Formats that may begin anywhere, found by what recurs: frames of MPEG audio and GSM, packets of MPEG-TS and -PS."""

from __future__ import annotations

import re
from itertools import islice

_MPEG_FRAMES = 3
"""Number of frames that must follow one another, since MPEG audio has only a sync word."""

_FAR_MPEG_FRAMES = 6
_FAR_BYTES = 65_536
"""Offset from which `_FAR_MPEG_FRAMES` are required: the longer the search, the likelier a chain by chance."""

_MAX_CANDIDATES = 20_000
"""Bound on the sync words that are tried."""

_SYNC_WORD = re.compile(
    rb"\xff[\xe2-\xe5\xf2-\xf5\xfa-\xfd\xf0\xf1\xf8\xf9]"  # MPEG-1, 2 and 2.5, layers II and III; ADTS
    rb"|\x56[\xe0-\xff]"  # LOAS
)

_TS_PACKETS = tuple(
    re.compile(rb"\x47(?:.{%d}\x47){4}" % (packet_bytes - 1), re.DOTALL) for packet_bytes in (188, 192, 204)
)
"""Five packets: plain, with a time code of 4 bytes before (M2TS), with 16 bytes of FEC after (DVB)."""

_SHORT_TS = re.compile(rb"(?:....)?\x47.{187}(?:....)?\x47.{187}(?:....)?\x47", re.DOTALL)
"""Three packets, with which a file of fewer than five begins."""

_PS_PACK = re.compile(rb"\x00\x00\x01\xba[\x20-\x2f\x40-\x7f]")

_GSM_FRAME_BYTES = 33
_GSM_SIGNATURE = 0xD0
_GSM_FRAMES = 8
"""Number of frames that must begin with a nibble of 0xD."""


def find_mpeg_audio(data: bytes) -> tuple[str, int] | None:
    """Return demuxer and offset of the first chain of MPEG audio frames, at the start or after junk."""
    if demuxer := mpeg_audio_at(data, 0):
        return demuxer, 0
    for count, sync in enumerate(_SYNC_WORD.finditer(data)):
        if count == _MAX_CANDIDATES:
            break
        if sync.start() and (demuxer := mpeg_audio_at(data, sync.start())):
            return demuxer, sync.start()
    return None


def find_transport_stream(data: bytes) -> int:
    """Return the offset of the first complete packet of MPEG-TS, -1 if there is none. The packet before may be cut."""
    if _SHORT_TS.match(data):
        return 0
    return min((found.start() for packets in _TS_PACKETS if (found := packets.search(data))), default=-1)


def find_program_stream(data: bytes) -> int:
    """Return the offset of the first of several packs of MPEG-PS, -1 if there are none."""
    packs = [pack.start() for pack in islice(_PS_PACK.finditer(data), 2)]
    return packs[0] if len(packs) > 1 else -1


def is_raw_gsm(data: bytes) -> bool:
    """Recognise GSM 06.10 frames without a header."""
    nibbles = [byte & 0xF0 for byte in data[: _GSM_FRAMES * _GSM_FRAME_BYTES]]
    first, second = nibbles[::_GSM_FRAME_BYTES], nibbles[1::_GSM_FRAME_BYTES]
    return len(first) == _GSM_FRAMES and set(first) == {_GSM_SIGNATURE} and set(second) != {_GSM_SIGNATURE}


def mpeg_audio_at(data: bytes, start: int) -> str:
    """Return the demuxer of the MPEG audio frames that follow one another from `start` on; empty if too few do."""
    needed = _FAR_MPEG_FRAMES if start >= _FAR_BYTES else _MPEG_FRAMES
    for demuxer, frame_bytes in (("mp3", _mp3_frame_bytes), ("aac", _adts_frame_bytes), ("loas", _loas_frame_bytes)):
        position, frames = start, 0
        while frames < needed and (size := frame_bytes(data[position : position + 6])):
            position, frames = position + size, frames + 1
        # Data that end within the chain prove less, so the chain must begin at their first byte.
        if frames == needed or (frames and start == 0 and position >= len(data)):
            return demuxer
    return ""


_MP3_KBPS = {  # by version (1, or 2 and 2.5) and layer
    (1, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_MP3_HZ = (44_100, 48_000, 32_000)


def _mp3_frame_bytes(header: bytes) -> int:
    """Return the length of the MPEG-1/2/2.5 layer II or III frame with this header, 0 if it is not such a header."""
    word = int.from_bytes(header[:4])
    version, layer, rate, hz = word >> 19 & 3, 4 - (word >> 17 & 3), word >> 12 & 15, word >> 10 & 3
    if word >> 21 != 0x7FF or version == 1 or layer not in (2, 3) or rate in (0, 15) or hz == 3:  # noqa: PLR2004
        return 0
    generation = 1 if version == 3 else 2  # noqa: PLR2004
    samples = 576 if (generation, layer) == (2, 3) else 1152
    hz_shift = {3: 0, 2: 1, 0: 2}[version]
    return samples * 125 * _MP3_KBPS[generation, layer][rate] // (_MP3_HZ[hz] >> hz_shift) + (word >> 9 & 1)


def _adts_frame_bytes(header: bytes) -> int:
    """Return the length of the ADTS frame with this header, 0 if it is not such a header."""
    word = int.from_bytes(header[:6].ljust(6, b"\0"))
    is_sync, hz, size = word >> 36 == 0xFFF and not word >> 33 & 3, word >> 26 & 15, word >> 5 & 0x1FFF  # noqa: PLR2004
    return size if is_sync and hz < 13 and size > 7 else 0  # noqa: PLR2004


def _loas_frame_bytes(header: bytes) -> int:
    """Return the length of the LOAS (LATM) frame with this header, 0 if it is not such a header."""
    word = int.from_bytes(header[:3])
    return 3 + (word & 0x1FFF) if word >> 13 == 0x2B7 and word & 0x1FFF else 0  # noqa: PLR2004
