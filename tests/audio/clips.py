"""One short clip in every format that the service recognises, made on the spot, with its true duration.

    for clip in every_clip():
        send(clip.data); assert abs(answer.duration_s - clip.duration_s) <= clip.tolerance_s

All hold the same sound, `sound(rate)`. Formats that PyAV and soundfile cannot encode are in `fixtures/`.
"""

from __future__ import annotations

import struct
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import soundfile

from tests.audio.containers import aifc, bw64, ts_of, wav

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    Samples = npt.NDArray[np.float32]

DURATION_S = 2.0
_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1", 16: "hexadecagonal"}
FIXTURES = Path(__file__).parent / "fixtures"


@dataclass(frozen=True, slots=True)
class Clip:
    """A file's bytes, the duration of its sound, and the tolerance for its codec (frames, priming)."""

    name: str
    data: bytes
    duration_s: float
    tolerance_s: float


@cache
def clip(name: str) -> Clip:
    """Make the clip of that name."""
    make, tolerance_s = _MAKERS[name]
    return Clip(name, make(), 1.0 if name in _SHORT else DURATION_S, tolerance_s)


def clip_names() -> list[str]:
    """Return the names of all clips: container and codec."""
    return list(_MAKERS)


def every_clip() -> list[Clip]:
    """Make all clips, which takes about two seconds."""
    return [clip(name) for name in clip_names()]


def sound(rate: int, duration_s: float = DURATION_S) -> Samples:
    """Return mono samples within ±0.5: a gliding, swelling voice-like tone, all of it below 3 kHz."""
    time_s = np.arange(round(rate * duration_s)) / rate
    phase = 2 * np.pi * np.cumsum(140 + 40 * np.sin(2 * np.pi * 0.6 * time_s)) / rate
    voice = sum(np.sin(harmonic * phase) / harmonic for harmonic in range(1, 14))
    swell = 0.55 + 0.45 * np.sin(2 * np.pi * 3 * time_s)
    return np.asarray(0.25 * swell * voice, np.float32)


def stereo(rate: int, duration_s: float = DURATION_S) -> Samples:
    """Return the sound on two channels of different loudness that average to `sound`, shape (samples, 2)."""
    mono = sound(rate, duration_s)
    return np.stack([1.25 * mono, 0.75 * mono], axis=1)


def with_soundfile(
    kind: str, subtype: str, rate: int = 44_100, *, samples: Samples | None = None, endian: str | None = None
) -> bytes:
    """Encode with libsndfile, at 8 kHz in mono and else in stereo."""
    if samples is None:
        samples = sound(rate) if rate == 8000 else stereo(rate)
    file = BytesIO()
    channels = samples.shape[1] if samples.ndim > 1 else 1
    with soundfile.SoundFile(file, "w", rate, channels, format=kind, subtype=subtype, endian=endian) as out:
        for start in range(0, len(samples), 4096):  # libsndfile overflows its stack on long blocks of Vorbis
            out.write(samples[start : start + 4096])
    return file.getvalue()


def with_av(
    muxer: str,
    codec: str,
    rate: int = 44_100,
    *,
    samples: Samples | None = None,
    video: str | None = None,
    muxer_options: dict[str, str] | None = None,
    **settings: Any,
) -> bytes:
    """Encode with FFmpeg, at 8 and 16 kHz in mono and else in stereo; `video` names a codec for moving pictures."""
    if samples is None:
        samples = sound(rate) if rate <= 16_000 else stereo(rate)
    with TemporaryDirectory() as directory:
        path = Path(directory, "clip")  # some muxers write, read back and move
        with av.open(path, "w", format=muxer, options=muxer_options or {}) as out:
            picture_stream = out.add_stream(video, rate=5, width=64, height=48, pix_fmt="yuv420p") if video else None
            layout = _LAYOUTS[samples.shape[1] if samples.ndim > 1 else 1]
            stream = out.add_stream(codec, rate=rate, layout=layout, **settings)
            if picture_stream:
                for number in range(round(5 * len(samples) / rate)):
                    picture = np.full((48, 64, 3), 25 * number % 256, np.uint8)
                    out.mux(picture_stream.encode(av.VideoFrame.from_ndarray(picture)))
                out.mux(picture_stream.encode(None))
            frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="flt", layout=layout)
            frame.sample_rate = rate
            out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
        return path.read_bytes()


