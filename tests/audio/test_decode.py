"""Decoding: every format, every fault of a file, and the guarantees to a caller."""

from __future__ import annotations

import io
import os
import re
import resource
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import pytest

from serving.audio import decode as decode_module
from serving.audio.decode import decode
from serving.audio.features import log_mel
from serving.audio.ffmpeg_reader import mono
from serving.audio.recognition import recognise
from serving.audio.waveform import PADDING_S
from serving.errors import AudioEmpty, AudioTooLong, AudioUnreadable
from tests.audio.clips import clip, clip_names, every_clip, remuxed, sound, stereo, with_av, with_soundfile

if TYPE_CHECKING:
    import numpy.typing as npt

    Samples = npt.NDArray[np.float32]

_FORMATS_TABLE = Path(__file__).parent / "FORMATS.md"


def _decode(data: bytes, max_duration_s: float = 60) -> Samples:
    return decode(data, max_duration_s=max_duration_s)


def _likeness(decoded: Samples, truth: Samples) -> float:
    """Return the correlation of the features up to 3 kHz, a codec's delay aside: speech codecs keep no waveform."""
    ours, theirs = log_mel(decoded)[:72], log_mel(truth)[:72]
    frames = min(ours.shape[1], theirs.shape[1]) - 15
    ours, theirs = ours[:, : frames + 15], theirs[:, : frames + 15]
    late = (np.corrcoef(ours[:, by : by + frames].ravel(), theirs[:, :frames].ravel()) for by in range(15))
    early = (np.corrcoef(ours[:, :frames].ravel(), theirs[:, by : by + frames].ravel()) for by in range(15))
    return max(float(correlation[0, 1]) for correlation in (*late, *early))


def _loudness(samples: Samples) -> float:
    return float(np.sqrt(np.mean(samples**2)))


@pytest.mark.parametrize("name", clip_names())
def test_every_format_is_decoded(name: str) -> None:
    """Every format decodes to finite 16 kHz mono within ±1, of the right duration, sound and loudness."""
    made = clip(name)
    samples = _decode(made.data)
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert abs(samples.size / 16_000 - made.duration_s) <= made.tolerance_s
    assert np.abs(samples).max() <= 1
    truth = sound(16_000, made.duration_s)
    if name == "AMR-NB with pauses (DTX)":
        truth[8000:] = 0
    assert _likeness(samples, truth) > 0.85
    assert _loudness(samples) == pytest.approx(_loudness(truth), rel=0.15)


def test_the_table_of_formats_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """FORMATS.md lists the decoder and the error in duration of each clip; UPDATE_TABLES=1 rewrites it."""
    taken: list[str] = []
    for name, reader in (("_read_soundfile", "soundfile"), ("read_ffmpeg", "PyAV")):
        read = getattr(decode_module, name)

        def recorded(*args: Any, reader: str = reader, read: Any = read) -> None:
            taken.append(reader)
            read(*args)

        monkeypatch.setattr(decode_module, name, recorded)
    rows = []
    for made in every_clip():
        form = recognise(io.BytesIO(made.data))[0]
        duration_s = _decode(made.data).size / 16_000
        assert form is not None
        error_ms = 1000 * (duration_s - made.duration_s)
        rows.append(
            f"| {made.name} | {form.name} | {taken[-1]} | {made.duration_s:.3f} | {duration_s:.3f} | {error_ms:+.0f} |"
        )
    table = "\n".join(
        [
            "# Formats that are decoded",
            "",
            "Made by `test_decode.py` from the clips of `clips.py`. The error is the codec's padding and priming.",
            "",
            "| Clip | Recognised as | Decoded by | True s | Decoded s | Error ms |",
            "|---|---|---|---:|---:|---:|",
            *rows,
            "",
        ]
    )
    if os.environ.get("UPDATE_TABLES"):
        _FORMATS_TABLE.write_text(table)
    (words, figures), (words_now, figures_now) = (
        _words_and_figures(_FORMATS_TABLE.read_text()),
        _words_and_figures(table),
    )
    assert words == words_now
    assert figures == pytest.approx(figures_now, abs=0.02)  # another version of an encoder may pad by other amounts


def _words_and_figures(table: str) -> tuple[str, list[float]]:
    """Split the table into its text and the column of decoded durations; drop the column of errors."""
    last_columns = r"([\d.]+) \| [+-]\d+ \|$"
    figures = re.findall(last_columns, table, flags=re.MULTILINE)
    return re.sub(last_columns, "", table, flags=re.MULTILINE), [float(figure) for figure in figures]


def test_a_file_and_its_bytes_are_the_same(tmp_path: Path) -> None:
    """Bytes, a view of bytes and a path give the same samples; the path's suffix has no effect."""
    data = clip("MP3").data
    path = tmp_path / "page.html"
    path.write_bytes(data)
    expected = _decode(data)
    assert (decode(memoryview(data), max_duration_s=60) == expected).all()
    assert (decode(path, max_duration_s=60) == expected).all()


