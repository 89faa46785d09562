"""Music: melodies, chords and long notes of eight families of instruments, and drums.

`python -m deploy.embedded.corpus.music CACHE` writes the pool. Training uses five General MIDI sound fonts and recorded
notes of single instruments; a sixth sound font is held out.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import random
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile
import soxr

from deploy.embedded.corpus.packages import unpack_npm
from deploy.embedded.corpus.pool import HELD_OUT, SAMPLE_RATE, TRAIN, trimmed, write_pool

if TYPE_CHECKING:
    from collections.abc import Iterator

FONTS = {
    "alphatab/package/dist/soundfont/sonivox.sf2": TRAIN,
    "/usr/share/sounds/sf2/FluidR3_GM.sf2": TRAIN,
    "/usr/share/sounds/sf3/MuseScore_General_Full.sf3": TRAIN,
    "/usr/share/sounds/sf2/sf_GMbank.sf2": TRAIN,
    "/usr/share/sounds/sf2/OPL-3_FM_128M.sf2": TRAIN,
    "/usr/share/sounds/sf2/TimGM6mb.sf2": HELD_OUT,
}
"""Sound fonts: those of Debian by absolute path, that of an npm package by its path in the folder of sources."""

RECORDED = {
    "piano": ("piano@1.1.2",),
    "organ": ("organ@1.1.1",),
    "guitar": ("guitar-acoustic@1.1.2", "guitar-nylon@1.1.1", "guitar-electric@1.1.1"),
    "violin": ("violin@1.1.1", "cello@1.1.1"),
    "brass": ("trumpet@1.1.2", "trombone@1.1.2", "french-horn@1.1.2", "tuba@1.1.2"),
    "reed": ("clarinet@1.1.2", "saxophone@1.1.2", "bassoon@1.1.2"),
    "flute": ("flute@1.1.2",),
    "mallet": ("xylophone@1.1.2",),
}
"""Family: instruments with recorded notes, in npm's packages `tonejs-instrument-<instrument>-mp3`."""

PACKAGES = (
    "@coderline/alphatab@1.8.4",
    *(
        "tonejs-instrument-{}-mp3@{}".format(*instrument.split("@"))
        for instruments in RECORDED.values()
        for instrument in instruments
    ),
)

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
"""Family: General MIDI programs (from 0), lowest and highest key."""

TEMPOS = (60, 80, 100, 120, 150, 180)
"""Beats per minute, far enough apart that a stated tempo is clearly right or wrong."""

MAJOR, MINOR = (0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)
KICK, SNARE, HAT, TOM, CRASH = 36, 38, 42, 45, 49
EXCERPTS = {TRAIN: 220, HELD_OUT: 30}
"""Excerpts per font and family; recorded notes count as one font."""

GENERATORS = {
    8: (-1_500, 600),  # filter cutoff, cents
    9: (0, 90),  # filter resonance, centibels
    11: (-600, 1_200),  # modulation envelope to filter cutoff, cents
    34: (0, 4_000),  # attack, timecents
    36: (-2_000, 1_000),  # decay, timecents
    38: (-1_500, 1_500),  # release, timecents
    6: (0, 25),  # vibrato, cents
    52: (-25, 25),  # tuning, cents
}
"""Generators of the SoundFont 2.04 specification (section 8.1.2), with the range of a random offset in training.

The model soon memorizes a few fonts; the offsets turn each into many that differ in tone colour and envelope.
"""

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
        lib.fluid_synth_set_gen.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_float]
        self._synth = ctypes.c_void_p(lib.new_fluid_synth(ctypes.c_void_p(settings)))
        if lib.fluid_synth_sfload(self._synth, font.encode(), 1) < 0:
            raise FileNotFoundError(font)

    def play(
        self, notes: list[Note], program: int, channel: int, duration_s: float, timbre: dict[int, float]
    ) -> np.ndarray:
        """Return `notes` on one channel as float32, cut at `duration_s`. `timbre` is added to the generators."""
        lib, synth = self._lib, self._synth
        lib.fluid_synth_system_reset(synth)
        lib.fluid_synth_program_change(synth, channel, program)
        for generator, offset in timbre.items():
            lib.fluid_synth_set_gen(synth, channel, generator, offset)
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


