"""Encrypted audio is refused by name, whatever container it is in; clear audio next to it is decoded."""

from __future__ import annotations

import struct
from functools import reduce

import pytest

from serving.audio.decode import decode
from serving.errors import AudioError, AudioUnreadable
from tests.audio.clips import clip, remuxed, with_av
from tests.audio.containers import box, element, id3, id3_frame, ts_of

_MOVIE_PATH = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd")


def _refused(data: bytes, reason: str) -> None:
    with pytest.raises(AudioUnreadable) as error:
        decode(data, max_duration_s=60)
    assert str(error.value) == f"The audio format is illegal and cannot be opened: {reason}"


def _sinf(original: bytes, scheme: bytes) -> bytes:
    schi = box(b"schi", box(b"tenc", bytes(6) + b"\1\10" + bytes(16)))
    return box(b"sinf", box(b"frma", original), box(b"schm", bytes(4) + scheme + b"\0\1\0\0"), schi)


def _grown(mp4: bytes, track: int, extra: bytes, kind: bytes) -> bytes:
    """Rename the sample entry of a track and append boxes to it. The index is behind the packets, so none moves."""
    data = bytearray(mp4)
    sizes, begin, end = [], 0, len(data)
    for name in _MOVIE_PATH:
        skip = track if name == b"trak" else 0
        while data[begin + 4 : begin + 8] != name or (skip := skip - 1) >= 0:
            begin += struct.unpack_from(">I", data, begin)[0]
        sizes.append(begin)
        end = begin + struct.unpack_from(">I", data, begin)[0]
        begin += 8
    entry = begin + 8
    sizes.append(entry)
    assert entry + struct.unpack_from(">I", data, entry)[0] == end
    for offset in sizes:
        struct.pack_into(">I", data, offset, struct.unpack_from(">I", data, offset)[0] + len(extra))
    data[entry + 4 : entry + 8] = kind
    data[end:end] = extra
    return bytes(data)


@pytest.mark.parametrize("name", ["MP4 AAC (M4A)", "MP4 ALAC (M4A)", "MP4 Opus", "3GP AMR-NB", "MP4 DTS"])
@pytest.mark.parametrize("scheme", ["cenc", "cens", "cbc1", "cbcs"])
def test_common_encryption_is_refused_by_name(name: str, scheme: str) -> None:
    """Each of the four schemes is named, whatever the codec, although some packets may decode to noise."""
    mp4 = clip(name).data
    original = mp4[mp4.index(b"stsd") + 16 :][:4]
    container = name.split(maxsplit=1)[0]
    _refused(
        _grown(mp4, 0, _sinf(original, scheme.encode()), b"enca"),
        f"the audio of this {container} file is encrypted (Common Encryption, {scheme}): send it decrypted",
    )


@pytest.mark.parametrize(
    ("kind", "extra", "method"),
    [
        (b"enca", b"", "Common Encryption"),
        (b"mp4a", _sinf(b"mp4a", b"cbcs"), "Common Encryption, cbcs"),
        (b"enca", _sinf(b"mp4a", b"piff"), "PlayReady, piff"),
        (b"drms", _sinf(b"mp4a", b"itun"), "FairPlay, itun"),
        (b"drms", b"", "FairPlay"),
        (b"aavd", b"", "Audible"),
        (b"enca", _sinf(b"mp4a", b"\0\0\0\0"), "Common Encryption"),
        (b"mp4a", _sinf(b"mp4a", b"abcd"), "an unknown scheme, abcd"),
    ],
)
def test_every_sign_of_encryption_in_mp4_counts(kind: bytes, extra: bytes, method: str) -> None:
    """The sample entry's name or its `sinf` box is enough."""
    _refused(
        _grown(clip("MP4 AAC (M4A)").data, 0, extra, kind),
        f"the audio of this MP4 file is encrypted ({method}): send it decrypted",
    )


