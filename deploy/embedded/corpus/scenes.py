"""Scenes: one to three sounds in sequence or two at once, in a room, at a level, with noise; and their facts."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import soxr
from scipy import signal

from deploy.embedded.corpus import procedural
from deploy.embedded.corpus.captions import SPEAKERS, Event, Facts
from deploy.embedded.corpus.pool import HELD_OUT, SAMPLE_RATE, TRAIN, Entry, Pool

if TYPE_CHECKING:
    from pathlib import Path

SHORTEST_S, COMMON_S, LONGEST_S = 0.5, 9.0, 30.0
LONG_SHARE = {TRAIN: 0.15, HELD_OUT: 0.3}
"""Share of the clips that may be up to `LONGEST_S`; the others are at most `COMMON_S`."""

SHORTEST_NOTE_S = 1.0
"""Shortest note that a caption calls long."""

SHAPES = (("single", 0.45), ("two", 0.27), ("three", 0.08), ("overlap", 0.2))
SOURCES = (("speech", 0.3), ("music", 0.2), ("procedural", 0.25), ("effects", 0.25))

WHO = (("man", 0.35), ("woman", 0.4), ("child", 0.12), ("person", 0.13))
"""Speakers with their probabilities; a `person` whispers."""

PEAK_DB = {"quiet": (-36, -29), "moderate": (-19, -14), "loud": (-3, -0.5)}
"""Level of the clip's peak, in dB of full scale."""

NOISE_DB = {"faint": (-36, -31), "strong": (-20, -16)}
"""Level of the noise below the peak of the sounds."""

STATIONARY = {
    "applause", "crowd", "engine", "fire", "helicopter", "hiss", "hum", "insects", "machinery", "rain", "rumble",
    "running water", "thunder", "waves", "wind", "buzzer", "whoosh",
}  # fmt: skip
"""Sounds in which neither added noise nor a room is audible."""


@dataclass(frozen=True)
class Scene:
    """A clip: samples at 16 kHz, facts, position of each event, and sources.

    `spans_s` are start and end of each event of `facts` in seconds; `real` is true if any part is a real recording.
    """

    samples: np.ndarray
    facts: Facts
    spans_s: tuple[tuple[float, float], ...]
    real: bool
    origins: tuple[str, ...]


@dataclass(frozen=True)
class _Part:
    event: Event
    samples: np.ndarray
    origin: str
    real: bool


