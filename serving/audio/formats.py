"""Audio formats, recognised by a clip's first bytes and never by its name.

Recognition decides which library opens the clip, and as which format. Text has no format, so web pages, playlists, SDP
and concat scripts reach no decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX_BYTES = 65_536
"""Number of bytes of a clip that recognition reads."""

_ID3_HEADER_BYTES = 10
_MAX_ID3_TAGS = 8
_TS_PACKET_BYTES = 188
_MPEG_FRAMES = 3
"""MPEG audio has no magic number, only a sync word: this many frames must follow one another."""


@dataclass(frozen=True, slots=True)
class Format:
    """A container format.

    `demuxer` is FFmpeg's name of the format. `soundfile` marks formats that libsndfile reads as correctly and as fast.
    """

    name: str
    demuxer: str
    soundfile: bool = False


# libsndfile also reads FLAC, MP3 and Ogg. But there it trusts the number of samples in the header (an MP3 made of two
# ends after the first), gives up at the first damaged frame, and takes 2.5 to 3 times as long for Ogg.
_MP3 = Format("MP3", "mp3")
_AAC = Format("AAC", "aac")
_LATM = Format("AAC (LATM)", "loas")
_MP4 = Format("MP4", "mov")
_QUICKTIME = Format("QuickTime", "mov")
_3GP = Format("3GP", "mov")
_MPEG_TS = Format("MPEG-TS", "mpegts")
_WAV = Format("WAV", "wav", soundfile=True)

_MAGIC: tuple[tuple[bytes, Format], ...] = (
    (b"fLaC", Format("FLAC", "flac")),
    (b"OggS", Format("Ogg", "ogg")),
    (b"#!AMR\n", Format("AMR", "amr")),
    (b"#!AMR-WB\n", Format("AMR-WB", "amr")),
    (b"\x1a\x45\xdf\xa3", Format("Matroska or WebM", "matroska")),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", Format("WMA or ASF", "asf")),
    (b"riff\x2e\x91\xcf\x11", Format("Wave64", "w64", soundfile=True)),
    (b".snd", Format("AU", "au", soundfile=True)),
    (b"caff", Format("CAF", "caf", soundfile=True)),
    (b"Creative Voice File\x1a", Format("VOC", "voc", soundfile=True)),
    (b"wvpk", Format("WavPack", "wv")),
    (b"TTA1", Format("TTA", "tta")),
    (b"\x0b\x77", Format("AC-3", "ac3")),
    (b"FLV\x01", Format("FLV", "flv")),
    (b"\x00\x00\x01\xba", Format("MPEG-PS", "mpeg")),
)

_RIFF = {b"WAVE": _WAV, b"AVI ": Format("AVI", "avi")}
_IFF = dict.fromkeys((b"AIFF", b"AIFC"), Format("AIFF", "aiff", soundfile=True))
_ATOMS = (b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")
"""Atoms with which a QuickTime file may begin where an MP4 has `ftyp`."""


def recognise(file: BinaryIO) -> tuple[Format | None, int, bytes]:
    """Return the format of a file, where its audio begins (past any ID3v2 tags), and the bytes there.

    Bytes of no other format after an ID3v2 tag are taken for MP3.
    """
    start = 0
    for _ in range(_MAX_ID3_TAGS):
        file.seek(start)
        prefix = file.read(PREFIX_BYTES)
        if not (tag_bytes := _id3_bytes(prefix)):
            break
        start += tag_bytes
    found = sniff(prefix)
    return (found or _MP3 if start and prefix else found), start, prefix


def sniff(prefix: bytes) -> Format | None:
    """Return the format of a file that begins with `prefix`, or `None`.

    The result is the surer the longer `prefix` is, up to `PREFIX_BYTES`.
    """
    for magic, found in _MAGIC:
        if prefix.startswith(magic):
            return found
    match prefix[:4]:
        case b"RIFF" | b"RIFX" | b"RF64":
            return _RIFF.get(prefix[8:12])
        case b"FORM":
            return _IFF.get(prefix[8:12])
    match prefix[4:8]:
        case b"ftyp":
            return _3GP if prefix[8:10] == b"3g" else _QUICKTIME if prefix[8:12] == b"qt  " else _MP4
        case atom if atom in _ATOMS:
            return _QUICKTIME
    if prefix[: 2 * _TS_PACKET_BYTES + 1 : _TS_PACKET_BYTES] == b"GGG":
        return _MPEG_TS
    return _MP3 if _id3_bytes(prefix) else _mpeg_audio(prefix)


def is_text(prefix: bytes) -> bool:
    """Return whether these bytes are text: a web page, a playlist, a script, JSON."""
    try:
        text = prefix.decode("utf-16" if prefix.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    except UnicodeDecodeError as error:
        text = prefix[: error.start].decode(errors="replace") if len(prefix) - error.start < 4 else "\0"  # noqa: PLR2004
    return all(char.isprintable() or char.isspace() for char in text)


def _id3_bytes(prefix: bytes) -> int:
    """Return the length of the ID3v2 tag at the start, 0 if there is none."""
    if not prefix.startswith(b"ID3") or len(prefix) < _ID3_HEADER_BYTES or max(prefix[6:10]) >= 0x80:  # noqa: PLR2004
        return 0
    size = prefix[6] << 21 | prefix[7] << 14 | prefix[8] << 7 | prefix[9]
    has_footer = bool(prefix[5] & 0x10)
    return (1 + has_footer) * _ID3_HEADER_BYTES + size


def _mpeg_audio(prefix: bytes) -> Format | None:
    """Recognise MP3 (or MP2) or AAC by a chain of frames, at the start or after junk such as zeros."""
    for start in _sync_words(prefix):
        for found, frame_bytes in ((_MP3, _mp3_frame_bytes), (_AAC, _adts_frame_bytes), (_LATM, _loas_frame_bytes)):
            position, frames = start, 0
            while frames < _MPEG_FRAMES and (size := frame_bytes(prefix[position : position + 6])):
                position, frames = position + size, frames + 1
            # A prefix that ends within the chain proves less, so the chain must begin at its first byte.
            if frames == _MPEG_FRAMES or (frames and start == 0 and position >= len(prefix)):
                return found
    return None


def _sync_words(prefix: bytes) -> Iterator[int]:
    yield 0
    start = 0
    while (start := prefix.find(b"\xff", start + 1)) >= 0:
        yield start


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