@pytest.mark.parametrize("kind", ["wav", "adts"])
def test_stereo_is_averaged(kind: str) -> None:
    """Two equal channels are as loud as one of them; two opposite ones are silent."""
    mono = sound(44_100)
    codec = {"wav": "pcm_s16le", "adts": "aac"}[kind]
    same = _decode(with_av(kind, codec, samples=np.stack([mono, mono], axis=1)))
    opposite = _decode(with_av(kind, codec, samples=np.stack([mono, -mono], axis=1)))
    assert _loudness(same) == pytest.approx(_loudness(sound(16_000)), rel=0.02)
    assert np.abs(opposite).max() < 0.01


@pytest.mark.parametrize("rate", [44_100, 48_000, 96_000, 22_050])
def test_nothing_is_folded_down_from_above_8_khz(rate: int) -> None:
    """The resampler lets 7 kHz pass untouched and nothing of 9 kHz through (-90 dB)."""
    time_s = np.arange(2 * rate, dtype=np.float64) / rate
    passing = _decode(with_soundfile("WAV", "FLOAT", rate, samples=_tone(7000, time_s)))[1600:-1600]
    stopped = _decode(with_soundfile("WAV", "FLOAT", rate, samples=_tone(9000, time_s)))[1600:-1600]
    assert _loudness(passing) == pytest.approx(0.5 / np.sqrt(2), rel=0.01)
    assert _loudness(stopped) < 0.5 * 10 ** (-90 / 20)


def _tone(hz: float, time_s: npt.NDArray[np.float64]) -> Samples:
    return (0.5 * np.sin(2 * np.pi * hz * time_s)).astype(np.float32)


@pytest.mark.parametrize("layout", ["mono", "stereo", "5.1"])
@pytest.mark.parametrize("kind", ["u8", "s16", "s32", "flt", "dbl"])
@pytest.mark.parametrize("planar", [True, False])
def test_every_sample_format_of_ffmpeg_is_scaled(kind: str, layout: str, planar: bool) -> None:  # noqa: FBT001
    """Integers and floats, interleaved or not, become the average within ±1."""
    channels = av.AudioLayout(layout).nb_channels
    shape = (channels, 500) if planar else (1, 500 * channels)
    values = np.random.default_rng(0).uniform(-1, 1, shape)
    truth = values.mean(axis=0) if planar else values.reshape(500, channels).mean(axis=1)
    scale, offset = {"u8": (127, 128), "s16": (2**15 - 1, 0), "s32": (2**31 - 1, 0)}.get(kind, (1, 0))
    dtype = {"u8": "u1", "s16": "i2", "s32": "i4", "flt": "f4", "dbl": "f8"}[kind]
    raw = (values * scale + offset).astype(dtype)
    frame = av.AudioFrame.from_ndarray(raw, format=kind + "p" * planar, layout=layout)
    assert np.abs(mono(frame) - truth).max() < (0.02 if kind == "u8" else 1e-4)


def test_samples_outside_the_range_are_clipped() -> None:
    """Float files with NaN, infinity and values of 204 give finite samples within ±1, and spoil nothing around."""
    truth = stereo(48_000)
    damaged = truth.copy()
    damaged[40_000:40_010] = [204, -204]
    damaged[50_000] = [np.nan, 1]
    damaged[60_000] = [np.inf, -np.inf]
    damaged[70_000] = [3e38, 3e38]
    for subtype in ("FLOAT", "DOUBLE"):
        samples = _decode(with_soundfile("WAV", subtype, 48_000, samples=damaged))
        whole = _decode(with_soundfile("WAV", subtype, 48_000, samples=truth))
        assert np.abs(samples).max() <= 1
        assert np.isfinite(samples).all()
        assert np.abs(samples - whole)[25_000:].max() < 1e-6


def test_the_limit_is_that_of_the_decoded_samples() -> None:
    """Exactly the limit and the padding pass; one sample more does not, nor does a file whose header lies."""
    limit = with_soundfile("WAV", "PCM_16", 16_000, samples=np.zeros(16_000 + int(PADDING_S * 16_000), np.float32))
    over = with_soundfile("WAV", "PCM_16", 16_000, samples=np.zeros(16_001 + int(PADDING_S * 16_000), np.float32))
    assert _decode(limit, 1).size == 17_600
    with pytest.raises(AudioTooLong, match=r"^The audio is too long$"):
        _decode(over, 1)
    for name in ("MP3", "AMR-NB", "WAV streamed (size unknown)", "Ogg Opus, chained", "MP4 video, AAC"):
        with pytest.raises(AudioTooLong):
            _decode(clip(name).data, 1)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        with_soundfile("WAV", "PCM_16", samples=np.zeros((0, 2), np.float32)),
        with_soundfile("AIFF", "PCM_16", samples=np.zeros((0, 2), np.float32)),
        with_soundfile("FLAC", "PCM_16", samples=np.zeros((0, 2), np.float32)),
        b"#!AMR\n",
    ],
    ids=["no bytes", "WAV", "AIFF", "FLAC", "AMR"],
)
def test_a_file_without_a_sample_is_empty(data: bytes) -> None:
    """An empty file and a header without data are `AudioEmpty`."""
    with pytest.raises(AudioEmpty, match=r"^The audio is empty$"):
        _decode(data)


