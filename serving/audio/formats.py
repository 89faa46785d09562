"""Audio formats, recognised by a clip's first bytes and never by its name; `recognition.py` skips what precedes them.

Recognition decides which library opens the clip, and as which format. Text has no format, so web pages, playlists, SDP
and concat scripts reach no decoder.
"""

from __future__ import annotations

from dataclasses import dataclass

from serving.audio.frame_sync import (
    find_mpeg_audio,
    find_program_stream,
    find_transport_stream,
    is_raw_gsm,
)
from serving.audio.id3 import id3_bytes

PREFIX_BYTES = 65_536
"""Number of bytes of a clip that recognition reads, if they suffice."""

_MAX_WAV_BYTES = 1 << 48
"""Size over which the one in a WAV's header means that it is unknown."""


@dataclass(frozen=True, slots=True)
class Format:
    """A container format.

    `demuxer` is FFmpeg's name of the format. `soundfile` marks formats that libsndfile reads as correctly and as fast.
    `magic`, if any, stands in for the first bytes of the file.
    """

    name: str
    demuxer: str
    soundfile: bool = False
    magic: bytes = b""


# libsndfile also reads FLAC, MP3 and Ogg. But there it trusts the number of samples in the header (an MP3 made of two
# ends after the first), gives up at the first damaged frame, and takes 2.5 to 3 times as long for Ogg.
MP3 = Format("MP3", "mp3")
MPEG_AUDIO = {"mp3": MP3, "aac": Format("AAC", "aac"), "loas": Format("AAC (LATM)", "loas")}
_MP4 = Format("MP4", "mov")
_QUICKTIME = Format("QuickTime", "mov")
_3GP = Format("3GP", "mov")
_MPEG_TS = Format("MPEG-TS", "mpegts")
_MPEG_PS = Format("MPEG-PS", "mpeg")
_GSM = Format("GSM", "gsm")
_WAV = Format("WAV", "wav", soundfile=True)
_WAV_OF_FRAMES = Format("WAV", "wav")
"""DTS or AC-3 that a WAV header calls PCM: CDs and S/PDIF recordings. libsndfile would return it as noise."""

_MAGIC: tuple[tuple[int, bytes, Format], ...] = (
    (0, b"fLaC", Format("FLAC", "flac")),
    (0, b"OggS", Format("Ogg", "ogg")),
    (0, b"#!AMR\n", Format("AMR", "amr")),
    (0, b"#!AMR-WB\n", Format("AMR-WB", "amr")),
    (0, b"\x1a\x45\xdf\xa3", Format("Matroska or WebM", "matroska")),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", Format("WMA or ASF", "asf")),
    (0, b"riff\x2e\x91\xcf\x11", Format("Wave64", "w64", soundfile=True)),
    (0, b".snd", Format("AU", "au", soundfile=True)),
    (0, b"caff", Format("CAF", "caf", soundfile=True)),
    (0, b"NIST_1A\n", Format("NIST SPHERE", "nistsphere")),
    (0, b"Creative Voice File\x1a", Format("VOC", "voc", soundfile=True)),
    (0, b"wvpk", Format("WavPack", "wv")),
    (0, b"TTA1", Format("TTA", "tta")),
    (0, b"\x0b\x77", Format("AC-3", "ac3")),
    (0, b"\x7f\xfe\x80\x01", Format("DTS", "dts")),
    (0, b"\xfe\x7f\x01\x80", Format("DTS", "dts")),
    (0, b"\x1f\xff\xe8\x00\x07", Format("DTS", "dts")),
    (0, b"\xff\x1f\x00\xe8\xf1\x07", Format("DTS", "dts")),
    (0, b"\x64\x58\x20\x25", Format("DTS", "dts")),
    (0, b"DTSHDHDR", Format("DTS-HD", "dtshd")),
    (4, b"\xf8\x72\x6f\xba", Format("TrueHD", "truehd")),
    (4, b"\xf8\x72\x6f\xbb", Format("MLP", "mlp")),
    (0, b"FLV\x01", Format("FLV", "flv")),
    (0, b"\x00\x00\x01\xba", _MPEG_PS),
)
"""Offset, magic bytes, format."""

_FRAMED = ("dts", "truehd", "mlp")
"""Demuxers of formats whose magic bytes begin each frame, or most, so that the first one may be cut."""

_RIFF = {b"WAVE": _WAV, b"AVI ": Format("AVI", "avi")}
_WAV_OF_64_BITS = Format("WAV", "wav", soundfile=True, magic=b"RF64")
"""RF64, or BW64, the EBU's successor of it, which libsndfile does not know."""

