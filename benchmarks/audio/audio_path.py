"""Speed of the audio path, from a file's bytes to features.

    python -m benchmarks.audio.audio_path [--seconds 30] [--rounds 9] [--out FILE.json]

Unlike most other benchmarks this one imports the service. It answers three questions, prints tables, and with `--out`
writes the figures (`FILE.json`) and the tables (`FILE.md`):

1. One core: clips/s from a file's bytes to log-mel, against the same library decoding the same clip and doing nothing
   else. For WAV that is a mere copy of samples as int16, and a conversion as float32; the report has both.
2. Workers: clips/s of one and of two real worker processes, and CPU seconds per clip.
3. Long files: 40 minutes in a fresh process: seconds, and the peak of memory above the size of the waveform.

Everything is timed in CPU seconds, in turns. The ratio of two is taken within each round, so that variations of the
machine's speed affect both; the report has the median of the rounds, and their least and greatest.
"""

from __future__ import annotations

import io
import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import asyncio
import datetime as dt
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import psutil
import soundfile

from benchmarks.audio.encoded import clips, noisy_stereo, with_av
from benchmarks.program import module_environment, option_parser
from benchmarks.report.markdown import spread
from serving.audio.decode import decode
from serving.audio.features import log_mel
from serving.audio.worker_pool import AudioWorkerPool
from serving.config import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

LONG_S = 2400
PIECES, PIECE_S = 40, 59.9
"""Parts of a long file and their length: a little less than 40 minutes, as each part of MP3 or AAC adds padding."""
WORKER_CLIPS, WORKER_ROUNDS = 12, 9
"""Clips for each worker in a round: enough to make the wait of one worker for the other at the end short."""


def main() -> None:
    """Measure, print, and write."""
    parser = option_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=30, help="length of each clip")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="path of the JSON; the tables get the suffix .md")
    parser.add_argument("--long", type=Path, help="only decode this long file, in this process (question 3)")
    options = parser.parse_args()
    if options.long:
        print(json.dumps(_long(options.long)))
        return
    by_kind = clips(options.seconds)
    results = {
        "conditions": {
            "date": dt.datetime.now(dt.UTC).isoformat(timespec="minutes"),
            "seconds": options.seconds,
            "rounds": options.rounds,
            "cores": len(os.sched_getaffinity(0)),
            "load average before": os.getloadavg()[0],
            **{name: version(name) for name in ("av", "soundfile", "soxr", "numpy", "scipy")},
        },
        "one core": _one_core(by_kind, options.rounds),
        "workers": asyncio.run(_workers(by_kind["MP3 48 kHz stereo"])),
        "long": _long_files(),
    }
    report = _report(results)
    print(report)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(report)


