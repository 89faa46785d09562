"""Audio behind tags, zeros and junk, packets of every size, and formats that are refused by name."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import zipfile

import numpy as np
import pytest

from serving.audio.decode import decode
from serving.audio.formats import sniff, unsupported
from serving.audio.recognition import recognise
from serving.errors import AudioUnreadable
from tests.audio.clips import clip, stereo, with_soundfile
from tests.audio.containers import bw64, id3, id3_frame, synchsafe, ts_of

_NOISE = np.random.default_rng(0).bytes(200_000)
_CONVERT = "convert it to WAV, MP3 or FLAC"
_UNPACK = "send the audio file that is inside"


def _bare() -> bytes:
    return clip("MP3 without ID3 and Xing").data


def _seconds(data: bytes) -> float:
    return decode(data, max_duration_s=60).size / 16_000


@pytest.mark.parametrize("count", [1, 3, 4, 65_535, 65_536, 65_537, 100_000, 1_000_000, 10_000_000])
@pytest.mark.parametrize("name", ["MP3", "MP3 without ID3 and Xing"])
def test_mp3_behind_zeros_is_found(name: str, count: int) -> None:
    """Up to 16 MB of zeros are skipped, with a tag behind them or without."""
    assert _seconds(bytes(count) + clip(name).data) == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize(
    "name",
    [
        *("AAC (ADTS)", "AAC (LATM)", "FLAC 16", "WAV PCM 16", "MP4 AAC (M4A, fast start)", "Ogg Opus"),
        *("MPEG-PS video, MP2", "MPEG-TS video, AAC", "WebM Opus", "AMR-NB"),
    ],
)
def test_every_format_behind_zeros_is_found(name: str) -> None:
    """Zeros before the magic bytes are skipped, except those that belong to it."""
    assert _seconds(bytes(100_000) + clip(name).data) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize(
    "junk", [_NOISE[:1000], _NOISE[:70_000], _NOISE, b"\xff" * 100_000, b" " * 100_000, b"\x55\xaa" * 100_000]
)
@pytest.mark.parametrize("name", ["MP3 without ID3 and Xing", "AAC (ADTS)"])
def test_mpeg_audio_behind_other_junk_is_found(name: str, junk: bytes) -> None:
    """Up to 1 MB of anything is searched."""
    assert _seconds(junk + clip(name).data) == pytest.approx(2, abs=0.06)


def test_the_search_is_bounded() -> None:
    """More zeros or junk than that have no format, and zeros alone have none."""
    for data in (bytes(17 << 20) + _bare(), _NOISE * 6 + _bare(), bytes(2 << 20)):
        assert recognise(io.BytesIO(data))[0] is None


@pytest.mark.parametrize("claimed", [5000, 16_000, 100_000, 10**7, 2**28 - 1])
@pytest.mark.parametrize(
    "tag", [b"", id3_frame(b"TIT2", b"\0abcd"), id3_frame(b"APIC", _NOISE[:3000]) + id3_frame(b"TALB", b"\0b")]
)
def test_an_id3_tag_that_claims_too_much_hides_no_audio(tag: bytes, claimed: int) -> None:
    """The audio begins after the tag's frames and padding, whatever size its header claims."""
    for padding in (0, 500):
        data = id3(len(tag) + padding, tag, claimed=claimed) + _bare()
        assert _seconds(data) == pytest.approx(2.04, abs=0.01)


def test_id3_tags_of_every_version_may_claim_too_much() -> None:
    """ID3v2.2 and 2.3, too, with their own frame headers and sizes."""
    v22 = b"ID3\x02\0\0" + synchsafe(9000) + b"TT2\0\0\5\0abcd"
    v23 = b"ID3\x03\0\0" + synchsafe(9000) + b"TIT2\0\0\0\5\0\0\0abcd"
    large = b"ID3\x03\0\0" + synchsafe(10**6) + b"APIC" + struct.pack(">I", 150_000) + b"\0\0" + _NOISE[:150_000]
    for tag in (v22, v23, large):
        assert _seconds(tag + _bare()) == pytest.approx(2.04, abs=0.01)
    for name in ("FLAC 16", "AAC (ADTS)", "WAV PCM 16"):
        assert _seconds(id3(10, claimed=10**7) + clip(name).data) == pytest.approx(2, abs=0.05)


def test_an_id3_tag_that_claims_too_little_hides_no_audio() -> None:
    """A picture that reaches beyond the tag's claimed end is junk before the audio."""
    for size in (5000, 150_000):
        data = id3(size + 20, id3_frame(b"APIC", _NOISE[:size]), claimed=100) + _bare()
        assert _seconds(data) == pytest.approx(2.04, abs=0.01)


