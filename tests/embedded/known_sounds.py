"""Generated clips with known facts, and the check that a caption states the facts."""

from __future__ import annotations

import io
import random
import subprocess
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import soundfile
import soxr
from scipy import signal

from deploy.embedded.corpus import music, procedural, speech
from deploy.embedded.corpus.captions import Event, Facts, parse
from deploy.embedded.corpus.pool import SAMPLE_RATE, trimmed
from deploy.embedded.corpus.scenes import NOISE_DB, PEAK_DB
from tests.support.programs import program, sound_font

if TYPE_CHECKING:
    import numpy.typing as npt

    Samples = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Clip:
    """Mono samples at 16 kHz, and their facts."""

    samples: Samples
    facts: Facts


def sound(seed: int, kind: str, seconds: float, rate: float = 0.0) -> Clip:
    """Return `seconds` of one kind of sound; `rate` in beats per second, for the kinds that have one."""
    rng = np.random.default_rng(seed)
    make = procedural.STEADY[kind] if kind in procedural.STEADY else procedural.RHYTHMIC[kind][0]
    return _clip(make(rng, seconds, rate), Event(kind, rate=rate))


def voice(text: str, variant: str, kind: str, language: str = "English", manner: str = "") -> Clip:
    """Return `text` spoken by espeak-ng's voice `variant`, for instance `en-us+m3`.

    `kind` is man, woman, child (a woman's voice made smaller) or person (without voice, if `manner` is whispered).
    """
    pace = speech.WORDS_PER_MINUTE["slowly" if kind == "child" else manner if manner != "whispered" else ""]
    command = [program("espeak-ng"), "-v", variant, "-s", str(pace), "--stdout", text]
    wav = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    samples, rate = soundfile.read(io.BytesIO(wav), dtype="float32")
    samples = trimmed(soxr.resample(samples, rate, SAMPLE_RATE))
    if kind == "child":
        samples = soxr.resample(samples, 1.38 * SAMPLE_RATE, SAMPLE_RATE)
    if manner == "whispered":
        samples = speech.whisper(samples, np.random.default_rng(0))
    return _clip(samples, Event(kind, language, manner))


@cache
def _synthesiser() -> music.Synthesiser:
    return music.Synthesiser(str(sound_font()))


def played(seed: int, family: str, style: str, seconds: float, beats_per_minute: float = 0.0) -> Clip:
    """Return a melody, chords or a note of an instrument, or drums, from a sound font unseen in training."""
    rng, beat_s = random.Random(seed), 60 / (beats_per_minute or 60)
    event = Event(family, "", style, beats_per_minute / 60)
    if family == "drums":
        return _clip(_synthesiser().play(music.drums(rng, beat_s, seconds), 0, 9, seconds, {}), event)
    programs, low, high = music.FAMILIES[family]
    if style == "note":
        notes = [(0.0, seconds, rng.randint(low, high), 110)]
    else:
        notes = (music.melody if style == "melody" else music.chords)(rng, beat_s, seconds, low, high)
    return _clip(_synthesiser().play(notes, programs[0], 0, seconds, {}), event)


def _clip(samples: Samples, *events: Event) -> Clip:
    samples = (samples / np.abs(samples).max()).astype(np.float32)
    return Clip(samples, Facts(events, len(samples) / SAMPLE_RATE))


def in_turn(*clips: Clip, pause_s: float = 0.3) -> Clip:
    """Return the clips in sequence, with pauses between them."""
    pause = np.zeros(round(pause_s * SAMPLE_RATE), np.float32)
    pieces = [piece for clip in clips for piece in (pause, clip.samples)][1:]
    return _clip(np.concatenate(pieces), *(event for clip in clips for event in clip.facts.events))


def at_once(first: Clip, second: Clip) -> Clip:
    """Return both clips mixed. They have the same length; events are ordered by name, as in captions."""
    events = first.facts.events + second.facts.events
    clip = _clip(first.samples + second.samples, *sorted(events, key=lambda event: event.kind))
    return replace(clip, facts=replace(clip.facts, overlap=True))


def recorded(
    clip: Clip, *, loudness: str = "moderate", noise: str = "none", clipped: bool = False, reverberant: bool = False
) -> Clip:
    """Return the clip as a recording of that quality, by the corpus's methods."""
    rng = np.random.default_rng(0)
    samples = clip.samples
    if reverberant:
        tail_s = np.arange(int(1.7 * SAMPLE_RATE)) / SAMPLE_RATE
        response = rng.standard_normal(len(tail_s)) * np.exp(-6.9 * tail_s / tail_s[-1])
        response *= 0.8 / np.sqrt(np.square(response).sum())
        response[0] += 0.4
        samples = signal.fftconvolve(samples, response)[: len(samples)]
    samples = samples / np.abs(samples).max()
    if noise != "none":
        hiss = procedural.noise(rng, len(samples))
        samples = samples + 10 ** (np.mean(NOISE_DB[noise]) / 20) * hiss / hiss.std()
    if clipped:
        samples = np.clip(10 * samples, -1, 1)
    peak = 10 ** (np.mean(PEAK_DB[loudness]) / 20)
    facts = replace(clip.facts, loudness=loudness, noise=noise, clipped=clipped, reverberant=reverberant)
    return Clip((samples * peak / np.abs(samples).max()).astype(np.float32), facts)


def assorted(count: int) -> list[Clip]:
    """Return `count` different clips of 1 to 20 s: single sounds, in sequence and at once, in good and bad quality."""
    clips = []
    for seed in range(count):
        rng = np.random.default_rng([seed, count])
        kinds = rng.choice([*procedural.RHYTHMIC, *procedural.STEADY], 2, replace=False).tolist()
        seconds = float(np.exp(rng.uniform(0, np.log(20))))
        shape = (in_turn, at_once, lambda first, _: first)[seed % 3]
        quality = {
            "loudness": rng.choice([*PEAK_DB]),
            "noise": rng.choice(["none", *NOISE_DB]),
            "clipped": bool(rng.random() < 0.2),
            "reverberant": bool(rng.random() < 0.2),
        }
        first, second = (sound(seed, kind, seconds / 2, rate=float(rng.choice([1, 2, 4]))) for kind in kinds)
        clips.append(recorded(shape(first, second), **quality))
    return clips


def assert_states(caption: str, facts: Facts) -> None:
    """Assert that the caption states the facts: sounds in order, speakers, manner, rate, duration, recording quality.

    A rate matches within 20 %, a duration within 1 s or 10 %.
    """
    stated = parse(caption)
    assert stated is not None, caption
    assert [event.kind for event in stated.events] == [event.kind for event in facts.events], caption
    assert [event.language for event in stated.events] == [event.language for event in facts.events], caption
    assert [event.manner for event in stated.events] == [event.manner for event in facts.events], caption
    for heard, event in zip(stated.events, facts.events, strict=True):
        assert abs(heard.rate - event.rate) <= 0.2 * event.rate, caption
    assert abs(stated.duration_s - facts.duration_s) <= max(1.0, 0.1 * facts.duration_s), caption
    assert stated.overlap == facts.overlap, caption
    assert (stated.loudness, stated.noise) == (facts.loudness, facts.noise), caption
    assert (stated.clipped, stated.reverberant) == (facts.clipped, facts.reverberant), caption
