"""Clips for load tests: filtered noise and tones, each from a seed, so that no two clips are alike.

`make` encodes complete files and keeps them; that takes about a CPU-second per half minute of sound. `Bank` splices
packets of a few such files in an order drawn from a seed; that takes milliseconds for a clip of any length, as load
generators need. `python -m benchmarks.load.clips DIRECTORY KIND` encodes the files of a `Bank`. No two clips have the
same bytes, samples or features: no cache of audio, features or prefixes helps.
"""

from __future__ import annotations

import fcntl
import io
import math
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import av
import numpy as np
from scipy.fft import irfft, next_fast_len, rfft, rfftfreq

from benchmarks.program import module_environment

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

SAMPLE_RATE = 48_000


class Codec(NamedTuple):
    """Encoder settings of PyAV for a kind of file. The name of the kind is the file's suffix."""

    container: str
    encoder: str
    sample_rate: int
    layout: str
    bit_rate: int | None = None
    options: dict[str, str] | None = None


CODECS = {
    "mp3": Codec("mp3", "libmp3lame", 48_000, "stereo", 128_000, {"compression_level": "7", "reservoir": "0"}),
    "m4a": Codec("ipod", "aac", 48_000, "stereo", 96_000),
    "opus": Codec("ogg", "libopus", 48_000, "stereo", 64_000),
    "amr": Codec("amr", "libopencore_amrnb", 8_000, "mono", 12_200),
    "wav": Codec("wav", "pcm_s16le", 44_100, "stereo"),
    "flac": Codec("flac", "flac", 48_000, "stereo"),
}
LOSSLESS = ("wav", "flac")
LOSSLESS_MAX_S = 30
"""Longer lossless files do not fit into a request (10 MiB of base64)."""
BANK_FILES, BANK_S = 4, 30
SPLICE_S = 2
"""Length of the pieces of a spliced clip."""

LENGTHS_S = {"effects": (1, 10), "speech": (5, 30), "podcasts": (300, 2400)}
"""Least and greatest length by sort of clip; equal odds for every doubling."""


@dataclass(frozen=True, slots=True)
class Clip:
    """An audio file. Its suffix names its kind."""

    path: Path
    duration_s: float


def alike(directory: Path, count: int, duration_s: int) -> list[Clip]:
    """Return `count` clips of one length: 48 kHz stereo MP3."""
    return [Clip(directory / f"{duration_s}s-{seed:05}.mp3", duration_s) for seed in range(count)]


def mixed(directory: Path, count: int, rounds: int) -> list[Clip]:
    """Return `count` clips for each round: 1 s to 10 min, all kinds of file, equal odds for every doubling of length.

    Every round has nearly the same lengths and kinds, in another order and with other sounds.
    """
    clips = []
    for number in range(rounds):
        random = np.random.default_rng(number)
        batch = []
        for slot in range(count):
            duration_s = round(600 ** ((slot + random.uniform(0, 0.5)) / (count - 0.5)), 2)
            kinds = [kind for kind in CODECS if duration_s <= LOSSLESS_MAX_S or kind not in LOSSLESS]
            name = f"{number}-{slot:03}-{duration_s}s.{kinds[slot % len(kinds)]}"
            batch.append(Clip(directory / name, duration_s))
        clips += [batch[slot] for slot in random.permutation(count)]
    return clips


def make(clips: Sequence[Clip]) -> None:
    """Write the missing files, on all cores."""
    missing = [(clip, seed) for seed, clip in enumerate(clips) if not clip.path.exists()]
    for directory in {clip.path.parent for clip, _ in missing}:
        directory.mkdir(parents=True, exist_ok=True)
    if missing:
        with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(make_clip, *zip(*missing, strict=True)))


def make_clip(clip: Clip, seed: int) -> None:
    """Write one file: a band of noise that differs between the channels, and four tones of varying loudness."""
    samples = sound(seed, round(clip.duration_s * SAMPLE_RATE))
    codec = CODECS[clip.path.suffix.removeprefix(".")]
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
    frame.sample_rate = SAMPLE_RATE
    unfinished = clip.path.with_name(f"unfinished-{os.getpid()}-{clip.path.name}")
    with av.open(unfinished, "w", format=codec.container) as file:
        stream: Any = file.add_stream(
            codec.encoder, rate=codec.sample_rate, layout=codec.layout, options=codec.options or {}
        )
        if codec.bit_rate:
            stream.bit_rate = codec.bit_rate
        convert = av.AudioResampler(stream.format.name, codec.layout, codec.sample_rate)
        for part in (*convert.resample(frame), *convert.resample(None)):
            part.pts = None
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))
    unfinished.rename(clip.path)


