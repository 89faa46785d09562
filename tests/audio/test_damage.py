"""Damaged, cut and joined files: what a reader raises ends that reader, and what it decoded is kept."""

from __future__ import annotations

import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import pytest
import soundfile

from serving.audio import ffmpeg_reader
from serving.audio.decode import decode
from serving.audio.waveform import Waveform
from serving.errors import AudioError, AudioTooLong, AudioUnreadable
from tests.audio.clips import clip, remuxed, sound, stereo, with_av, with_soundfile
from tests.audio.containers import ts_of, wav
from tests.audio.isolation import isolated

if TYPE_CHECKING:
    from collections.abc import Iterator

_VIDEOS = (
    *("FLV video, AAC", "MPEG-TS video, AAC", "MPEG-PS video, MP2", "MKV video, MP3", "AVI video, MP3"),
    *("MP4 video, AAC", "QuickTime video, PCM", "WebM video, Opus", "MPEG-TS DTS (M2TS)", "MPEG-TS TrueHD (M2TS)"),
)


def _seconds(data: bytes) -> float:
    return decode(data, max_duration_s=60).size / 16_000


def _flv_tags(flv: bytes) -> Iterator[bytes]:
    position = 13
    while position + 11 <= len(flv):
        size = 11 + int.from_bytes(flv[position + 1 : position + 4]) + 4
        yield flv[position : position + size]
        position += size


def test_video_that_begins_after_the_audio_does_not_end_it() -> None:
    """An FLV that declares audio only, and has video after the part that FFmpeg probes, decodes to its end."""
    flv = clip("FLV video, AAC").data
    audio = [tag for tag in _flv_tags(flv) if tag[0] == 8]
    video = [tag for tag in _flv_tags(flv) if tag[0] == 9]
    late = flv[:4] + b"\4" + flv[5:13] + b"".join(audio[:40]) + b"".join(video) + b"".join(audio[40:])
    assert _seconds(late) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("name", ["FLV video, AAC", "MPEG-PS video, MP2", "MPEG-TS video, AAC"])
