"""Encrypted audio tracks, found in the headers: a decoder would make noise of them, or one frame of hundreds.

Sources: ISO/IEC 23001-7 (Common Encryption), RFC 9559 (Matroska) and the WebM encryption guidelines, Apple's "MPEG-2
Stream Encryption Format for HTTP Live Streaming", ETSI EN 300 468 (scrambling), Microsoft's ASF specification.
"""

from __future__ import annotations

import struct
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from serving.audio.file_part import FilePart

_ALL_TRACKS = -1
"""Key that stands for every track."""

_HEADER_BYTES = 65_536
"""Bytes of a header, or of a transport stream, that are read."""

_MAX_BOXES = 10_000
"""Bound on the boxes of a file that are visited."""

_SCHEMES = {
    **dict.fromkeys(("cenc", "cens", "cbc1", "cbcs"), "Common Encryption"),
    "piff": "PlayReady",
    "itun": "FairPlay",
    "adkm": "Adobe Access",
    "odkm": "OMA DRM",
}
_ENCRYPTED_ENTRIES = {b"enca": "Common Encryption", b"drms": "FairPlay", b"aavd": "Audible"}

_SEGMENT, _TRACKS, _TRACK_ENTRY, _CLUSTER = b"\x18\x53\x80\x67", b"\x16\x54\xae\x6b", b"\xae", b"\x1f\x43\xb6\x75"
_TRACK_TYPE, _ENCODINGS, _ENCODING, _ENCRYPTION = b"\x83", b"\x6d\x80", b"\x62\x40", b"\x50\x35"
_AUDIO_TRACK = b"\x02"

_ASF_ENCRYPTION = (
    bytes.fromhex("fbb31122 23bdd211 b4b700a0 c955fc6e"),  # Content Encryption Object
    bytes.fromhex("14e68a29 2226174c b935dae0 7ee9289c"),  # Extended Content Encryption Object
)

_TS_PACKET_BYTES = 188
_TS_STRIDES = (188, 192, 204)
_TS_SYNC = 0x47
_PMT = 0x02
_SAMPLE_AES = (0xCF, 0xC1, 0xC2)
"""Stream types of AAC, AC-3 and E-AC-3 by HLS SAMPLE-AES."""


class Encryption:
    """Encrypted audio tracks of a file."""

    def __init__(self, file: FilePart, demuxer: str) -> None:
        find = {"mov": _mp4, "matroska": _matroska, "mpegts": _mpegts, "asf": _asf}.get(demuxer)
        self._by_number = demuxer == "matroska"
        try:
            self._methods = find(file) if find else {}
        except (struct.error, IndexError):  # damaged headers
            self._methods = {}

    @property
    def method(self) -> str:
        """Method of an encrypted track, empty if there is none."""
        return next(iter(self._methods.values()), "")

    def of(self, tracks: Sequence[Any]) -> list[str]:
        """Return how each of FFmpeg's audio streams is encrypted, empty if it is not."""
        every = self._methods.get(_ALL_TRACKS, "")
        keys = (number if self._by_number else track.id for number, track in enumerate(tracks))
        return [self._methods.get(key, every) for key in keys]


class _Box(NamedTuple):
    """Contents of a box of MP4 or an element of EBML, between two offsets."""

    kind: bytes
    begin: int
    end: int


class _Walk:
    """Walk over the boxes of MP4, or the elements of EBML, of a file; of at most `_MAX_BOXES`."""

    def __init__(self, file: FilePart) -> None:
        self._file, self._left = file, _MAX_BOXES
        self.file = _Box(b"", 0, file.end - file.begin)

    def read(self, box: _Box, size: int = _HEADER_BYTES) -> bytes:
        self._file.seek(box.begin)
        return self._file.read(min(size, box.end - box.begin))

    def boxes(self, parent: _Box) -> Iterator[_Box]:
        position = parent.begin
        while header := self._header(position, parent, 16):
            if len(header) < 8:  # noqa: PLR2004 - size and kind
                return
            size, header_bytes = int.from_bytes(header[:4]), 8
            if size == 1:
                size, header_bytes = int.from_bytes(header[8:]), 16
            elif size == 0:
                size = parent.end - position
            if size < header_bytes:
                return
            yield _Box(header[4:8], position + header_bytes, min(position + size, parent.end))
            position += size

    def elements(self, parent: _Box, kind: bytes) -> Iterator[_Box]:
        """Yield the elements of one kind, up to the first cluster of packets."""
        position = parent.begin
        while (header := self._header(position, parent, 12)) and header[0]:
            id_bytes = 9 - header[0].bit_length()
            found, size_byte = header[:id_bytes], header[id_bytes]
            if found == _CLUSTER or not size_byte:
                return
            size_bytes = 9 - size_byte.bit_length()
            unknown = (1 << 7 * size_bytes) - 1  # up to the end of the parent
            size = int.from_bytes(header[id_bytes : id_bytes + size_bytes]) & unknown
            contents = position + id_bytes + size_bytes
            following = parent.end if size == unknown else contents + size
            if found == kind:
                yield _Box(found, contents, min(following, parent.end))
            position = following

    def _header(self, position: int, parent: _Box, size: int) -> bytes:
        self._left -= 1
        return self.read(_Box(b"", position, parent.end), size) if position < parent.end and self._left > 0 else b""