def sound(seed: int, count: int) -> npt.NDArray[np.float32]:
    """Return `count` samples at 48 kHz in ±1, shape (2, count)."""
    random = np.random.default_rng(seed)
    size = next_fast_len(max(count, math.ceil(0.1 * SAMPLE_RATE)), real=True)
    low_hz, high_hz = sorted(random.uniform(100, 12_000, 2))
    spectrum = rfft(random.standard_normal((2, size), np.float32))
    offset = (rfftfreq(size, 1 / SAMPLE_RATE) - (low_hz + high_hz) / 2) / (high_hz - low_hz + 200)
    samples = irfft(spectrum / (1 + offset.astype(np.float32) ** 4), size)[:, :count] * np.float32(0.1)
    time_s = np.arange(count, dtype=np.float32) / SAMPLE_RATE
    for _ in range(4):
        pitch_hz, sway_hz = random.uniform(80, 4000), random.uniform(0.1, 3)
        samples += 0.05 * np.sin(2 * np.pi * pitch_hz * time_s) * (1 + np.sin(2 * np.pi * sway_hz * time_s))
    bounded: npt.NDArray[np.float32] = samples.clip(-1, 1).astype(np.float32)
    return bounded


def bank_clips(directory: Path, kind: str) -> list[Clip]:
    """Return the files of a `Bank` for this kind of clip."""
    return [Clip(directory / f"bank-{seed}.{kind}", BANK_S) for seed in range(BANK_FILES)]


def make_bank(directory: Path, kind: str) -> None:
    """Write the missing files of a `Bank`; of several processes, one writes them and the others wait."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"bank-{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        make(bank_clips(directory, kind))


class Bank:
    """Encoded sounds of each kind, from which any number of clips is spliced."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._loaded: dict[str, tuple[Any, float, list[list[bytes]]]] = {}

    def clip(self, kind: str, duration_s: float, seed: int) -> tuple[bytes, float]:
        """Return a file and its length in seconds: a whole number of packets, so close to `duration_s`."""
        like, packet_s, bases = self._load(kind)
        count = max(1, round(duration_s / packet_s))
        # One piece has only some thousand variants; four pieces have enough that no clip occurs twice.
        piece = max(1, min(round(SPLICE_S / packet_s), count // 4))
        random = np.random.default_rng((seed, 7))
        packets: list[bytes] = []
        while len(packets) < count:
            base = bases[random.integers(len(bases))]
            first = int(random.integers(len(base)))
            packets += base[first : first + piece]
        return _mux(like, CODECS[kind].container, packets[:count], packet_s), count * packet_s

    def _load(self, kind: str) -> tuple[Any, float, list[list[bytes]]]:
        """Return a file's stream, the length of a packet in seconds, and the packets of each file."""
        if kind not in self._loaded:
            clips = bank_clips(self._directory, kind)
            if not all(clip.path.exists() for clip in clips):
                # In a new program: a fork of a Locust process continues Locust's greenlets, on its parent's sockets.
                program = [sys.executable, "-m", "benchmarks.load.clips", str(self._directory), kind]
                subprocess.run(program, check=True, env=os.environ | module_environment())
            found: list[list[bytes]] = []
            for clip in clips:
                file = av.open(clip.path)
                like = file.streams.audio[0]
                # The first and the last packet may have another length.
                packets = [packet for packet in file.demux(like) if packet.size][1:-1]
                found.append([bytes(packet) for packet in packets])
            self._loaded[kind] = like, float(packets[0].duration * packets[0].time_base), found
        return self._loaded[kind]


def _mux(like: Any, container: str, packets: Sequence[bytes], packet_s: float) -> bytes:
    """Return a file of these packets, with the headers of the stream `like`."""
    target = io.BytesIO()
    with av.open(target, "w", format=container) as file:
        stream = file.add_stream_from_template(like)
        ticks = packet_s / float(like.time_base)
        for number, data in enumerate(packets):
            packet = av.Packet(data)
            packet.stream, packet.time_base = stream, like.time_base
            packet.pts = packet.dts = round(number * ticks)
            packet.duration = round(ticks)
            file.mux(packet)
    return target.getvalue()


if __name__ == "__main__":
    make_bank(Path(sys.argv[1]), sys.argv[2])
