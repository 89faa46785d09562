"""Pools of rendered sounds on disk: concatenated int16 samples, and one line of facts per sound."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

SAMPLE_RATE = 16_000
TRAIN, HELD_OUT = "train", "held-out"


@dataclass(frozen=True)
class Entry:
    """One rendered sound: position of its samples, and its facts.

    `origin` is the unit of the split: a voice, a recording, a sound font. `rate` is in beats per second.
    """

    kind: str
    origin: str
    split: str
    start: int
    samples: int
    language: str = ""
    manner: str = ""
    mode: str = ""
    rate: float = 0.0

    @property
    def duration_s(self) -> float:
        return self.samples / SAMPLE_RATE


class Pool:
    """Sounds of one source, memory-mapped."""

    def __init__(self, path: Path) -> None:
        with path.with_suffix(".jsonl").open() as lines:
            self.entries = [Entry(**json.loads(line)) for line in lines]
        self._samples = np.memmap(path.with_suffix(".i16"), np.int16, "r")

    def read(self, entry: Entry) -> np.ndarray:
        """Return the samples of `entry`, float32 in [-1, 1]."""
        return self._samples[entry.start : entry.start + entry.samples].astype(np.float32) / 32768


def write_pool(path: Path, sounds: Iterable[tuple[np.ndarray, dict[str, object]]]) -> int:
    """Write sounds (float samples at 16 kHz, facts) to a pool, each with a peak of 0.9; return their number.

    The pool is created only when complete, and an existing pool is kept, so an interrupted run can be repeated.
    """
    if path.with_suffix(".jsonl").exists():
        return len(Pool(path).entries)
    start, entries = 0, []
    part = path.with_suffix(".part")
    with part.open("wb") as out:
        for samples, facts in sounds:
            peak = float(np.abs(samples).max(initial=0))
            if peak < 1e-4 or not np.isfinite(peak):
                continue
            out.write((samples * (0.9 * 32767 / peak)).astype(np.int16).tobytes())
            entries.append(Entry(start=start, samples=len(samples), **facts))  # type: ignore[arg-type]
            start += len(samples)
    part.rename(path.with_suffix(".i16"))
    part.write_text("".join(json.dumps(asdict(entry)) + "\n" for entry in entries))
    part.rename(path.with_suffix(".jsonl"))
    return len(entries)


def trimmed(samples: np.ndarray, floor_db: float = -45, margin_s: float = 0.02) -> np.ndarray:
    """Return `samples` without leading and trailing parts that are more than `floor_db` below the peak."""
    loud = np.flatnonzero(np.abs(samples) > np.abs(samples).max(initial=0) * 10 ** (floor_db / 20))
    if not len(loud):
        return samples[:0]
    margin = int(margin_s * SAMPLE_RATE)
    return samples[max(0, loud[0] - margin) : loud[-1] + margin]