def _one_core(by_kind: Mapping[str, bytes], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return the CPU seconds of each stage, by kind of clip: one figure a round."""
    found = {}
    for name, data in by_kind.items():
        samples = decode(data, max_duration_s=LONG_S)
        functions: dict[str, Callable[[], object]] = {
            "raw": partial(_av_only, data),
            "decode": partial(decode, data, max_duration_s=LONG_S),
            "log-mel": partial(log_mel, samples),
        }
        if name.startswith("WAV"):
            functions["raw"] = partial(_soundfile_only, data, "float32")
            functions["raw int16"] = partial(_soundfile_only, data, "int16")
        found[name] = _timed(functions, rounds)
    return found


def _timed(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(-1, rounds):
        for name, function in functions.items():
            began = time.process_time()
            function()
            if number >= 0:  # the first is a warm-up
                taken[name].append(time.process_time() - began)
    return taken


def _soundfile_only(data: bytes, dtype: str) -> None:
    with soundfile.SoundFile(io.BytesIO(data)) as sound_file:
        block = np.empty((32_768, sound_file.channels), dtype)
        while len(sound_file.read(out=block)):
            pass


def _av_only(data: bytes) -> None:
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.audio[0]
        decoder = stream.codec_context
        if decoder.name == "amrnb":
            decoder = av.CodecContext.create("libopencore_amrnb", "r")
        for packet in container.demux(stream):
            decoder.decode(packet)


async def _workers(data: bytes) -> list[dict[str, float]]:
    """Return the time and the CPU seconds of each round with one and with two workers, in turns."""
    found = []
    pools = {count: AudioWorkerPool(Settings(audio_workers=count)) for count in (1, 2)}
    with tempfile.NamedTemporaryFile(suffix=".mp3") as file:
        file.write(data)
        file.flush()
        processes: dict[int, list[psutil.Process]] = {}
        for count, pool in pools.items():
            before = set(psutil.Process().children())
            await pool.start()
            processes[count] = [each for each in psutil.Process().children() if each not in before]
        for _ in range(WORKER_ROUNDS):
            for count, pool in pools.items():
                cpu_s, began = _cpu_s(processes[count]), time.perf_counter()
                prepared = WORKER_CLIPS * count
                await asyncio.gather(*(_prepare(pool, Path(file.name)) for _ in range(prepared)))
                wall_s = time.perf_counter() - began
                cpu_s = _cpu_s(processes[count]) - cpu_s
                found.append({"workers": count, "wall_s": wall_s, "cpu_s": cpu_s, "clips": prepared})
    for pool in pools.values():
        await pool.stop()
    return found


async def _prepare(pool: AudioWorkerPool, path: Path) -> None:
    async with pool.prepare(path):
        pass


def _cpu_s(processes: Sequence[psutil.Process]) -> float:
    return sum(sum(each.cpu_times()[:2]) for each in processes)


def _long_files() -> dict[str, dict[str, float]]:
    """Measure 40 minutes of each codec, concatenated from a file of one minute."""
    piece = noisy_stereo(PIECE_S)
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "clip")
        for name, kind, codec in (("MP3", "mp3", "libmp3lame"), ("AAC", "adts", "aac"), ("Opus", "ogg", "libopus")):
            path.write_bytes(with_av(kind, codec, 48_000, 128_000, piece) * PIECES)
            found[name] = _in_fresh_process(path)
        with soundfile.SoundFile(path, "w", 48_000, 2, format="WAV", subtype="PCM_16") as wav:
            for _ in range(PIECES):
                wav.write(piece)
        found["WAV"] = _in_fresh_process(path)
    return found


def _in_fresh_process(path: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.audio.audio_path", "--long", str(path)]
    environment = os.environ | module_environment()
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    found: dict[str, float] = json.loads(ended.stdout)
    return found


def _long(path: Path) -> dict[str, float]:
    """Decode one file; memory is the peak of resident memory, minus that before."""
    before_kib, began, began_cpu_s = _memory_kib("VmRSS"), time.perf_counter(), time.process_time()
    samples = decode(path, max_duration_s=LONG_S)
    peak_kib, decode_cpu_s = _memory_kib("VmHWM") - before_kib, time.process_time() - began_cpu_s
    features = log_mel(samples)
    return {
        "audio_s": samples.size / 16_000,
        "wall_s": time.perf_counter() - began,
        "decode_cpu_s": decode_cpu_s,
        "cpu_s": time.process_time() - began_cpu_s,
        "waveform_mib": samples.nbytes / 2**20,
        "features_mib": features.nbytes / 2**20,
        "decode_extra_mib": peak_kib / 1024 - samples.nbytes / 2**20,
        "whole_extra_mib": (_memory_kib("VmHWM") - before_kib) / 1024 - (samples.nbytes + features.nbytes) / 2**20,
    }


def _memory_kib(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


def _report(results: Mapping[str, Any]) -> str:
    conditions = results["conditions"]
    lines = ["# The audio path", "", *(f"- {name}: {value}" for name, value in conditions.items()), ""]
    lines += [f"## One core: {conditions['seconds']:g} s clips, in CPU time", ""]
    lines += ["| Clip | Library alone, clips/s | Ours to 16 kHz mono | and log-mel | Ours of library | and log-mel |"]
    lines += ["|---|---:|---:|---:|---:|---:|"]
    for name, taken in results["one core"].items():
        both = [decoded + mel for decoded, mel in zip(taken["decode"], taken["log-mel"], strict=True)]
        for raw in (each for each in taken if each.startswith("raw")):
            speeds = (f"{1 / median(each):.1f}" for each in (taken[raw], taken["decode"], both))
            ratios = (_ratio(taken[raw], each) for each in (taken["decode"], both))
            lines.append(f"| {name}{raw.removeprefix('raw')} | {' | '.join((*speeds, *ratios))} |")
    lines += ["", f"Log-mel alone: {_milliseconds(results['one core'])} ms a clip.", ""]
    one, two = ([each for each in results["workers"] if each["workers"] == count] for count in (1, 2))
    lines += [
        "## Workers: MP3 clips through the pool",
        "",
        "| Workers | clips/s | CPU ms per clip |",
        "|---|---:|---:|",
    ]
    for count, rounds in ((1, one), (2, two)):
        clips_per_s = spread([each["clips"] / each["wall_s"] for each in rounds], 1)
        lines.append(f"| {count} | {clips_per_s} | {spread([1e3 * e['cpu_s'] / e['clips'] for e in rounds], 1)} |")
    wall = _ratio(*([each["clips"] / each["wall_s"] for each in rounds] for rounds in (two, one)))
    cpu = _ratio(*([each["workers"] * each["clips"] / each["cpu_s"] for each in rounds] for rounds in (two, one)))
    cores = [spread([each["cpu_s"] / each["wall_s"] for each in rounds], 2) for rounds in (one, two)]
    lines += ["", f"Two against one: {wall} as measured; {cpu} with a core for each, by CPU per clip."]
    lines += [f"Cores that the workers had: one {cores[0]}, two {cores[1]}.", ""]
    lines += ["## 40 minutes, in a fresh process", ""]
    lines += [
        "| File | Audio, s | CPU s | of it decoding | Wall, s | Waveform, MiB | Peak above it, MiB | Features, MiB |"
    ]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|"]
    columns = "audio_s", "cpu_s", "decode_cpu_s", "wall_s", "waveform_mib", "decode_extra_mib", "features_mib"
    lines += [
        f"| {name} 48 kHz stereo | {' | '.join(f'{found[column]:.1f}' for column in columns)} |"
        for name, found in results["long"].items()
    ]
    return "\n".join([*lines, ""])


def _ratio(above: Sequence[float], below: Sequence[float]) -> str:
    return spread([a / b for a, b in zip(above, below, strict=True)], 2)


def _milliseconds(one_core: Mapping[str, Mapping[str, list[float]]]) -> str:
    return spread([1e3 * each for taken in one_core.values() for each in taken["log-mel"]], 1)


if __name__ == "__main__":
    main()