def remuxed(muxer: str, *files: bytes) -> bytes:
    """Move the encoded audio of files into one container, each as a separate track."""
    with TemporaryDirectory() as directory, ExitStack() as stack:
        path = Path(directory, "clip")
        out = stack.enter_context(av.open(path, "w", format=muxer))
        sources = [stack.enter_context(av.open(BytesIO(file))).streams.audio[0] for file in files]
        tracks = [out.add_stream_from_template(source) for source in sources]
        for source, track in zip(sources, tracks, strict=True):
            for packet in source.container.demux(source):
                if packet.size:
                    packet.stream = track
                    out.mux(packet)
        stack.close()
        return path.read_bytes()


def unclosed_wav(size: int) -> bytes:
    """Return a WAV of which the sizes were never filled in, as a stream's are."""
    data = bytearray(with_soundfile("WAV", "PCM_16"))
    struct.pack_into("<I", data, 4, size)
    struct.pack_into("<I", data, data.index(b"data") + 4, size)
    return bytes(data)


def _fixture(name: str) -> Callable[[], bytes]:
    return (FIXTURES / name).read_bytes


def _sf(*args: Any, **kwargs: Any) -> Callable[[], bytes]:
    return lambda: with_soundfile(*args, **kwargs)


def _av(*args: Any, **kwargs: Any) -> Callable[[], bytes]:
    return lambda: with_av(*args, **kwargs)


_EXACT_S, _ABOUT_S = 0.001, 0.15
_PAUSED = sound(8000) * (np.arange(16_000) < 4000).astype(np.float32)