_WAV_UNCLOSED = Format("WAV", "wav", soundfile=True, magic=b"RIFF")
"""RF64 or BW64 of which the sizes in 64 bits are missing or were never filled in."""

_FRAMES_IN_WAV = (
    b"\x7f\xfe\x80\x01",
    b"\xfe\x7f\x01\x80",
    b"\xff\x1f\x00\xe8",
    b"\x1f\xff\xe8\x00",
    b"\x72\xf8\x1f\x4e",
)
"""Sync words of DTS and of S/PDIF (IEC 61937)."""

_FRAMES_IN_WAV_BYTES = 16_384

_IFF = dict.fromkeys((b"AIFF", b"AIFC"), Format("AIFF", "aiff", soundfile=True))
_ATOMS = (b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")
"""Atoms with which a QuickTime file may begin where an MP4 has `ftyp`."""

_CONVERT = "convert it to WAV, MP3 or FLAC"
_UNPACK = "send the audio file that is inside"
_RENDER = "render it to WAV, MP3 or FLAC"
_DECRYPT = "send it decrypted, as WAV, MP3 or FLAC"

_UNSUPPORTED: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"#!SILK", "SILK (a voice message of Skype, WeChat or QQ)", _CONVERT),
    (1, b"#!SILK", "SILK (a voice message of WeChat or QQ)", _CONVERT),
    (0, b"MAC ", "Monkey's Audio (APE)", _CONVERT),
    (0, b"MACF", "Monkey's Audio (APE)", _CONVERT),
    (0, b"DSD ", "DSD (DSF)", _CONVERT),
    (0, b"FRM8", "DSD (DSDIFF, DFF)", _CONVERT),
    (0, b"1bit", "DSD (WSD)", _CONVERT),
    (0, b"tBaK", "TAK", _CONVERT),
    (0, b"OFR ", "OptimFROG", _CONVERT),
    (0, b"MP+", "Musepack (MPC)", _CONVERT),
    (0, b"MPCK", "Musepack (MPC)", _CONVERT),
    (0, b".ra\xfd", "RealAudio", _CONVERT),
    (0, b".RMF", "RealMedia (RM, RMVB)", _CONVERT),
    (0, b"ajkg", "Shorten (SHN)", _CONVERT),
    (0, b"LA0", "Lossless Audio (LA)", _CONVERT),
    (0, b"qoaf", "QOA", _CONVERT),
    (0, b"TWIN97012000", "TwinVQ (VQF)", _CONVERT),
    (0, b"\x02dss", "DSS (a dictation)", _CONVERT),
    (0, b"\x03dss", "DSS (a dictation)", _CONVERT),
    (0, b"\x03ds2", "DS2 (a dictation)", _CONVERT),
    (0, b"ea3\x03", "Sony OpenMG (OMA, ATRAC)", _CONVERT),
    (0, b"EA3\x01", "Sony OpenMG (OMA, ATRAC)", _CONVERT),
    (0, b"#!AMR_MC1.0\n", "AMR of several channels", _CONVERT),
    (0, b"#!AMR-WB_MC1.0\n", "AMR-WB of several channels", _CONVERT),
    (0, b"#!EVS", "EVS", _CONVERT),
    (0, b"#!iLBC", "iLBC", _CONVERT),
    (0, b"\x06\x0e\x2b\x34\x02\x05\x01\x01", "MXF", _CONVERT),
    (8, b"QLCM", "QCP (QCELP, EVRC)", _CONVERT),
    (8, b"XWMA", "xWMA", _CONVERT),
    (8, b"8SVX", "8SVX", _CONVERT),
    (0, b"MThd", "MIDI (notes without sound)", _RENDER),
    (8, b"RMID", "MIDI (notes without sound)", _RENDER),
    (0, b"IMPM", "a tracker module (IT)", _RENDER),
    (0, b"Extended Module: ", "a tracker module (XM)", _RENDER),
    (44, b"SCRM", "a tracker module (S3M)", _RENDER),
    (1080, b"M.K.", "a tracker module (MOD)", _RENDER),
    (0, b"CTENFDAM", "NCM (encrypted by NetEase Cloud Music)", _DECRYPT),
    (0, b"\x7c\xd5\x32\xeb\x86\x02\x7f\x4b", "KGM (encrypted by KuGou)", _DECRYPT),
    (0, b"yeelion-kuwo", "KWM (encrypted by Kuwo)", _DECRYPT),
    (4, b"\x57\x90\x75\x36", "Audible (AA, encrypted)", _DECRYPT),
    (4, b"ftypaax", "Audible (AAX, encrypted)", _DECRYPT),
    (4, b"ftypodcf", "OMA DRM (DCF, encrypted)", _DECRYPT),
    (0, b"\x1f\x8b\x08", "a gzip archive", _UNPACK),
    (0, b"PK\x03\x04", "a ZIP archive", _UNPACK),
    (0, b"PK\x05\x06", "a ZIP archive", _UNPACK),
    (0, b"PK\x07\x08", "a ZIP archive", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (0, b"BZh", "a bzip2 archive", _UNPACK),
    (0, b"\xfd7zXZ\x00", "an xz archive", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard archive", _UNPACK),
    (0, b"\x04\x22\x4d\x18", "an LZ4 archive", _UNPACK),
    (0, b"MSCF", "a CAB archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
)
"""Formats that no reader opens: offset, magic bytes, name, and what the caller can do."""

_UNSUPPORTED_IN_HEADER: tuple[tuple[bytes, bytes, str, str], ...] = (
    (b"NIST_1A\n", b"embedded-shorten", "NIST SPHERE compressed by Shorten", _CONVERT),
    (b"ID3", b"com.apple.streaming.audioDescription", "encrypted audio (HLS SAMPLE-AES)", _DECRYPT),
)
"""The same, with further bytes in the first `_HEADER_BYTES` instead of an offset."""

_HEADER_BYTES = 1024


def sniff(prefix: bytes) -> Format | None:
    """Return the format of a file that begins with `prefix`, or `None`.

    The result is the surer the longer `prefix` is, up to `PREFIX_BYTES`.
    """
    found = sniff_at(prefix)
    return found[0] if found else None


def sniff_at(prefix: bytes) -> tuple[Format, int] | None:
    """Return the format of a file that begins with `prefix`, and where its audio begins, past junk."""
    if found := sniff_magic(prefix):
        return found, 0
    if unsupported(prefix):
        return None
    if id3_bytes(prefix):
        return MP3, 0
    for form, offset in ((_MPEG_TS, find_transport_stream(prefix)), (_MPEG_PS, find_program_stream(prefix))):
        if offset >= 0:
            return form, offset
    if found_frames := find_mpeg_audio(prefix):
        return MPEG_AUDIO[found_frames[0]], found_frames[1]
    for offset, magic, found in _MAGIC:
        if found.demuxer in _FRAMED and prefix.count(magic) > 1:
            return found, prefix.index(magic, offset) - offset
    return (_GSM, 0) if is_raw_gsm(prefix) else None


def sniff_magic(prefix: bytes) -> Format | None:
    """Return the format whose magic bytes `prefix` begins with, or `None`."""
    if unsupported(prefix):
        return None
    for offset, magic, found in _MAGIC:
        if prefix.startswith(magic, offset):
            return found
    match prefix[:4]:
        case b"RIFF" | b"RIFX":
            found_riff = _RIFF.get(prefix[8:12])
            return _WAV_OF_FRAMES if found_riff is _WAV and _has_frames_in_wav(prefix) else found_riff
        case b"RF64" | b"BW64" if prefix[8:12] == b"WAVE":
            is_closed = prefix[12:16] == b"ds64" and 0 < int.from_bytes(prefix[28:36], "little") <= _MAX_WAV_BYTES
            return _WAV_OF_64_BITS if is_closed else _WAV_UNCLOSED
        case b"FORM":
            return _IFF.get(prefix[8:12])
    match prefix[4:8]:
        case b"ftyp":
            return _3GP if prefix[8:10] == b"3g" else _QUICKTIME if prefix[8:12] == b"qt  " else _MP4
        case atom if atom in _ATOMS:
            return _QUICKTIME
    return None


def unsupported(prefix: bytes) -> str:
    """Return the reason why a file of a known format that begins with `prefix` is refused; else nothing."""
    for offset, magic, name, remedy in _UNSUPPORTED:
        if prefix.startswith(magic, offset):
            return f"{name} is not supported: {remedy}"
    for magic, further, name, remedy in _UNSUPPORTED_IN_HEADER:
        if prefix.startswith(magic) and further in prefix[:_HEADER_BYTES]:
            return f"{name} is not supported: {remedy}"
    return ""


def is_text(prefix: bytes) -> bool:
    """Return whether these bytes are text: a web page, a playlist, a script, JSON."""
    try:
        text = prefix.decode("utf-16" if prefix.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    except UnicodeDecodeError as error:
        text = prefix[: error.start].decode(errors="replace") if len(prefix) - error.start < 4 else "\0"  # noqa: PLR2004
    return all(char.isprintable() or char.isspace() for char in text)


def _has_frames_in_wav(prefix: bytes) -> bool:
    data = prefix.find(b"data", 12) + 8
    return data >= 8 and any(word in prefix[data : data + _FRAMES_IN_WAV_BYTES] for word in _FRAMES_IN_WAV)  # noqa: PLR2004