@pytest.mark.parametrize("data", [id3(1000), id3(100, claimed=50_000), (id3(300_000) + _bare())[:100_000]])
def test_a_tag_without_audio_is_not_called_text(data: bytes) -> None:
    """A file that ends within its tag, or after it, has no audio."""
    with pytest.raises(AudioUnreadable, match=r": it has no audio after its ID3 tag$"):
        _seconds(data)


@pytest.mark.parametrize("packet_bytes", [188, 192, 204])
@pytest.mark.parametrize("cut", [0, 1, 3, 4, 5, 60, 187, 188, 189, 191, 192, 203, 204, 300])
def test_a_transport_stream_may_begin_anywhere(packet_bytes: int, cut: int) -> None:
    """Packets of each size are found after a cut at any place, and after junk."""
    ts = clip("MPEG-TS video, AAC").data
    data = ts if packet_bytes == 188 else ts_of(packet_bytes, ts)
    data += data  # the tables of the first one may be lost
    assert _seconds(data[cut:]) == pytest.approx(4.09, abs=0.15)
    assert _seconds(_NOISE[:cut] + data) == pytest.approx(4.09, abs=0.15)


@pytest.mark.parametrize("cut", [1, 4, 100, 2047, 2048, 5000])
def test_a_program_stream_may_begin_anywhere(cut: int) -> None:
    """Packs are found after a cut at any place."""
    data = clip("MPEG-PS video, MP2").data
    assert 1 < _seconds(data[cut:]) <= 2.1


@pytest.mark.parametrize("name", ["DTS", "TrueHD", "MLP", "MP3", "AAC (ADTS)", "AAC (LATM)"])
@pytest.mark.parametrize("cut", [1, 3, 5, 100, 1000, 5001])
def test_frames_may_begin_anywhere(name: str, cut: int) -> None:
    """A raw stream that is cut at its front loses what is before its next frame that can be decoded."""
    made = clip(name)
    lost_s = made.duration_s * cut / len(made.data)
    assert _seconds(made.data[cut:]) == pytest.approx(made.duration_s - lost_s, abs=0.1)


def test_text_and_noise_are_no_transport_stream() -> None:
    """A letter G at every 188th place of fewer than five lines, or noise, is no MPEG-TS."""
    lines = (b"G" + b"x" * 186 + b"\n") * 4
    for data in (b"ab" + lines, _NOISE, b"x" * 5000):
        assert sniff(data) is None