class SceneMaker:
    """Generator of the scenes of one split from the pools in `cache`, one per seed."""

    def __init__(self, cache: Path, split: str) -> None:
        self._split = split
        self._pools = {name: Pool(cache / name) for name in ("speech", "music", "effects")}
        self._by_kind: dict[str, dict[str, list[Entry]]] = {name: defaultdict(list) for name in self._pools}
        self._same_voice: dict[tuple[str, ...], list[Entry]] = defaultdict(list)
        for name, pool in self._pools.items():
            for entry in pool.entries:
                if entry.split == split:
                    key = f"{entry.kind} {entry.language}" if name == "speech" else entry.kind
                    self._by_kind[name][key].append(entry)
                    self._same_voice[_voice(entry)].append(entry)

    def make(self, seed: int, shape: str | None = None, source: str | None = None) -> Scene:
        """Return the scene of `seed`; without `shape` and `source` they are drawn at random."""
        rng = np.random.default_rng([seed, self._split == HELD_OUT])
        shape = shape or _drawn(rng, SHAPES)
        count = {"single": 1, "two": 2, "three": 3, "overlap": 2}[shape]
        shortest = {"single": SHORTEST_S, "two": 2.2, "three": 4.0, "overlap": 2.0}[shape]
        longest = LONGEST_S if rng.random() < LONG_SHARE[self._split] else COMMON_S
        seconds = float(np.exp(rng.uniform(np.log(shortest), np.log(longest))))
        if shape == "overlap":
            parts = self._parts(rng, 2, [seconds * rng.uniform(0.8, 0.97) for _ in range(2)], source)
            parts.sort(key=lambda part: (part.event.kind not in {*SPEAKERS, "person"}, part.event.kind))
        else:
            weights = rng.uniform(0.7, 1.3, count) * (seconds - 0.2 * (count - 1)) / count
            parts = self._parts(
                rng, count, [max(0.45, w) for w in weights * min(1, 0.98 * seconds / weights.sum())], source
            )
        return self._mixed(rng, parts, seconds, overlap=shape == "overlap")

    def _parts(self, rng: np.random.Generator, count: int, lengths: list[float], source: str | None) -> list[_Part]:
        parts: list[_Part] = []
        while len(parts) < count:
            part = self._part(rng, source or _drawn(rng, SOURCES), lengths[len(parts)])
            if part and not any(_alike(part, other) for other in parts):
                parts.append(part)
        return parts

    def _part(self, rng: np.random.Generator, source: str, seconds: float) -> _Part | None:
        if source == "procedural":
            kinds = [*procedural.RHYTHMIC, *procedural.STEADY]
            if self._split == TRAIN and rng.random() < 0.3:
                kinds = [*procedural.RHYTHMIC]  # rates are learnt most slowly
            samples, rate = procedural.make(rng, kind := str(rng.choice(kinds)), seconds)
            return _Part(
                Event(kind, rate=rate if rate * seconds >= 3.2 else 0.0), _levelled(samples), "formula", real=False
            )
        kinds = self._by_kind[source]
        names = sorted(kinds)
        if source == "speech":
            who = _drawn(rng, WHO)
            names = [name for name in names if name.startswith(f"{who} ")]
            if not names:
                return None
        choices = kinds[_pick(rng, names)]
        entry = choices[rng.integers(len(choices))]
        if source == "speech":
            return self._spoken(rng, entry, seconds)
        return self._played(rng, entry, seconds) if source == "music" else self._recorded(rng, entry, seconds)

    def _spoken(self, rng: np.random.Generator, entry: Entry, seconds: float) -> _Part | None:
        if seconds < 1.2:
            return None
        others, pieces, length = self._same_voice[_voice(entry)], [], 0.0
        while length < seconds:
            piece = _levelled(self._pools["speech"].read(entry))
            pause = np.zeros(int(rng.uniform(0.15, 0.4) * SAMPLE_RATE), np.float32)
            pieces += [piece, pause]
            length += (len(piece) + len(pause)) / SAMPLE_RATE
            entry = others[rng.integers(len(others))]
        samples = self._varied(rng, np.concatenate(pieces), 0.04)[: int(seconds * SAMPLE_RATE)]
        manner = "" if entry.manner == "recorded" else entry.manner
        return _Part(
            Event(entry.kind, entry.language, manner), _faded(samples), entry.origin, entry.manner == "recorded"
        )

    def _played(self, rng: np.random.Generator, entry: Entry, seconds: float) -> _Part | None:
        if entry.rate * min(seconds, entry.duration_s) < 3.6 and entry.manner != "note":
            return None
        if entry.manner == "note" and seconds < SHORTEST_NOTE_S:
            return None
        samples = self._pools["music"].read(entry)
        if entry.manner != "note":
            # Repeated from any beat on: an integer number of beats, so that the tempo continues.
            beats = int(entry.duration_s * entry.rate)
            loop = samples[: int(beats / entry.rate * SAMPLE_RATE)]
            first = int(rng.integers(beats) / entry.rate * SAMPLE_RATE)
            samples = np.tile(loop, int(np.ceil((first + seconds * SAMPLE_RATE) / len(loop))))[first:]
        samples = self._varied(rng, samples, 0.0)[: int(seconds * SAMPLE_RATE)]
        manner = "" if entry.kind == "drums" else entry.manner
        return _Part(Event(entry.kind, "", manner, entry.rate), _faded(_levelled(samples)), entry.origin, real=False)

    def _recorded(self, rng: np.random.Generator, entry: Entry, seconds: float) -> _Part | None:
        pool, pieces, length, shift = self._pools["effects"], [], 0.0, rng.uniform(-0.3, 0.3)
        choices, origins = self._by_kind["effects"][entry.kind], entry.origin
        while length < seconds * 0.75:
            samples = pool.read(entry)
            if len(samples) > seconds * SAMPLE_RATE * 1.3:
                # The loudest of four windows, because a recording may begin with near silence.
                size = int(seconds * SAMPLE_RATE)
                starts = rng.integers(0, len(samples) - size, 4)
                start = max(starts, key=lambda at: float(np.square(samples[at : at + size]).mean()))
                samples = samples[start : start + size]
            samples = self._varied(rng, samples, 0.0, 2 ** (shift + rng.uniform(-0.05, 0.05)))
            pieces += [_levelled(samples), np.zeros(int(rng.uniform(0.03, 0.4) * SAMPLE_RATE), np.float32)]
            length += (len(pieces[-1]) + len(pieces[-2])) / SAMPLE_RATE
            if rng.random() < 0.5:
                entry = choices[rng.integers(len(choices))]
        samples = np.concatenate(pieces)[: int(seconds * SAMPLE_RATE)]
        return _Part(Event(entry.kind), _faded(samples), origins, real=True)

    def _varied(self, rng: np.random.Generator, samples: np.ndarray, spread: float, ratio: float = 1.0) -> np.ndarray:
        """Return samples with a random speed and, in training only, a random tone colour."""
        ratio *= rng.uniform(1 - spread, 1 + spread)
        if abs(ratio - 1) > 1e-3:
            samples = soxr.resample(samples, SAMPLE_RATE * ratio, SAMPLE_RATE, quality="LQ")
        if self._split == TRAIN and rng.random() < 0.6:
            edge = rng.uniform(300, 3000)
            low = signal.sosfilt(signal.butter(1, edge, fs=SAMPLE_RATE, output="sos"), samples)
            samples = samples + (10 ** (rng.uniform(-9, 7) / 20) - 1) * low
        return samples.astype(np.float32)

    def _mixed(self, rng: np.random.Generator, parts: list[_Part], seconds: float, *, overlap: bool) -> Scene:
        total, spans, out = int(seconds * SAMPLE_RATE), [], None
        lengths = [min(len(part.samples), total) for part in parts]
        spare = total - (max(lengths) if overlap else sum(lengths))
        if spare < 0 or (len(parts) == 1 and spare > 0.6 * SAMPLE_RATE):
            # If parts are longer or much shorter than planned, the clip's length follows them.
            total += -spare if spare < 0 else int(0.4 * SAMPLE_RATE) - spare
            spare = max(0, total - (max(lengths) if overlap else sum(lengths)))
        out = np.zeros(total, np.float32)
        at = int(spare * rng.uniform(0, 0.5)) if not overlap else 0
        gap = (spare - at) // max(len(parts), 1)
        for index, part in enumerate(parts):
            samples = part.samples[: lengths[index]]
            start = int(rng.uniform(0, total - len(samples))) if overlap else at
            gain = 10 ** (rng.uniform(-5, 0) / 20)
            out[start : start + len(samples)] += gain * samples[: total - start]
            spans.append((start / SAMPLE_RATE, (start + len(samples)) / SAMPLE_RATE))
            at = start + len(samples) + gap
        return self._finished(rng, out, parts, spans, overlap=overlap)

    def _finished(
        self,
        rng: np.random.Generator,
        out: np.ndarray,
        parts: list[_Part],
        spans: list[tuple[float, float]],
        *,
        overlap: bool,
    ) -> Scene:
        events = tuple(part.event for part in parts)
        bare = not any(event.kind in STATIONARY for event in events)
        reverberant = bool(bare and rng.random() < 0.2)
        noise = str(rng.choice(["none", "faint", "strong"], p=[0.5, 0.25, 0.25])) if bare else "none"
        loudness = str(rng.choice(["quiet", "moderate", "loud"], p=[0.25, 0.4, 0.35]))
        clipped = bool(loudness == "loud" and bare and rng.random() < 0.25)
        if reverberant:
            tail = np.arange(int(rng.uniform(1.2, 2.2) * SAMPLE_RATE)) / SAMPLE_RATE
            response = rng.standard_normal(len(tail)) * np.exp(-6.9 * tail / tail[-1])
            response *= rng.uniform(0.5, 0.9) / np.sqrt(np.square(response).sum())
            response[0] += 0.4
            out = signal.fftconvolve(out, response)[: len(out)].astype(np.float32)
        out = out / (np.abs(out).max() + 1e-9)
        if noise != "none":
            level = 10 ** (rng.uniform(*NOISE_DB[noise]) / 20)
            hiss = procedural.noise(rng, len(out), float(rng.choice([0, 1])))
            out = out + (level / (hiss.std() + 1e-9)) * hiss
        peak = 10 ** (rng.uniform(*PEAK_DB[loudness]) / 20)
        if clipped:
            out = np.clip(out * 10 ** (rng.uniform(16, 24) / 20), -1, 1)
        out = (out * peak / (np.abs(out).max() + 1e-9)).astype(np.float32)
        facts = Facts(events, len(out) / SAMPLE_RATE, overlap, loudness, noise, reverberant, clipped)
        return Scene(out, facts, tuple(spans), any(part.real for part in parts), tuple(part.origin for part in parts))


def _voice(entry: Entry) -> tuple[str, ...]:
    return entry.kind, entry.origin, entry.language, entry.manner


def _alike(part: _Part, other: _Part) -> bool:
    """Return whether two parts cannot be distinguished as two sounds."""
    people = {*SPEAKERS, "person"}
    stationary = part.event.kind in STATIONARY and other.event.kind in STATIONARY
    return part.event.kind == other.event.kind or {part.event.kind, other.event.kind} <= people or stationary


def _drawn(rng: np.random.Generator, choices: tuple[tuple[str, float], ...]) -> str:
    return str(rng.choice([name for name, _ in choices], p=[weight for _, weight in choices]))


def _pick(rng: np.random.Generator, names: list[str]) -> str:
    return names[rng.integers(len(names))]


def _levelled(samples: np.ndarray) -> np.ndarray:
    return (samples / (np.abs(samples).max(initial=0) + 1e-9)).astype(np.float32)


def _faded(samples: np.ndarray) -> np.ndarray:
    n = min(len(samples) // 4, SAMPLE_RATE // 40)
    ramp = np.linspace(0, 1, n, dtype=np.float32)
    samples = samples.copy()
    samples[:n] *= ramp
    samples[len(samples) - n :] *= ramp[::-1]
    return samples
