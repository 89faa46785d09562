"""Hostile files: each is decoded in a separate process, which may neither die nor use much memory."""

from __future__ import annotations

import io
import struct
import zlib
from typing import TYPE_CHECKING

import av
import numpy as np
import pytest

from serving.audio.decode import MEMORY_BYTES, decode
from serving.audio.decoders import AV_OPTIONS
from serving.errors import AudioError, AudioTooLong, AudioUnreadable
from tests.audio.clips import clip, clip_names, with_soundfile
from tests.audio.isolation import isolated, outcome

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_MEMORY_MIB = MEMORY_BYTES / 2**20 + 1
_INPUTS_PER_CLIP = 6


def _png_bomb() -> bytes:
    """Return 0.8 MB that are 192 MB of pixels."""
    side = 8000
    packer = zlib.compressobj(1)
    pixels = b"".join(packer.compress(bytes(1 + 3 * side)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _mp3_with_cover(picture: bytes) -> bytes:
    frame = b"\0image/png\0\3\0" + picture
    return _id3(b"APIC" + _synchsafe(len(frame)) + b"\0\0" + frame) + clip("MP3").data


def _id3(frames: bytes) -> bytes:
    return b"ID3\x04\0\0" + _synchsafe(len(frames)) + frames


def _synchsafe(size: int) -> bytes:
    return bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))


def _m4a_with_cover(picture: bytes) -> bytes:
    """Append the cover to the metadata of an M4A whose index is at its end."""
    handler = _atom(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    items = _atom(b"ilst", _atom(b"covr", _atom(b"data", struct.pack(">II", 14, 0) + picture)))
    extra = _atom(b"udta", _atom(b"meta", bytes(4) + handler + items))
    m4a = clip("MP4 AAC (M4A)").data
    index = m4a.rindex(b"moov") - 4
    size = struct.unpack_from(">I", m4a, index)[0]
    assert index + size == len(m4a)
    return m4a[:index] + struct.pack(">I", size + len(extra)) + m4a[index + 4 :] + extra


def _atom(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", 8 + len(data)) + kind + data


def _flac_with_covers(picture: bytes, count: int) -> bytes:
    block = struct.pack(">II9sIIIIII", 3, 9, b"image/png", 0, 8000, 8000, 24, 0, len(picture)) + picture
    flac = clip("FLAC 16").data
    return flac[:4] + (b"\6" + struct.pack(">I", len(block))[1:] + block) * count + flac[4:]


def _packet_of_many_frames() -> bytes:
    """Return Matroska with one packet of 20,000 frames of silent FLAC: 0.3 MB that are 320 MB decoded."""
    source = io.BytesIO(with_soundfile("FLAC", "PCM_16", samples=np.zeros((44_100, 2), np.float32)))
    file = io.BytesIO()
    with av.open(source) as flac, av.open(file, "w", format="matroska") as out:
        stream = out.add_stream_from_template(flac.streams.audio[0])
        frames = [bytes(packet) for packet in flac.demux(flac.streams.audio[0])]
        packet = av.Packet(frames[1] * 20_000)
        packet.stream, packet.pts, packet.dts, packet.time_base = stream, 0, 0, stream.time_base
        out.mux(packet)
    return file.getvalue()


def _forged_index(sample_bytes: int) -> bytes:
    """Return an M4A whose index claims two thousand million packets."""
    m4a = bytearray(clip("MP4 AAC (M4A)").data)
    struct.pack_into(">II", m4a, m4a.index(b"stsz") + 8, sample_bytes, 0x7FFF_FFFF)
    return bytes(m4a)


def _wide_flac() -> bytes:
    noise = np.random.default_rng(0).normal(0, 0.1, (96_000, 8)).astype(np.float32)
    return with_soundfile("FLAC", "PCM_24", 192_000, samples=noise)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: _mp3_with_cover(_png_bomb()), 32_000),
        (lambda: _m4a_with_cover(_png_bomb()), 32_694),
        (lambda: _flac_with_covers(_png_bomb(), 1), 32_000),
        (lambda: _mp3_with_cover(bytes(100 << 20)), 32_000),
        (lambda: _m4a_with_cover(bytes(30 << 20)), 32_694),
        (lambda: _m4a_with_cover(bytes(100 << 20)), AudioUnreadable),
        (lambda: _flac_with_covers(bytes(16_000_000), 10), AudioUnreadable),
        (lambda: b"#!AMR\n" + b"\x7c" * 10_000_000, AudioTooLong),
        (lambda: b"#!AMR-WB\n" + b"\x7c" * 10_000_000, AudioTooLong),
        (_packet_of_many_frames, AudioUnreadable),
        (lambda: _forged_index(0), AudioError),
        (lambda: _forged_index(1), AudioError),
        (lambda: with_soundfile("FLAC", "PCM_16", 8000, samples=np.zeros(8000 * 600, np.float32)), AudioTooLong),
        (_wide_flac, 8000),
    ],
    ids=[
        *("picture bomb in MP3", "picture bomb in M4A", "picture bomb in FLAC", "100 MB cover in MP3"),
        *("30 MB cover in M4A", "100 MB cover in M4A", "160 MB covers in FLAC", "55 h of AMR", "55 h of AMR-WB"),
        *("packet bomb", "index of table", "index without table", "10 min of silence", "8 channels at 192 kHz"),
    ],
)
def test_memory_is_bounded(make: Callable[[], bytes], expected: int | type[AudioError], tmp_path: Path) -> None:
    """Decoding uses at most the waveform and 64 MiB, whatever the file demands, and reports the fault."""
    path = tmp_path / "clip"
    path.write_bytes(make())
    result = outcome(path, max_duration_s=60)
    if isinstance(expected, int):
        assert result.error is None
        assert result.samples == expected
    else:
        assert isinstance(result.error, expected)
    waveform_mib = (
        4 * 16_000 * 60 / 2**20 if result.error else 0
    )  # the samples decoded before an error are not reported
    assert result.memory_mib < _MEMORY_MIB + waveform_mib