def test_silence_and_single_samples_are_audio() -> None:
    """Digital silence decodes to zeros, and one sample is enough."""
    silence = _decode(with_soundfile("FLAC", "PCM_16", samples=np.zeros((44_100, 2), np.float32)))
    assert silence.size == 16_000
    assert not silence.any()
    assert _decode(with_soundfile("WAV", "PCM_16", 16_000, samples=np.full(1, 0.5, np.float32))).tolist() == [0.5]


def _without_audio() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("mpeg4", rate=5, width=64, height=48, pix_fmt="yuv420p")
        out.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))))
        out.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<!DOCTYPE html><title>404</title>", "it is text"),
        (b"#EXTM3U\nhttp://127.0.0.1:9/a.ts\n", "it is text"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "it is of no known audio or video format"),
        (_without_audio(), "this MP4 file has no audio track"),
        (
            remuxed("matroska", clip("MP3").data).replace(b"A_MPEG/L3", b"A_QUICKTI"),
            "there is no decoder for the codec",
        ),
        (clip("MP4 AAC (M4A)").data[:-2000], "this MP4 file is damaged, cut, or of a kind that no decoder knows"),
        (clip("WAV PCM 16").data[:30], "this WAV file is damaged"),
        (clip("FLAC 16").data[:60], "this FLAC file is damaged"),
        (b"OggS" + bytes(1000), "this Ogg file is damaged"),
        (b"ID3\x04\0\0\0\0\0\x0a" + bytes(10) + b"#EXTM3U\nhttp://127.0.0.1:9/a.ts\n", "this MP3 file is damaged"),
        (b"fLaC" + np.random.default_rng(0).bytes(50_000), "this FLAC file is damaged"),
        (b"RIFF\x24\0\0\0WAVE" + np.random.default_rng(0).bytes(50_000), "this WAV file is damaged"),
    ],
    ids=[
        "HTML",
        "playlist",
        "PNG",
        "video only",
        "codec",
        "M4A cut",
        "WAV cut",
        "FLAC cut",
        "Ogg",
        "ID3",
        "noise",
        "RIFF",
    ],
)
def test_an_undecodable_file_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    """The error has the manual's message, and the reason as far as it is known."""
    with pytest.raises(
        AudioUnreadable, match=rf"^The audio format is illegal and cannot be opened: {re.escape(reason)}"
    ):
        _decode(data)


@pytest.mark.parametrize(
    ("field", "value"),
    [("channels", 0), ("channels", 65_535), *(("rate", hz) for hz in (0, 1, 999, 768_001, 2**31 - 1))],
)
def test_forged_headers_are_refused(field: str, value: int) -> None:
    """Impossible channel counts and sample rates at which nothing is recorded are refused."""
    data = bytearray(clip("WAV PCM 16").data)
    struct.pack_into(*{"channels": ("<H", data, 22), "rate": ("<I", data, 24)}[field], value)
    with pytest.raises(AudioUnreadable):
        _decode(bytes(data))


@pytest.mark.parametrize("channels", [3, 8, 64, 1024])
def test_many_channels_are_averaged(channels: int) -> None:
    """All channels that libsndfile reads are averaged, in blocks of bounded size."""
    samples = np.repeat(sound(16_000)[:, None], channels, axis=1)
    decoded = _decode(with_soundfile("WAV", "FLOAT", 16_000, samples=samples))
    assert np.abs(decoded - sound(16_000)).max() < 1e-6


@pytest.mark.parametrize("channels", [6, 8, 16])
def test_many_planes_are_averaged(channels: int) -> None:
    """More than eight planes are averaged, though FFmpeg keeps those past the eighth elsewhere."""
    samples = np.repeat(sound(16_000)[:, None], channels, axis=1)
    decoded = _decode(with_av("wv", "wavpack", 16_000, samples=samples))
    assert decoded.size == 32_000
    assert np.abs(decoded - sound(16_000)).max() < 0.02