def test_a_fragmented_file_with_a_clear_lead_is_encrypted() -> None:
    """A second sample entry that is encrypted describes the packets after the lead."""
    mp4 = clip("MP4 AAC (fragmented)").data
    at = mp4.index(b"stsd") - 4
    size = struct.unpack_from(">I", mp4, at)[0]
    clear = mp4[at + 16 : at + size]
    sinf = _sinf(b"mp4a", b"cenc")
    second = struct.pack(">I", len(clear) + len(sinf)) + b"enca" + clear[8:] + sinf
    data = bytearray(mp4)
    for name in _MOVIE_PATH:
        offset = mp4.index(name) - 4
        struct.pack_into(">I", data, offset, struct.unpack_from(">I", mp4, offset)[0] + len(second))
    struct.pack_into(">I", data, at + 12, 2)
    data[at + size : at + size] = second
    _refused(bytes(data), "the audio of this MP4 file is encrypted (Common Encryption, cenc): send it decrypted")


def test_clear_tracks_next_to_encrypted_ones_are_decoded() -> None:
    """The clear one of two tracks is chosen; encrypted video and a key's box alone do not matter."""
    two = remuxed("mp4", clip("MP4 AAC (M4A)").data, with_av("ipod", "aac", 16_000))
    for track in (0, 1):
        data = _grown(two, track, _sinf(b"mp4a", b"cbcs"), b"enca")
        assert decode(data, max_duration_s=60).size / 16_000 == pytest.approx(2, abs=0.15)
    video = clip("MP4 video, AAC").data
    data = _grown(video, 0, _sinf(b"mp4v", b"cenc"), b"encv")
    assert decode(data, max_duration_s=60).size / 16_000 == pytest.approx(2, abs=0.15)
    with_key = video + box(b"pssh", bytes(4) + bytes(16) + bytes(4))
    assert decode(with_key, max_duration_s=60).size / 16_000 == pytest.approx(2, abs=0.15)


_KEY = element(0x47E2, b"0123456789abcdef")
_AES = element(0x47E1, b"\5")


@pytest.mark.parametrize("name", ["WebM Opus", "WebM Vorbis", "MKV video, MP3", "MKA DTS"])
@pytest.mark.parametrize("encryption", [_AES + _KEY, _AES, b""])
def test_an_encrypted_matroska_is_refused_by_name(name: str, encryption: bytes) -> None:
    """ContentEncryption is found with a key or without, in files with video and without."""
    encoding = element(0x6240, element(0x5031, b"\0"), element(0x5033, b"\1"), element(0x5035, encryption))
    data = _with_encoding(clip(name).data, element(0x6D80, encoding))
    _refused(
        data,
        "the audio of this Matroska or WebM file is encrypted (ContentEncryption): send it decrypted",
    )


def test_a_compressed_matroska_is_decoded() -> None:
    """Stripped headers are an encoding too, but none that hides anything."""
    stripping = element(0x5034, element(0x4254, b"\3"), element(0x4255, b""))
    data = _with_encoding(clip("WebM Opus").data, element(0x6D80, element(0x6240, stripping)))
    assert decode(data, max_duration_s=60).size == 32_000


def _with_encoding(matroska: bytes, encodings: bytes) -> bytes:
    """Add encodings to each audio track."""
    segment = matroska.index(b"\x18\x53\x80\x67")
    seek_entry = matroska.index(b"\x16\x54\xae\x6b")
    at = matroska.index(b"\x16\x54\xae\x6b", seek_entry + 4)
    size, size_bytes = _size(matroska, at + 4)
    position, end = at + 4 + size_bytes, at + 4 + size_bytes + size
    tracks = b""
    while position < end:
        length, length_bytes = _size(matroska, position + 1)
        contents = matroska[position + 1 + length_bytes :][:length]
        if matroska[position] == 0xAE:
            tracks += element(0xAE, contents + encodings * (b"\x83\x81\x02" in contents))
        position += 1 + length_bytes + length
    unknown = b"\x01" + b"\xff" * 7
    return (
        matroska[: segment + 4] + unknown + matroska[segment + 12 : at] + element(0x1654AE6B, tracks) + matroska[end:]
    )