def test_audio_that_begins_late_is_found(name: str) -> None:
    """A track that begins after the 5 MB that FFmpeg probes is found."""
    media = clip(name).data
    if name.startswith("FLV"):
        tags = list(_flv_tags(media))
        audio, video = (b"".join(tag for tag in tags if tag[0] == kind) for kind in (8, 9))
        late = media[:4] + b"\1" + media[5:13] + video * (6_000_000 // len(video)) + audio
    elif name.startswith("MPEG-PS"):
        silent = with_av("vob", "mp2", video="mpeg2video", samples=stereo(44_100, 4))
        packs = [silent[at : at + 2048] for at in range(0, len(silent), 2048)]
        pictures = b"".join(pack for pack in packs if b"\0\0\1\xe0" in pack)
        late = pictures * (6_000_000 // len(pictures)) + media
    else:
        packets = [media[at : at + 188] for at in range(0, len(media), 188)]
        pictures = b"".join(each for each in packets if struct.unpack_from(">H", each, 1)[0] & 0x1FFF == 0x100)
        late = pictures * (6_000_000 // len(pictures)) + media
    assert _seconds(late) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("MPEG-TS video, AAC", "MPEG-TS video, AAC"),
        ("MPEG-TS AAC, begun within a packet", "MPEG-TS DTS (M2TS)"),
        ("MPEG-TS AC-3 (204 bytes)", "MPEG-TS DTS (M2TS)"),
        ("MPEG-PS video, MP2", "MPEG-PS video, MP2"),
        ("FLV video, AAC", "FLV video, AAC"),
        ("AAC (ADTS)", "AAC (ADTS)"),
        ("FLAC 16", "FLAC 16"),
    ],
)
def test_joined_files_give_all_their_sound(first: str, second: str) -> None:
    """Both files are heard, though tracks, codecs and sizes of packets change at the seam."""
    joined = clip(first).data + clip(second).data
    assert _seconds(joined) == pytest.approx(_seconds(clip(first).data) + _seconds(clip(second).data), abs=0.15)


def test_another_track_of_the_same_file_is_not_appended() -> None:
    """The rest of another track does not follow the chosen one, if that ends early."""
    long_track = with_av("ipod", "aac", 16_000, samples=0.1 * np.ones(160_000, np.float32))
    short = with_av("mpegts", "aac", 48_000, bit_rate=512_000, samples=stereo(48_000, 3))
    both = remuxed("mpegts", short, long_track)
    assert _seconds(both) == pytest.approx(3, abs=0.2)


def test_another_track_that_goes_on_after_the_chosen_one_is_not_appended() -> None:
    """A track that was not chosen stays silent where the file is opened again behind the end of the chosen one."""
    chosen = with_av("mpegts", "aac", 48_000, bit_rate=256_000, samples=stereo(48_000, 3))
    other = with_av("ipod", "aac", 16_000, bit_rate=64_000, samples=sound(16_000, 10))
    both = remuxed("mpegts", chosen, other)
    packets = [both[at : at + 188] for at in range(0, len(both), 188)]
    ids = [struct.unpack_from(">H", packet, 1)[0] & 0x1FFF for packet in packets]
    one_after_the_other = b"".join(
        packet for left_out in (0x101, 0x100) for packet, each in zip(packets, ids, strict=True) if each != left_out
    )
    assert _seconds(one_after_the_other) == pytest.approx(3, abs=0.2)


@pytest.mark.parametrize(("outer", "inner"), [("aac", "ac3"), ("aac", "mp2"), ("mp2", "aac")])
def test_a_codec_that_changes_and_changes_back_is_followed(outer: str, inner: str) -> None:
    """The middle one of three joined streams under one packet ID is decoded too, though its codec is another one."""
    first, middle = (with_av("mpegts", codec, 48_000, samples=stereo(48_000, 4)) for codec in (outer, inner))
    assert _seconds(first + middle + first) == pytest.approx(12, abs=0.2)


def _cut_or_joined(seeds: range) -> list[str]:
    """Decode cut and joined videos in this process and return the violations of the rules."""
    faults = []
    for seed in seeds:
        random = np.random.default_rng(seed)
        one, other = (clip(str(name)).data for name in random.choice(_VIDEOS, 2))
        at, rest = int(random.integers(1, len(one))), int(random.integers(len(other)))
        data = (one[:at], one[at:], one + other, one[:at] + other[rest:], one + one[at:])[seed % 5]
        try:
            decode(data, max_duration_s=30)
        except AudioError:
            pass
        except Exception as problem:  # noqa: BLE001 - this is what must not be
            faults.append(f"seed {seed}: {problem!r}")
    return faults


def test_cut_and_joined_videos_raise_no_other_error() -> None:
    """Cuts at any place and joins of any two containers end in samples or in an error of our tree."""
    assert isolated(_cut_or_joined, range(150)) == []


_ERRORS = [
    *(ValueError("x"), IndexError("x"), KeyError("x"), AssertionError("x"), RuntimeError("x"), TypeError("x")),
    *(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"), av.InvalidDataError(1, "x"), OSError(5, "x"), EOFError("x")),
]


@pytest.mark.parametrize("error", _ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_a_demuxer_raises_keeps_the_samples_before(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any exception between two packets ends the reader, or is passed over; the samples so far are the answer."""
    real = ffmpeg_reader._Part._demuxed

    def failing(part: Any, *args: Any) -> Iterator[Any]:
        for number, packet in enumerate(real(part, *args)):
            if number == 40:
                raise error
            yield packet

    monkeypatch.setattr(ffmpeg_reader._Part, "_demuxed", failing)
    assert 0.8 < _seconds(clip("MP3").data) < 1.2


@pytest.mark.parametrize("error", _ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_opening_raises_is_an_unreadable_file(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any exception before the first sample is `AudioUnreadable`."""

    def failing(*_: Any, **__: Any) -> None:
        raise error

    clips = [clip(name).data for name in ("MP3", "WAV PCM 16")]
    monkeypatch.setattr(av, "open", failing)
    monkeypatch.setattr(soundfile, "SoundFile", failing)
    for data in clips:
        with pytest.raises(AudioUnreadable, match="is damaged, cut, or of a kind that no decoder knows"):
            _seconds(data)


def test_whatever_soundfile_raises_is_left_to_the_other_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of libsndfile's reader in the middle of a WAV costs nothing: PyAV reads it."""
    real, blocks = Waveform.append, iter(range(1000))

    def failing(waveform: Any, *args: Any) -> None:
        if next(blocks) == 1:
            raise AssertionError
        real(waveform, *args)

    monkeypatch.setattr(Waveform, "append", failing)
    assert _seconds(clip("WAV PCM 16").data) == 2


def test_an_unknown_stream_while_demuxing_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyAV's `IndexError` at each stream that appears after opening loses no packet; endless ones end the file."""

    class Container:
        def __init__(self, errors: int) -> None:
            self.errors = errors

        def demux(self, _: Any) -> Iterator[Any]:
            if self.errors:
                self.errors -= 1
                yield av.Packet(b"x")
                raise IndexError
            yield av.Packet(b"x")

    part = object.__new__(ffmpeg_reader._Part)
    assert len(list(part._demuxed(Container(3), None))) == 4
    assert len(list(part._demuxed(Container(10**6), None))) == ffmpeg_reader._MAX_INTERRUPTIONS


def _randomised(data: bytes, share: float) -> bytes:
    """Randomise the last share of the bytes."""
    begin = int(len(data) * (1 - share))
    return data[:begin] + np.random.default_rng(0).bytes(len(data) - begin)


def test_under_a_tenth_of_the_packets_is_refused_with_the_share() -> None:
    """AAC in a file with an index, of which nearly all packets are random, is no audio; of which most are, it is."""
    mp4 = clip("MP4 AAC (M4A)").data
    packets, end = mp4.index(b"mdat") + 4, mp4.index(b"moov") - 4
    body = _randomised(mp4[packets:end], 0.99)
    share = r"only \d of 88 packets \(\d\.\d%\) of this MP4 file can be decoded: it is damaged or encrypted$"
    with pytest.raises(AudioUnreadable, match=share):
        _seconds(mp4[:packets] + body + mp4[end:])
    body = _randomised(mp4[packets:end], 0.7)
    assert 0.6 < _seconds(mp4[:packets] + body + mp4[end:]) < 1.2


@pytest.mark.parametrize(
    "name", ["FLAC 16", "Ogg Vorbis", "Ogg Opus", "MP3", "AAC (ADTS)", "WMA", "DTS", "TrueHD", "GSM"]
)
@pytest.mark.parametrize("part", [0.08, 0.12, 0.3, 0.7])
def test_a_cut_file_is_not_one_of_few_packets(name: str, part: float) -> None:
    """Only the packets that are there count, so a file that is cut gives its part, however short."""
    data = clip(name).data
    if name.startswith("Ogg") and part < 0.5:  # their first page of packets ends in the middle
        with pytest.raises(AudioError, match=r"is damaged, cut|is empty"):
            _seconds(data[: int(len(data) * part)])
    else:
        assert 0 < _seconds(data[: int(len(data) * part)]) <= clip(name).duration_s * part + 0.3


def test_a_hole_of_nine_tenths_of_the_bytes_leaves_the_rest() -> None:
    """A download that was preallocated with zeros gives what arrived: zeros are no packets."""
    for name in ("MP3", "AAC (ADTS)", "DTS"):
        data = clip(name).data
        arrived = len(data) // 10
        assert _seconds(data[:arrived] + bytes(len(data) - arrived)) > 0.1
    flac = with_soundfile("FLAC", "PCM_16", samples=stereo(44_100, 10))
    assert _seconds(flac[: len(flac) // 10] + bytes(len(flac) * 9 // 10)) > 0.7


def test_the_limit_holds_across_parts() -> None:
    """A file of several parts is as long as all of them."""
    with pytest.raises(AudioTooLong):
        decode(ts_of(192, clip("MPEG-TS video, AAC").data) * 3, max_duration_s=5)


def test_noise_after_a_forged_header_is_an_error_or_noise() -> None:
    """Random bytes behind the header of each allowed codec of WAV raise nothing but errors of the audio."""
    noise = np.random.default_rng(0).bytes(20_000)
    for codec in (
        0x02,
        0x11,
        0x14,
        0x31,
        0x40,
        0x42,
        0x45,
        0x50,
        0x55,
        0x64,
        0x111,
        0x160,
        0x161,
        0x162,
        0x28F,
        0x2001,
    ):
        for rate, channels in ((8000, 1), (48_000, 2)):
            with suppress(AudioError):
                assert _seconds(wav(codec, rate, noise, bits=4, channels=channels)) > 0