def _mp4(file: FilePart) -> dict[int, str]:
    """Return the methods by track ID."""
    walk = _Walk(file)
    found: dict[int, str] = {}
    movie = next((box for box in walk.boxes(walk.file) if box.kind == b"moov"), None)
    for track in walk.boxes(movie) if movie else ():
        if track.kind != b"trak":
            continue
        track_id, is_audio, method = 0, False, ""
        for box in _sample_boxes(walk, track):
            match box.kind:
                case b"tkhd":
                    header = walk.read(box, 24)
                    track_id = struct.unpack_from(">I", header, 20 if header[0] == 1 else 12)[0]
                case b"hdlr":
                    is_audio = is_audio or walk.read(box, 12)[8:] == b"soun"
                case b"stsd":
                    method = _mp4_method(walk.read(box))
        if is_audio and method:
            found[track_id] = method
    return found


def _sample_boxes(walk: _Walk, track: _Box) -> Iterator[_Box]:
    """Yield the boxes of a track, down to those that describe its samples."""
    for box in walk.boxes(track):
        yield box
        if box.kind == b"mdia":
            for media in walk.boxes(box):
                yield media
                if media.kind == b"minf":
                    tables = [table for table in walk.boxes(media) if table.kind == b"stbl"]
                    yield from (inner for table in tables for inner in walk.boxes(table))


def _mp4_method(descriptions: bytes) -> str:
    """Return how samples are encrypted, nothing if no entry says so. After a clear lead it is the second one."""
    position = 8
    while position + 8 <= len(descriptions):
        size, kind = struct.unpack_from(">I4s", descriptions, position)
        entry = descriptions[position + 8 : position + size]
        if kind in _ENCRYPTED_ENTRIES or b"sinf" in entry:
            scheme = entry.partition(b"schm")[2][4:8].decode("latin-1")
            method = _SCHEMES.get(scheme) or _ENCRYPTED_ENTRIES.get(kind, "an unknown scheme")
            return f"{method}, {scheme}" if scheme.isalnum() else method
        position += max(size, 8)
    return ""


def _matroska(file: FilePart) -> dict[int, str]:
    """Return the methods by the number of the audio track, from 0 on."""
    walk = _Walk(file)
    segment = next(walk.elements(walk.file, _SEGMENT), None)
    tracks = next(walk.elements(segment, _TRACKS), None) if segment else None
    audio = [
        track
        for track in (walk.elements(tracks, _TRACK_ENTRY) if tracks else ())
        if any(walk.read(kind) == _AUDIO_TRACK for kind in walk.elements(track, _TRACK_TYPE))
    ]
    return {number: "ContentEncryption" for number, track in enumerate(audio) if _has_encryption(walk, track)}


def _has_encryption(walk: _Walk, track: _Box) -> bool:
    return any(
        True
        for encodings in walk.elements(track, _ENCODINGS)
        for encoding in walk.elements(encodings, _ENCODING)
        for _ in walk.elements(encoding, _ENCRYPTION)
    )


def _asf(file: FilePart) -> dict[int, str]:
    file.seek(0)
    header = file.read(_HEADER_BYTES)
    header = header[: struct.unpack_from("<Q", header, 16)[0]]
    return {_ALL_TRACKS: "Windows Media DRM"} if any(guid in header for guid in _ASF_ENCRYPTION) else {}


def _mpegts(file: FilePart) -> dict[int, str]:
    """Return the methods by PID: HLS SAMPLE-AES if the program map says so, scrambling if most packets are marked."""
    found: dict[int, str] = {}
    packets, scrambled = Counter[int](), Counter[int]()
    for packet in _ts_packets(file):
        pid = struct.unpack_from(">H", packet, 1)[0] & 0x1FFF
        packets[pid] += 1
        scrambled[pid] += packet[3] >> 7
        if packet[1] & 0x40 and packet[3] & 0x10:  # begins a section or PES packet
            payload = packet[5 + packet[4] :] if packet[3] & 0x20 else packet[4:]
            if payload[:1] == b"\0" and payload[1:2] == bytes([_PMT]):
                found |= _sample_aes(payload[1:])
    return found | {pid: "scrambled" for pid in packets if 2 * scrambled[pid] > packets[pid]}


def _ts_packets(file: FilePart) -> Iterator[bytes]:
    file.seek(0)
    data = file.read(_HEADER_BYTES)
    for stride in _TS_STRIDES:
        for first in range(stride):
            syncs = data[first::stride]
            if syncs.count(_TS_SYNC) > len(syncs) * 0.9:
                for start in range(first, len(data) - _TS_PACKET_BYTES + 1, stride):
                    yield data[start : start + _TS_PACKET_BYTES]
                return


def _sample_aes(section: bytes) -> dict[int, str]:
    """Return the PIDs of encrypted audio of a program map."""
    length, info_bytes = (struct.unpack_from(">H", section, at)[0] & 0xFFF for at in (1, 10))
    found = {}
    position, end = 12 + info_bytes, min(3 + length - 4, len(section))
    while position + 5 <= end:
        kind, pid, descriptor_bytes = struct.unpack_from(">BHH", section, position)
        if kind in _SAMPLE_AES:
            found[pid & 0x1FFF] = "HLS SAMPLE-AES"
        position += 5 + (descriptor_bytes & 0xFFF)
    return found