class Sampler:
    """Recorded notes of one instrument; a key is the nearest recorded note, resampled."""

    RELEASE_S = 0.12

    def __init__(self, folder: Path) -> None:
        self._notes: dict[int, np.ndarray] = {}
        for path in folder.glob("*.mp3"):
            if named := re.fullmatch(r"([A-G])(s?)(\d)", path.stem):
                key = 12 * (int(named[3]) + 1) + "C D EF G A B".index(named[1]) + len(named[2])
                samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
                self._notes[key] = trimmed(soxr.resample(samples.mean(axis=1), rate, SAMPLE_RATE))

    def play(self, notes: list[Note], duration_s: float) -> np.ndarray:
        """Return `notes` as float32, cut at `duration_s`."""
        out = np.zeros(int(duration_s * SAMPLE_RATE), np.float32)
        release = np.linspace(1, 0, int(self.RELEASE_S * SAMPLE_RATE), dtype=np.float32)
        for start_s, length_s, key, velocity in notes:
            nearest = min(self._notes, key=lambda recorded: abs(recorded - key))
            faster = 2 ** ((key - nearest) / 12)
            held, at = int(length_s * SAMPLE_RATE), int(start_s * SAMPLE_RATE)
            note = self._notes[nearest][: int((held + len(release)) * faster) + 1]
            note = soxr.resample(note, SAMPLE_RATE * faster, SAMPLE_RATE)[: held + len(release)]
            dying = note[held:]
            dying *= release[: len(dying)]
            note = note[: len(out) - at]
            out[at : at + len(note)] += note * (velocity / 127)
        return out


def melody(rng: random.Random, beat_s: float, duration_s: float, low: int, high: int) -> list[Note]:
    """Return one note per beat, in steps along a scale, never the same key twice in succession."""
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
    """Return one triad per beat, with a root up to nine semitones above the tonic."""
    notes: list[Note] = []
    tonic, previous = rng.randint(low, min(low + 11, high - 16)), -1
    for beat in range(int(duration_s / beat_s)):
        step = rng.choice([step for step in (0, 5, 7, 9) if step != previous])
        third, previous = 3 if step == 9 else 4, step
        triad = (tonic + step + above for above in (0, third, 7))
        notes += [(beat * beat_s, beat_s * 0.9, key, rng.randint(80, 110)) for key in triad]
    return notes


def drums(rng: random.Random, beat_s: float, duration_s: float) -> list[Note]:
    """Return a rock pattern: alternating bass drum and snare on the beat, hi-hat on the half beat."""
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


def excerpt(rng: random.Random, family: str) -> tuple[list[Note], float, dict[str, object]]:
    """Return notes for an instrument of `family`, their duration in seconds, and their facts."""
    tempo = rng.choice(TEMPOS)
    beat_s = 60 / (tempo * rng.uniform(0.97, 1.03))
    duration_s = max(4.2 * beat_s, 2.0 * 12.5 ** rng.random())
    facts: dict[str, object] = {"kind": family, "rate": 1 / beat_s}
    if family == "drums":
        return drums(rng, beat_s, duration_s), duration_s, {**facts, "manner": "pattern"}
    _, low, high = FAMILIES[family]
    style = rng.choices(("melody", "chords", "note"), (5, 2, 2))[0]
    if style == "melody":
        notes = melody(rng, beat_s, duration_s, low, high)
    elif style == "chords":
        notes = chords(rng, beat_s, duration_s, low, high)
    else:
        duration_s = rng.uniform(1.0, 4.0)
        notes = [(0.0, duration_s, rng.randint(low, high), rng.randint(90, 120))]
        facts["rate"] = 0.0
    return notes, duration_s, {**facts, "manner": style}


def excerpts(font: Path, split: str) -> Iterator[tuple[np.ndarray, dict[str, object]]]:
    """Yield excerpts of every family, played with one sound font."""
    synthesiser = Synthesiser(str(font))
    for family in (*FAMILIES, "drums"):
        rng = random.Random(f"{font.stem} {family}")
        for _ in range(EXCERPTS[split]):
            notes, duration_s, facts = excerpt(rng, family)
            program, channel = (0, 9) if family == "drums" else (rng.choice(FAMILIES[family][0]), 0)
            timbre = {}
            if split == TRAIN and rng.random() < 0.7:
                timbre = {generator: rng.uniform(*span) for generator, span in GENERATORS.items()}
            samples = synthesiser.play(notes, program, channel, duration_s, timbre)
            yield samples, {**facts, "origin": font.stem, "split": split}
        print(font.stem, family, flush=True)


def recorded(sounds: Path) -> Iterator[tuple[np.ndarray, dict[str, object]]]:
    """Yield excerpts of every family, played with recorded notes."""
    for family, instruments in RECORDED.items():
        rng = random.Random(f"recorded {family}")
        for instrument in instruments:
            name = f"tonejs-instrument-{instrument.partition('@')[0]}-mp3"
            sampler = Sampler(sounds / name / "package")
            for _ in range(EXCERPTS[TRAIN] // len(instruments)):
                notes, duration_s, facts = excerpt(rng, family)
                yield sampler.play(notes, duration_s), {**facts, "origin": name, "split": TRAIN}
        print("recorded", family, flush=True)


def pool(sounds: Path) -> Iterator[tuple[np.ndarray, dict[str, object]]]:
    """Yield all excerpts."""
    for font, split in FONTS.items():
        yield from excerpts(sounds / font, split)
    yield from recorded(sounds)


if __name__ == "__main__":
    cache = Path(sys.argv[1])
    unpack_npm(cache / "sounds", PACKAGES)
    print(write_pool(cache / "music", pool(cache / "sounds")), "excerpts")