def test_pictures_are_not_decoded() -> None:
    """No cover is decoded, not even for its size, though FFmpeg does so by default when it opens a file."""
    with av.open(io.BytesIO(_m4a_with_cover(_png_bomb())), options=AV_OPTIONS) as container:
        assert [(each.codec_context.name, each.codec_context.width) for each in container.streams.video] == [("png", 0)]


def test_forty_minutes_of_stereo_take_little_more_than_the_waveform(tmp_path: Path) -> None:
    """A WAV of 460 MB is read, mixed and resampled in blocks: 8 MiB are enough."""
    path = tmp_path / "clip"
    size = 2400 * 48_000 * 4
    header = struct.pack(
        "<4sI8sIHHIIHH4sI", b"RIFF", size + 36, b"WAVEfmt ", 16, 1, 2, 48_000, 192_000, 4, 16, b"data", size
    )
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + size)
    result = outcome(path, max_duration_s=2400)
    assert result.samples == 2400 * 16_000
    assert result.memory_mib < 8


def _mutated(data: bytes, seed: int) -> bytes:
    """Cut, flip bits anywhere, overwrite bytes of the headers or of the tail, or randomise a stretch."""
    random = np.random.default_rng([seed, len(data)])
    broken = bytearray(data)
    match seed % 5:
        case 0:
            del broken[int(random.integers(1, len(data))) :]
        case 1:
            for offset in random.integers(0, len(data), random.integers(1, 40)):
                broken[offset] ^= 1 << int(random.integers(8))
        case 2:
            for offset in random.integers(
                0, min(len(data), int(random.choice([64, 200, 1000]))), random.integers(1, 8)
            ):
                broken[offset] = int(random.integers(256))
        case 3:
            for offset in random.integers(max(0, len(data) - 1500), len(data), random.integers(1, 8)):
                broken[offset] = int(random.choice([0, 127, 128, 255]))
        case 4:
            start = int(random.integers(len(data)))
            stretch = len(broken[start : start + int(random.integers(1, 5000))])
            broken[start : start + stretch] = random.bytes(stretch)
    return bytes(broken)


def _decode_mutations(name: str, seeds: range) -> list[str]:
    """Decode in this process and return the violations of the rules."""
    faults = []
    for seed in seeds:
        data = _mutated(clip(name).data, seed)
        try:
            samples = decode(data, max_duration_s=30)
        except AudioError:
            continue
        except Exception as problem:  # noqa: BLE001 - this is what must not be
            faults.append(f"seed {seed}: {problem!r}")
            continue
        if not (0 < samples.size <= 30.1 * 16_000 and np.isfinite(samples).all() and np.abs(samples).max() <= 1):
            faults.append(f"seed {seed}: {samples.size} samples up to {np.abs(samples).max()}")
    return faults


@pytest.mark.parametrize("name", clip_names())
def test_damaged_files_give_samples_or_an_audio_error(name: str) -> None:
    """Cuts and bit flips of every format end in finite samples within ±1 or in an error of our tree, never a crash."""
    assert isolated(_decode_mutations, name, range(_INPUTS_PER_CLIP)) == []