def _size(data: bytes, at: int) -> tuple[int, int]:
    size_bytes = 9 - data[at].bit_length()
    return int.from_bytes(data[at : at + size_bytes]) & (1 << 7 * size_bytes) - 1, size_bytes


@pytest.mark.parametrize(
    "guid", ["fbb31122 23bdd211 b4b700a0 c955fc6e", "14e68a29 2226174c b935dae0 7ee9289c"], ids=["plain", "extended"]
)
def test_windows_media_drm_is_refused_by_name(guid: str) -> None:
    """Either object in the header of an ASF file means encryption."""
    asf = bytearray(clip("WMA").data)
    drm = bytes.fromhex(guid) + struct.pack("<Q", 40) + bytes(16)
    asf[30:30] = drm
    struct.pack_into("<QI", asf, 16, struct.unpack_from("<Q", asf, 16)[0] + len(drm), asf[24] + 1)
    _refused(bytes(asf), "the audio of this WMA or ASF file is encrypted (Windows Media DRM): send it decrypted")


@pytest.mark.parametrize("packet_bytes", [188, 192, 204])
def test_a_scrambled_transport_stream_is_refused_by_name(packet_bytes: int) -> None:
    """The scrambling bits of the audio's packets count, in packets of every size."""
    ts = bytearray(clip("MPEG-TS video, AAC").data)
    for start in range(0, len(ts), 188):
        if struct.unpack_from(">H", ts, start + 1)[0] & 0x1FFF == 0x101:
            ts[start + 3] |= 0x80
    data = bytes(ts) if packet_bytes == 188 else ts_of(packet_bytes, bytes(ts))
    _refused(data, "the audio of this MPEG-TS file is encrypted (scrambled): send it decrypted")


def test_hls_sample_aes_is_refused_by_name() -> None:
    """The stream type in the program map, or Apple's frame in the tag of an AAC file, means SAMPLE-AES."""
    ts = bytearray(remuxed("mpegts", clip("AAC (ADTS)").data))
    for start in range(0, len(ts), 188):
        if struct.unpack_from(">H", ts, start + 1)[0] & 0x1FFF == 0x1000:
            section = start + 5
            length = struct.unpack_from(">H", ts, section + 1)[0] & 0xFFF
            ts[section + 12] = 0xCF
            struct.pack_into(">I", ts, section + 3 + length - 4, _crc(ts[section : section + 3 + length - 4]))
    _refused(bytes(ts), "the audio of this MPEG-TS file is encrypted (HLS SAMPLE-AES): send it decrypted")
    setup = id3_frame(b"PRIV", b"com.apple.streaming.audioDescription\0zaac" + bytes(8))
    _refused(
        id3(200, setup) + clip("AAC (ADTS)").data,
        "encrypted audio (HLS SAMPLE-AES) is not supported: send it decrypted, as WAV, MP3 or FLAC",
    )


def _crc(data: bytes | bytearray) -> int:
    """Return the CRC-32 of MPEG-2."""

    def step(crc: int, byte: int) -> int:
        crc ^= byte << 24
        for _ in range(8):
            crc = crc << 1 ^ (0x04C11DB7 if crc >> 31 else 0)
        return crc & 0xFFFF_FFFF

    return reduce(step, data, 0xFFFF_FFFF)


def test_cut_headers_of_encrypted_files_raise_nothing_else() -> None:
    """A cut at any place of the headers ends in an error of the audio."""
    m4a = _grown(clip("MP4 AAC (M4A)").data, 0, _sinf(b"mp4a", b"cenc"), b"enca")
    webm = _with_encoding(clip("WebM Opus").data, element(0x6D80, element(0x6240, element(0x5035, _AES))))
    for data, first in ((m4a, m4a.index(b"moov")), (webm, 0)):
        for end in range(first, min(len(data), first + 900), 7):
            with pytest.raises(AudioError):
                decode(data[:end], max_duration_s=60)
