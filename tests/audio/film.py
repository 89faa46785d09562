"""A made-up film: speech, music-like chords, tones and effects at known times, with silence between them."""

from __future__ import annotations

import io
import subprocess
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import soundfile
import soxr

from serving.types import SAMPLE_RATE
from tests.support.programs import program

if TYPE_CHECKING:
    import numpy.typing as npt

    Samples = npt.NDArray[np.float32]

_SENTENCES = (
    "The train to the coast leaves from platform nine at half past six.",
    "Please keep your bags with you, and mind the gap when you get off.",
    "A woman asks whether the seats by the window are free, and the guard nods.",
    "Nobody has seen the old lighthouse keeper since the storm in November.",
)
_VOICES = ("en-us+m3", "en-us+f3", "de+m2", "fr+f4")
_EDGE_S = 0.005


@dataclass(frozen=True)
class Event:
    """One event of the film, in seconds."""

    kind: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Film:
    """Mono at 16 kHz, and what can be heard when."""

    samples: Samples
    events: tuple[Event, ...]

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return self.samples.size / SAMPLE_RATE

    def at(self, time_s: float) -> Event | None:
        """Return the event in the midst of which a time is, `None` if there is silence."""
        return next((event for event in self.events if event.start_s < time_s < event.end_s), None)


@cache
def spoken(number: int) -> Samples:
    """Return a sentence without the silence around it."""
    command = [program("espeak-ng"), "-v", _VOICES[number % 4], "-s", "165", "--stdout", _SENTENCES[number % 4]]
    wav = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    samples, rate = soundfile.read(io.BytesIO(wav), dtype="float32")
    voice = soxr.resample(samples, rate, SAMPLE_RATE).astype(np.float32)
    loud = np.flatnonzero(np.abs(voice) > 0.01 * np.abs(voice).max())
    trimmed: Samples = 0.3 * voice[loud[0] : loud[-1] + 1] / np.abs(voice).max()
    return trimmed


def film(duration_s: float, *, seed: int = 0, bed_db: float | None = None) -> Film:
    """Return a film of about `duration_s`. `bed_db`: level of steady noise under all of it, in dB of full scale."""
    rng = np.random.default_rng(seed)
    parts: list[Samples] = []
    events: list[Event] = []
    length = 0

    def add(samples: Samples, kind: str = "") -> None:
        nonlocal length
        if kind:
            events.append(Event(kind, length / SAMPLE_RATE, (length + samples.size) / SAMPLE_RATE))
        parts.append(samples)
        length += samples.size

    while length < duration_s * SAMPLE_RATE:
        add(np.zeros(int(rng.uniform(0.4, 2.5) * SAMPLE_RATE), np.float32))
        kind = ("speech", "tone", "noise", "chord")[int(rng.integers(4))]
        if kind == "speech":
            add(spoken(int(rng.integers(4))), kind)
        else:
            add(_effect(kind, rng.uniform(0.5, 6), rng), kind)
    samples = np.concatenate(parts)
    if bed_db is not None:
        samples += rng.standard_normal(samples.size).astype(np.float32) * np.float32(10 ** (bed_db / 20))
    return Film(samples, tuple(events))


def _effect(kind: str, seconds: float, rng: np.random.Generator) -> Samples:
    time_s = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    if kind == "noise":
        sound = 0.1 * rng.standard_normal(time_s.size)
    else:
        pitches = (440.0,) if kind == "tone" else (220.0, 277.2, 329.6)
        sound = np.mean([0.2 * np.sin(2 * np.pi * hz * time_s) for hz in pitches], axis=0)
    edge = np.minimum(1, np.minimum(time_s, time_s[::-1]) / _EDGE_S)
    effect: Samples = (edge * sound).astype(np.float32)
    return effect
