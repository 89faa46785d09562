"""Fuzzing of the decoders that were allowed last: damaged files of each, which must neither crash nor hang.

    python -m tests.audio.fuzz_decoders --seconds 600 [--decoder dca]

decodes damaged files for that time for each decoder, in one process after another. A file that ends the process, takes
longer than 10 s of CPU time, breaks the guarantees of `decode()`, or raises anything but an error of the audio is
written to `fixtures/found/`, which `test_fuzz.py` decodes for ever after. The seeds count up from `--first-seed`, so a
run can be repeated.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from serving.audio.decode import decode
from serving.errors import AudioError
from tests.audio.clips import FIXTURES, clip
from tests.audio.isolation import isolated

if TYPE_CHECKING:
    from collections.abc import Callable


def _clips(*names: str) -> Callable[[], list[bytes]]:
    return lambda: [clip(name).data for name in names]


DECODERS: dict[str, Callable[[], list[bytes]]] = {
    "dca": _clips("DTS", "MKA DTS", "MPEG-TS DTS (M2TS)", "WAV DTS called PCM"),
    "truehd": _clips("TrueHD", "MKA TrueHD", "MPEG-TS TrueHD (M2TS)"),
    "mlp": _clips("MLP"),
    "g722": _clips("WAV G.722", "AU G.722"),
    "g723_1": _clips("WAV G.723.1"),
    "g726": _clips("WAV G.726", "WAV G.726 at 24 kbit/s"),
    "g726le": _clips("AIFF-C G.726 little-endian"),
    "gsm": _clips("GSM"),
}
"""Maker of the intact files, by decoder."""

FOUND = FIXTURES / "found"

_BATCH = 100
_CPU_S = 10
"""CPU time within which a file of two seconds, however damaged, must be done."""

_MAX_DURATION_S = 30


def damaged(decoder: str, seed: int) -> bytes:
    """Return a damaged file for this decoder, mostly with intact headers; half of the files are short."""
    random = np.random.default_rng([seed, *decoder.encode()])
    files = DECODERS[decoder]()
    data = bytearray(files[seed % len(files)])
    if random.integers(2):
        del data[int(random.integers(500, 12_000)) :]
    header = int(random.choice([0, 300, 300]))
    for _ in range(int(random.integers(1, 5))):
        _damage(data, header, random)
    return bytes(data)


def _damage(data: bytearray, header: int, random: np.random.Generator) -> None:
    """Flip bits after the header, or randomise, blank, drop, repeat or exchange a stretch."""
    begin, other = (int(random.integers(min(header, len(data) - 2), len(data))) for _ in range(2))
    stretch = slice(begin, min(len(data), begin + int(random.integers(1, 600))))
    size = stretch.stop - stretch.start
    match int(random.integers(6)):
        case 0:
            for offset in random.integers(begin, len(data), int(random.integers(1, 60))):
                data[offset] ^= 1 << int(random.integers(8))
        case 1:
            data[stretch] = random.bytes(size)
        case 2:
            data[stretch] = bytes([int(random.choice([0, 1, 127, 128, 255]))]) * size
        case 3:
            del data[begin : min(stretch.stop, len(data) - 100)]
        case 4:
            data[begin:begin] = data[stretch] * int(random.integers(1, 4))
        case 5:
            data[stretch] = data[other : other + size]


def fault(data: bytes) -> str:
    """Decode in this process and return the violated guarantee, if any. A hang ends the process."""
    signal.setitimer(signal.ITIMER_PROF, _CPU_S)
    try:
        samples = decode(data, max_duration_s=_MAX_DURATION_S)
    except AudioError:
        return ""
    except Exception as problem:  # noqa: BLE001 - this is what must not be
        return repr(problem)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    peak = np.abs(samples).max(initial=0)
    return "" if samples.size and np.isfinite(peak) and peak <= 1 else f"{samples.size} samples up to {peak}"


def faults(decoder: str, seeds: range) -> dict[int, str]:
    """Return the violated guarantees by seed. If the process dies, the seeds are tried by halves."""
    try:
        found: dict[int, str] = isolated(_faults, decoder, seeds)
    except ProcessLookupError as death:
        if len(seeds) == 1:
            return {seeds[0]: str(death)}
        middle = len(seeds) // 2
        return faults(decoder, seeds[:middle]) | faults(decoder, seeds[middle:])
    return found


def _faults(decoder: str, seeds: range) -> dict[int, str]:
    results = ((seed, fault(damaged(decoder, seed))) for seed in seeds)
    return {seed: problem for seed, problem in results if problem}


def fuzz(decoder: str, seconds: float, first_seed: int) -> tuple[int, dict[int, str]]:
    """Decode damaged files for some seconds. Returns their number and the violated guarantees by seed."""
    found: dict[int, str] = {}
    seed, end_s = first_seed, time.monotonic() + seconds
    while time.monotonic() < end_s:
        found |= faults(decoder, range(seed, seed + _BATCH))
        seed += _BATCH
    return seed - first_seed, found


def main() -> int:
    """Fuzz each decoder and print a line about it. Returns the exit status: 1 if a guarantee was violated."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=600, help="Time for each decoder in seconds")
    parser.add_argument("--decoder", choices=DECODERS, action="append", help="Decoder to fuzz. Default: all")
    parser.add_argument("--first-seed", type=int, default=0, help="Seed of the first file")
    arguments = parser.parse_args()
    status = 0
    for decoder in arguments.decoder or DECODERS:
        files, found = fuzz(decoder, arguments.seconds, arguments.first_seed)
        print(f"{decoder}: {files} files, {len(found)} faults", flush=True)  # noqa: T201 - the output of a program
        for seed, problem in found.items():
            FOUND.mkdir(exist_ok=True)
            Path(FOUND, f"{decoder}-{seed}").write_bytes(damaged(decoder, seed))
            print(f"  {decoder}-{seed}: {problem}", flush=True)  # noqa: T201
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