@pytest.mark.parametrize("rate", [1000, 7999, 16_001, 47_999, 191_999, 768_000])
def test_odd_sample_rates_are_resampled(rate: int) -> None:
    """Any sample rate in the accepted range gives the right duration."""
    decoded = _decode(with_soundfile("WAV", "PCM_16", rate, samples=sound(rate)))
    assert decoded.size == pytest.approx(32_000, abs=2)


@pytest.mark.parametrize(
    ("name", "least_s"),
    [
        ("WAV PCM 16", 0.99),
        ("WAV GSM_MS", 0.95),
        ("AIFF PCM 24", 0.99),
        ("FLAC 16", 0.8),
        ("MP3", 0.9),
        ("Ogg Opus", 0.7),
        ("AAC (ADTS)", 0.9),
        ("AMR-NB", 0.95),
        ("AMR-WB", 0.95),
        ("WebM Opus", 0.8),
        ("MP4 AAC (fragmented)", 0.0),
        ("WMA", 0.8),
    ],
)
def test_a_file_cut_in_the_middle_gives_what_is_there(name: str, least_s: float) -> None:
    """The first half of a file's bytes decodes to about the first half of its sound."""
    data = clip(name).data
    samples = _decode(data[: len(data) // 2])
    assert least_s <= samples.size / 16_000 <= 1.3
    assert _likeness(samples, sound(16_000)[: samples.size]) > 0.85


def test_a_cut_vorbis_gives_its_complete_pages() -> None:
    """A cut Ogg Vorbis file decodes up to its last complete page."""
    data = with_soundfile("OGG", "VORBIS", samples=stereo(44_100, 12))
    assert 4 < _decode(data[: len(data) // 2]).size / 16_000 < 7


@pytest.mark.parametrize("name", ["FLAC 16", "MP3", "AAC (ADTS)", "AMR-NB"])
def test_a_hole_in_the_middle_loses_only_the_hole(name: str) -> None:
    """Decoding continues after damaged bytes."""
    data = bytearray(clip(name).data)
    middle, hole = len(data) // 2, len(data) // 20
    data[middle : middle + hole] = bytes(hole)
    assert _decode(bytes(data)).size / 16_000 > 1.6


def test_counts_in_headers_are_not_trusted() -> None:
    """Wrong counts change nothing: MP3 with Xing counts of 10 and a million, FLAC of 0 and 1000, two MP3s in a file."""
    mp3, flac = bytearray(clip("MP3").data), bytearray(clip("FLAC 16").data)
    xing = mp3.index(b"Info") + 8
    for count in (10, 1_000_000):
        struct.pack_into(">I", mp3, xing, count)
        assert _decode(bytes(mp3)).size / 16_000 == pytest.approx(2, abs=0.05)
    for count in (0, 1000, 2**32 - 1):
        flac[21] &= 0xF0
        struct.pack_into(">I", flac, 22, count)
        assert _decode(bytes(flac)).size == 32_000
    assert _decode(clip("MP3").data * 2).size / 16_000 == pytest.approx(4, abs=0.1)


def test_of_several_tracks_the_best_is_chosen() -> None:
    """The default track is chosen, and without one the track with more channels."""
    noise = with_av("ipod", "aac", 16_000, samples=np.random.default_rng(0).normal(0, 0.1, 32_000).astype(np.float32))
    voice = clip("MP4 AAC (M4A)").data
    assert _likeness(_decode(remuxed("mp4", voice, noise)), sound(16_000)) > 0.85
    assert _likeness(_decode(remuxed("mp4", noise, voice)), sound(16_000)) < 0.5
    for order in ((voice, noise), (noise, voice)):
        assert _likeness(_decode(remuxed("mpegts", *order)), sound(16_000)) > 0.85


def test_a_track_with_a_decoder_is_preferred() -> None:
    """A second track is chosen if the best one's codec is unknown."""
    both = remuxed("matroska", clip("MP3").data, with_av("matroska", "aac", 16_000))
    assert _likeness(_decode(both.replace(b"A_MPEG/L3", b"A_QUICKTI")), sound(16_000)) > 0.85


def test_parts_of_a_chain_are_joined() -> None:
    """A chain of three gives all three, each at its own rate, though the second is damaged."""
    parts = [clip(name).data for name in ("Ogg Opus", "Ogg Vorbis", "Ogg Opus mono 16 kHz")]
    assert _decode(b"".join(parts)).size / 16_000 == pytest.approx(6, abs=0.05)
    parts[1] = parts[1][:40] + bytes(3000) + parts[1][3040:]
    assert _decode(b"".join(parts)).size / 16_000 >= 3.9


def test_memory_limit_is_lifted_afterwards() -> None:
    """The process may allocate as much as before, both after success and after failure."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    _decode(clip("MP3").data)
    with pytest.raises(AudioUnreadable):
        _decode(b"fLaC")
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