@pytest.mark.parametrize("magic", [b"RF64", b"BW64"])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT", "DOUBLE", "ULAW", "PCM_U8"])
def test_wav_of_64_bits_gives_the_same_samples(magic: bytes, subtype: str) -> None:
    """RF64 and BW64 equal RIFF sample by sample: closed, without sizes, with sizes of 32 bits, and cut."""
    riff = with_soundfile("WAV", subtype, 44_100)
    expected = decode(riff, max_duration_s=60)
    closed = bw64(riff, magic)
    unclosed = bytearray(closed)
    unclosed[20:44] = bytes(24)
    for data in (closed, bytes(unclosed), magic + riff[4:]):
        assert (decode(data, max_duration_s=60) == expected).all()
    metadata = closed + b"axml" + struct.pack("<I", 5000) + _NOISE[:5000]
    assert (decode(metadata, max_duration_s=60) == expected).all()
    assert 0 < _seconds(closed[: len(closed) // 2]) == pytest.approx(1, abs=0.02)


def test_nist_sphere_is_read_in_every_coding() -> None:
    """PCM of both byte orders and sizes, and logarithmic codings; Shorten is refused by name."""
    for subtype, endian in (("PCM_16", "LITTLE"), ("PCM_16", "BIG"), ("PCM_24", "LITTLE"), ("PCM_32", "BIG")):
        assert _seconds(with_soundfile("NIST", subtype, 16_000, samples=stereo(16_000), endian=endian)) == 2
    for subtype in ("ULAW", "ALAW", "PCM_S8"):
        assert _seconds(with_soundfile("NIST", subtype, 8000)) == 2
    sphere = with_soundfile("NIST", "PCM_16", 16_000)
    shortened = sphere.replace(b"sample_coding -s3 pcm", b"sample_coding -s26 pcm,embedded-shorten-v2.00")
    with pytest.raises(AudioUnreadable, match=r": NIST SPHERE compressed by Shorten is not supported: convert it to "):
        _seconds(shortened)


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:  # stored, so the MP3 is in it unchanged
        archive.writestr("clip.mp3", clip("MP3").data)
    return file.getvalue()


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("clip.mp3")
        member.size = len(clip("MP3").data)
        archive.addfile(member, io.BytesIO(clip("MP3").data))
    return file.getvalue()


_REFUSED = {
    "SILK": (b"#!SILK_V3" + _NOISE[:99], f"SILK (a voice message of Skype, WeChat or QQ) is not supported: {_CONVERT}"),
    "WeChat": (b"\x02#!SILK_V3" + _NOISE[:99], f"SILK (a voice message of WeChat or QQ) is not supported: {_CONVERT}"),
    "APE": (b"MAC \x96\x0f" + _NOISE[:99], f"Monkey's Audio (APE) is not supported: {_CONVERT}"),
    "APE with ID3": (id3(300) + b"MAC \x96\x0f" + _NOISE, f"Monkey's Audio (APE) is not supported: {_CONVERT}"),
    "DSF": (b"DSD \x1c\0\0\0\0\0\0\0" + _NOISE[:99], f"DSD (DSF) is not supported: {_CONVERT}"),
    "DFF": (b"FRM8\0\0\0\0\0\0\x10\0DSD " + _NOISE[:99], f"DSD (DSDIFF, DFF) is not supported: {_CONVERT}"),
    "TAK": (b"tBaK" + _NOISE[:99], f"TAK is not supported: {_CONVERT}"),
    "OptimFROG": (b"OFR " + _NOISE[:99], f"OptimFROG is not supported: {_CONVERT}"),
    "MPC7": (b"MP+\x07" + _NOISE[:99], f"Musepack (MPC) is not supported: {_CONVERT}"),
    "MPC8": (b"MPCKSH" + _NOISE[:99], f"Musepack (MPC) is not supported: {_CONVERT}"),
    "RealAudio": (b".ra\xfd\0\4" + _NOISE[:99], f"RealAudio is not supported: {_CONVERT}"),
    "RealMedia": (b".RMF\0\0\0\x12" + _NOISE[:99], f"RealMedia (RM, RMVB) is not supported: {_CONVERT}"),
    "Shorten": (b"ajkg\2" + _NOISE[:99], f"Shorten (SHN) is not supported: {_CONVERT}"),
    "DSS": (b"\x02dss" + _NOISE[:99], f"DSS (a dictation) is not supported: {_CONVERT}"),
    "MIDI": (
        b"MThd\0\0\0\6\0\1\0\2\1\xe0",
        "MIDI (notes without sound) is not supported: render it to WAV, MP3 or FLAC",
    ),
    "RMID": (
        b"RIFF\x40\0\0\0RMIDdata" + bytes(40),
        "MIDI (notes without sound) is not supported: render it to WAV, MP3 or FLAC",
    ),
    "NCM": (
        b"CTENFDAM" + _NOISE[:99],
        "NCM (encrypted by NetEase Cloud Music) is not supported: send it decrypted, as WAV, MP3 or FLAC",
    ),
    "AAX": (
        b"\0\0\0\x20ftypaax \0\0\0\1" + bytes(16),
        "Audible (AAX, encrypted) is not supported: send it decrypted, as WAV, MP3 or FLAC",
    ),
    "gzip": (gzip.compress(_NOISE[:99]), f"a gzip archive is not supported: {_UNPACK}"),
    "ZIP": (_zip(), f"a ZIP archive is not supported: {_UNPACK}"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4" + _NOISE[:99], f"a 7z archive is not supported: {_UNPACK}"),
    "RAR": (b"Rar!\x1a\x07\x01\0" + _NOISE[:99], f"a RAR archive is not supported: {_UNPACK}"),
    "bzip2": (bz2.compress(_NOISE[:99]), f"a bzip2 archive is not supported: {_UNPACK}"),
    "xz": (lzma.compress(_NOISE[:99]), f"an xz archive is not supported: {_UNPACK}"),
    "tar": (_tar(), f"a tar archive is not supported: {_UNPACK}"),
}


@pytest.mark.parametrize("kind", _REFUSED)
def test_known_formats_that_cannot_be_read_are_named(kind: str) -> None:
    """The error names the format, and what the caller can do; such a file is never searched for audio inside."""
    data, reason = _REFUSED[kind]
    assert sniff(data) is None or kind == "APE with ID3"
    with pytest.raises(AudioUnreadable) as error:
        _seconds(data)
    assert str(error.value) == f"The audio format is illegal and cannot be opened: {reason}"


def test_no_clip_is_taken_for_an_unsupported_format() -> None:
    """The signatures of refused formats match none that are read."""
    for name in ("MP3", "AAC (ADTS)", "WAV PCM 16", "GSM", "DTS", "FLAC 16", "MPEG-TS AC-3 (204 bytes)", "TrueHD"):
        assert unsupported(clip(name).data) == ""
