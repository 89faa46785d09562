"""Music: melodies, chords and long notes of eight families of instruments, and drums, from General MIDI sound fonts.

`python -m deploy.embedded.corpus.music CACHE` writes the pool. Four sound fonts are trained on, a fifth is held out.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploy.embedded.corpus.pool import HELD_OUT, SAMPLE_RATE, TRAIN, write_pool

if TYPE_CHECKING:
    from collections.abc import Iterator

FONTS = {
    "/usr/share/sounds/sf2/FluidR3_GM.sf2": TRAIN,
    "/usr/share/sounds/sf3/MuseScore_General_Full.sf3": TRAIN,
    "/usr/share/sounds/sf2/sf_GMbank.sf2": TRAIN,
    "/usr/share/sounds/sf2/OPL-3_FM_128M.sf2": TRAIN,
    "/usr/share/sounds/sf2/TimGM6mb.sf2": HELD_OUT,
}

FAMILIES = {
    "piano": ((0, 1, 2), 48, 84),
    "organ": ((16, 17, 18, 19), 48, 79),
    "guitar": ((24, 25, 26, 27), 45, 76),
    "violin": ((40, 41, 42, 48, 49), 50, 84),
    "brass": ((56, 57, 58, 60, 61), 46, 77),
    "reed": ((64, 65, 66, 67, 68, 71), 48, 77),
    "flute": ((72, 73, 74, 75), 67, 94),
    "mallet": ((8, 9, 11, 12, 13, 14), 60, 92),
}
"""Family: its General MIDI programs (from 0), lowest and highest key."""

TEMPOS = (60, 80, 100, 120, 150, 180)
"""Beats per minute; far enough apart that what is said is either right or wrong."""

MAJOR, MINOR = (0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)
KICK, SNARE, HAT, TOM, CRASH = 36, 38, 42, 45, 49
EXCERPTS = {TRAIN: 110, HELD_OUT: 30}
"""Per font and family."""

Note = tuple[float, float, int, int]
"""Start and length in seconds, key, velocity."""


class Synthesiser:
    """libfluidsynth with one sound font, dry and mono at 16 kHz."""

    def __init__(self, font: str) -> None:
        self._lib = lib = ctypes.CDLL(ctypes.util.find_library("fluidsynth"))
        lib.new_fluid_settings.restype = lib.new_fluid_synth.restype = ctypes.c_void_p
        lib.fluid_settings_setnum.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_double]
        lib.fluid_settings_setint.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int]
        settings = lib.new_fluid_settings()
        lib.fluid_settings_setnum(settings, b"synth.sample-rate", float(SAMPLE_RATE))
        lib.fluid_settings_setnum(settings, b"synth.gain", 0.4)
        for effect in (b"synth.reverb.active", b"synth.chorus.active"):
            lib.fluid_settings_setint(settings, effect, 0)
        self._synth = ctypes.c_void_p(lib.new_fluid_synth(ctypes.c_void_p(settings)))
        if lib.fluid_synth_sfload(self._synth, font.encode(), 1) < 0:
            raise FileNotFoundError(font)

    def play(self, notes: list[Note], program: int, channel: int, duration_s: float) -> np.ndarray:
        """`notes` on one channel, float32; what still sounds at the end is cut."""
        lib, synth = self._lib, self._synth
        lib.fluid_synth_system_reset(synth)
        lib.fluid_synth_program_change(synth, channel, program)
        events = [(start, 1, key, velocity) for start, _, key, velocity in notes]
        events += [(start + length, 0, key, 0) for start, length, key, _ in notes]
        pieces, now = [], 0
        for at_s, on, key, velocity in sorted(events):
            at = min(int(at_s * SAMPLE_RATE), int(duration_s * SAMPLE_RATE))
            pieces.append(self._render(at - now))
            now = at
            if on:
                lib.fluid_synth_noteon(synth, channel, key, velocity)
            else:
                lib.fluid_synth_noteoff(synth, channel, key)
        pieces.append(self._render(int(duration_s * SAMPLE_RATE) - now))
        return np.concatenate(pieces)

    def _render(self, frames: int) -> np.ndarray:
        stereo = np.zeros((max(frames, 0), 2), np.float32)
        if frames > 0:
            left = stereo.ctypes.data_as(ctypes.c_void_p)
            self._lib.fluid_synth_write_float(self._synth, frames, left, 0, 2, left, 1, 2)
        return stereo.mean(axis=1)


def melody(rng: random.Random, beat_s: float, duration_s: float, low: int, high: int) -> list[Note]:
    """One note per beat, in steps along a scale, never the same key twice in a row."""
    tonic, scale = rng.randint(low, low + 11), rng.choice((MAJOR, MINOR))
    keys = [
        tonic + 12 * octave + step for octave in range(4) for step in scale if low <= tonic + 12 * octave + step <= high
    ]
    at, notes, legato = rng.randrange(len(keys)), [], rng.uniform(0.7, 1.0)
    for beat in range(int(duration_s / beat_s)):
        notes.append((beat * beat_s, beat_s * legato, keys[at], rng.randint(85, 120)))
        at = max(0, min(len(keys) - 1, at + rng.choice((-2, -1, 1, 2)))) if 2 <= at < len(keys) - 2 else len(keys) // 2
    return notes


def chords(rng: random.Random, beat_s: float, duration_s: float, low: int, high: int) -> list[Note]:
    """One triad per beat."""
    notes: list[Note] = []
    tonic, previous = rng.randint(low, low + 11), -1
    for beat in range(int(duration_s / beat_s)):
        step = rng.choice([step for step in (0, 5, 7, 9) if step != previous])
        third, previous = 3 if step == 9 else 4, step
        for above in (0, third, 7):
            key = min(high, tonic + step + above)
            notes.append((beat * beat_s, beat_s * 0.9, key, rng.randint(80, 110)))
    return notes


def drums(rng: random.Random, beat_s: float, duration_s: float) -> list[Note]:
    """A rock pattern: bass drum and snare in turn on the beat, hi-hat on the half beat."""
    notes: list[Note] = []
    halves, fill = rng.random() < 0.7, rng.random() < 0.4
    for beat in range(int(duration_s / beat_s)):
        now = beat * beat_s
        notes.append((now, 0.1, SNARE if beat % 2 else KICK, rng.randint(100, 125)))
        notes.extend((now + half * beat_s / 2, 0.05, HAT, rng.randint(50, 80)) for half in (range(2) if halves else ()))
        if fill and beat % 8 == 7:
            notes.append((now + beat_s / 2, 0.1, TOM, 110))
        if beat == 0 and fill:
            notes.append((0.0, 0.5, CRASH, 90))
    return notes


def excerpts(font: str, split: str) -> Iterator[tuple[np.ndarray, dict[str, object]]]:
    """Every family played with one sound font."""
    synthesiser = Synthesiser(font)
    origin = Path(font).stem
    for family in (*FAMILIES, "drums"):
        rng = random.Random(f"{origin} {family}")
        for _ in range(EXCERPTS[split]):
            tempo = rng.choice(TEMPOS)
            beat_s = 60 / (tempo * rng.uniform(0.97, 1.03))
            duration_s = max(4.2 * beat_s, 2.0 * 12.5 ** rng.random())
            facts = {"kind": family, "origin": origin, "split": split, "rate": 1 / beat_s}
            if family == "drums":
                yield synthesiser.play(drums(rng, beat_s, duration_s), 0, 9, duration_s), {**facts, "manner": "pattern"}
                continue
            programs, low, high = FAMILIES[family]
            program, style = rng.choice(programs), rng.choices(("melody", "chords", "note"), (5, 2, 2))[0]
            if style == "melody":
                notes = melody(rng, beat_s, duration_s, low, high)
            elif style == "chords":
                notes = chords(rng, beat_s, duration_s, low, high - 12)
            else:
                duration_s = rng.uniform(0.8, 4.0)
                notes = [(0.0, duration_s, rng.randint(low, high), rng.randint(90, 120))]
                facts["rate"] = 0.0
            yield synthesiser.play(notes, program, 0, duration_s), {**facts, "manner": style}
        print(origin, family, flush=True)


def pool() -> Iterator[tuple[np.ndarray, dict[str, object]]]:
    """All music."""
    for font, split in FONTS.items():
        yield from excerpts(font, split)


if __name__ == "__main__":
    print(write_pool(Path(sys.argv[1]) / "music", pool()), "excerpts")