_MAKERS: dict[str, tuple[Callable[[], bytes], float]] = {
    "WAV PCM 8": (_sf("WAV", "PCM_U8"), _EXACT_S),
    "WAV PCM 16": (_sf("WAV", "PCM_16"), _EXACT_S),
    "WAV PCM 16 mono 8 kHz": (_sf("WAV", "PCM_16", 8000), _EXACT_S),
    "WAV PCM 16 mono 16 kHz": (_av("wav", "pcm_s16le", 16_000), _EXACT_S),
    "WAV PCM 16 big-endian (RIFX)": (_sf("WAV", "PCM_16", endian="BIG"), _EXACT_S),
    "WAV PCM 24": (_sf("WAV", "PCM_24"), _EXACT_S),
    "WAV PCM 32": (_sf("WAV", "PCM_32"), _EXACT_S),
    "WAV PCM 64": (_av("wav", "pcm_s64le"), _EXACT_S),
    "WAV float 32": (_sf("WAV", "FLOAT"), _EXACT_S),
    "WAV float 64": (_sf("WAV", "DOUBLE"), _EXACT_S),
    "WAV extensible": (_sf("WAVEX", "PCM_24", 48_000), _EXACT_S),
    "WAV 64-bit (RF64)": (_sf("RF64", "PCM_16"), _EXACT_S),
    "WAV mu-law": (_sf("WAV", "ULAW", 8000), _EXACT_S),
    "WAV A-law": (_sf("WAV", "ALAW", 8000), _EXACT_S),
    "WAV GSM_MS": (_sf("WAV", "GSM610", 8000), _ABOUT_S),
    "WAV IMA ADPCM": (_sf("WAV", "IMA_ADPCM"), _ABOUT_S),
    "WAV MS ADPCM": (_sf("WAV", "MS_ADPCM"), _ABOUT_S),
    "WAV MP3": (_av("wav", "libmp3lame"), _ABOUT_S),
    "WAV streamed (size unknown)": (lambda: unclosed_wav(0xFFFF_FFFF), _EXACT_S),
    "WAV unclosed (size 0)": (lambda: unclosed_wav(0), _EXACT_S),
    "Wave64": (_sf("W64", "PCM_16"), _EXACT_S),
    "AIFF PCM 16": (_sf("AIFF", "PCM_16"), _EXACT_S),
    "AIFF PCM 24": (_sf("AIFF", "PCM_24"), _EXACT_S),
    "AIFF-C float 32": (_sf("AIFF", "FLOAT"), _EXACT_S),
    "AU PCM 16": (_sf("AU", "PCM_16"), _EXACT_S),
    "AU mu-law": (_sf("AU", "ULAW", 8000), _EXACT_S),
    "CAF PCM 16": (_sf("CAF", "PCM_16"), _EXACT_S),
    "CAF ALAC": (_sf("CAF", "ALAC_16"), _EXACT_S),
    "VOC PCM 16": (_sf("VOC", "PCM_16"), _EXACT_S),
    "FLAC 16": (_sf("FLAC", "PCM_16"), _EXACT_S),
    "FLAC 24 at 96 kHz": (_sf("FLAC", "PCM_24", 96_000), _EXACT_S),
    "Ogg FLAC": (lambda: remuxed("ogg", clip("FLAC 16").data), _EXACT_S),
    "MP4 ALAC (M4A)": (_av("ipod", "alac"), _EXACT_S),
    "WavPack": (_av("wv", "wavpack"), _EXACT_S),
    "TTA": (_av("tta", "tta"), _EXACT_S),
    "MP3": (_av("mp3", "libmp3lame"), _ABOUT_S),
    "MP3 at 48 kHz": (_av("mp3", "libmp3lame", 48_000, bit_rate=320_000), _ABOUT_S),
    "MP3 mono 16 kHz (MPEG-2)": (_av("mp3", "libmp3lame", 16_000), _ABOUT_S),
    "MP3 without ID3 and Xing": (
        _av("mp3", "libmp3lame", muxer_options={"write_xing": "0", "id3v2_version": "0"}),
        _ABOUT_S,
    ),
    "MP2": (_av("mp2", "mp2"), _ABOUT_S),
    "Ogg Vorbis": (_sf("OGG", "VORBIS"), _EXACT_S),
    "Ogg Opus": (_av("ogg", "libopus", 48_000), _EXACT_S),
    "Ogg Opus mono 16 kHz": (_sf("OGG", "OPUS", 16_000, samples=sound(16_000)), _EXACT_S),
    "Ogg Speex": (_fixture("speex.spx"), _ABOUT_S),
    "Ogg Opus, chained": (
        lambda: b"".join(with_av("ogg", "libopus", 48_000, samples=half) for half in np.split(stereo(48_000), 2)),
        _ABOUT_S,
    ),
    "Ogg Vorbis, chained": (
        lambda: (
            with_soundfile("OGG", "VORBIS", samples=stereo(44_100, 1.5))
            + with_soundfile("OGG", "VORBIS", 22_050, samples=sound(22_050)[33_075:])
        ),
        _ABOUT_S,
    ),
    "AAC (ADTS)": (_av("adts", "aac"), _ABOUT_S),
    "AAC (LATM)": (_av("latm", "aac"), _ABOUT_S),
    "MP4 AAC (M4A)": (_av("ipod", "aac"), _ABOUT_S),
    "MP4 AAC (M4A, fast start)": (_av("ipod", "aac", muxer_options={"movflags": "faststart"}), _ABOUT_S),
    "MP4 AAC (fragmented)": (
        _av("mp4", "aac", muxer_options={"movflags": "frag_keyframe+empty_moov+default_base_moof"}),
        _ABOUT_S,
    ),
    "AMR-NB": (_av("amr", "libopencore_amrnb", 8000, bit_rate=12_200), _ABOUT_S),
    "AMR-NB with pauses (DTX)": (
        _av("amr", "libopencore_amrnb", 8000, samples=_PAUSED, bit_rate=12_200, options={"dtx": "1"}),
        _ABOUT_S,
    ),
    "AMR-WB": (_fixture("amr_wb.awb"), _ABOUT_S),
    "3GP AMR-NB": (_av("3gp", "libopencore_amrnb", 8000, bit_rate=12_200), _ABOUT_S),
    "3GP AMR-WB": (lambda: remuxed("3gp", clip("AMR-WB").data), _ABOUT_S),
    "3GP AAC": (_av("3gp", "aac"), _ABOUT_S),
    "3GPP2 (3G2) AAC": (_av("3g2", "aac"), _ABOUT_S),
    "WMA": (_av("asf", "wmav2", bit_rate=96_000), _ABOUT_S),
    "AC-3": (_av("ac3", "ac3", 48_000), _ABOUT_S),
    "E-AC-3": (_av("eac3", "eac3", 48_000), _ABOUT_S),
    "WebM Opus": (_av("webm", "libopus", 48_000), _ABOUT_S),
    "WebM Vorbis": (lambda: remuxed("webm", clip("Ogg Vorbis").data), _ABOUT_S),
    "MKA FLAC": (lambda: remuxed("matroska", clip("FLAC 16").data), _EXACT_S),
    "MP4 Opus": (_av("mp4", "libopus", 48_000), _ABOUT_S),
    "MP4 video, AAC": (_av("mp4", "aac", video="mpeg4"), _ABOUT_S),
    "MP4 video (H.264), AAC": (_av("mp4", "aac", video="libx264"), _ABOUT_S),
    "3GP video, AMR-NB": (_av("3gp", "libopencore_amrnb", 8000, video="mpeg4", bit_rate=12_200), _ABOUT_S),
    "QuickTime video, PCM": (_av("mov", "pcm_s16le", video="mpeg4"), _EXACT_S),
    "MKV video, MP3": (_av("matroska", "libmp3lame", video="mpeg4"), _ABOUT_S),
    "WebM video, Opus": (_av("webm", "libopus", 48_000, video="libvpx"), _ABOUT_S),
    "AVI video, MP3": (_av("avi", "libmp3lame", video="mpeg4"), _ABOUT_S),
    "FLV video, AAC": (_av("flv", "aac", video="flv"), _ABOUT_S),
    "MPEG-TS video, AAC": (_av("mpegts", "aac", video="mpeg2video"), _ABOUT_S),
    "MPEG-PS video, MP2": (_av("vob", "mp2", video="mpeg2video"), _ABOUT_S),
    "WAV 64-bit (BW64)": (lambda: bw64(clip("WAV PCM 16").data), _EXACT_S),
    "NIST SPHERE PCM 16": (_sf("NIST", "PCM_16"), _EXACT_S),
    "NIST SPHERE mu-law": (_sf("NIST", "ULAW", 8000), _EXACT_S),
    "AU G.721": (_sf("AU", "G721_32", 8000), _ABOUT_S),
    "AU G.722": (_av("au", "g722", 16_000), _ABOUT_S),
    "WAV G.722": (_av("wav", "g722", 16_000), _ABOUT_S),
    "WAV G.723.1": (_av("wav", "g723_1", 8000, bit_rate=6300), _ABOUT_S),
    "WAV G.726": (_av("wav", "g726", 8000, bit_rate=32_000), _ABOUT_S),
    "WAV G.726 at 24 kbit/s": (_av("wav", "g726", 8000, bit_rate=24_000), _ABOUT_S),
    "WAV G.726 at 40 kbit/s": (
        lambda: wav(0x45, 8000, with_av("g726", "g726", 8000, bit_rate=40_000), bits=5),
        _ABOUT_S,
    ),
    "AIFF-C G.726 little-endian": (
        lambda: aifc(b"G726", 8000, with_av("g726le", "g726le", 8000, bit_rate=40_000), bits=5),
        _ABOUT_S,
    ),
    "GSM": (_fixture("gsm.gsm"), _ABOUT_S),
    "DTS": (_fixture("dts.dts"), _ABOUT_S),
    "WAV DTS": (lambda: wav(0x2001, 48_000, clip("DTS").data, channels=2), _ABOUT_S),
    "WAV DTS called PCM": (lambda: wav(1, 48_000, clip("DTS").data, channels=2), _ABOUT_S),
    "MKA DTS": (lambda: remuxed("matroska", clip("DTS").data), _ABOUT_S),
    "MP4 DTS": (lambda: remuxed("mp4", clip("DTS").data), _ABOUT_S),
    "MPEG-TS DTS (M2TS)": (lambda: ts_of(192, remuxed("mpegts", clip("DTS").data)), _ABOUT_S),
    "MPEG-TS AC-3 (204 bytes)": (lambda: ts_of(204, remuxed("mpegts", clip("AC-3").data)), _ABOUT_S),
    "MPEG-TS AAC, begun within a packet": (lambda: remuxed("mpegts", clip("AAC (ADTS)").data)[100:], _ABOUT_S),
    "TrueHD": (_fixture("truehd.thd"), _EXACT_S),
    "MKA TrueHD": (lambda: remuxed("matroska", clip("TrueHD").data), _EXACT_S),
    "MPEG-TS TrueHD (M2TS)": (lambda: ts_of(192, remuxed("mpegts", clip("TrueHD").data)), _ABOUT_S),
    "MLP": (_fixture("mlp.mlp"), _EXACT_S),
    "MP4 with two audio tracks": (
        lambda: remuxed("mp4", with_av("ipod", "aac", 16_000), clip("MP4 AAC (M4A)").data),
        _ABOUT_S,
    ),
}
"""Maker of each clip, and its tolerance in seconds."""

_SHORT = ("TrueHD", "MKA TrueHD", "MPEG-TS TrueHD (M2TS)", "MLP")
"""Clips of the first second, since lossless fixtures are large."""
