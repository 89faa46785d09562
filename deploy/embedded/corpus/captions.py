"""Grammar of the captions: from facts to an English paragraph, and back.

Each fact has one wording, so that the model learns to recognise sounds and not to choose between paraphrases.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SPEAKERS = {"man": "a man", "woman": "a woman", "child": "a child"}
LANGUAGES = ("English", "Mandarin Chinese", "Spanish", "French", "German", "Russian")
MANNERS = ("", "slowly", "quickly", "whispered")

INSTRUMENTS = {
    "piano": "a piano",
    "organ": "an organ",
    "guitar": "a guitar",
    "violin": "bowed strings",
    "brass": "a brass instrument",
    "reed": "a reed instrument",
    "flute": "a flute",
    "mallet": "mallet percussion",
}
STYLES = {"melody": "a melody played on {}", "chords": "chords played on {}", "note": "a long note played on {}"}

SOUNDS = {
    "alarm": "a two-tone alarm",
    "applause": "applause",
    "bass drum": "a bass drum",
    "beeping": "electronic beeping",
    "bell": "a bell ringing",
    "birds": "birds singing",
    "bouncing ball": "a bouncing ball",
    "breaking glass": "breaking glass",
    "buzzer": "a harsh buzzer",
    "cat": "a cat meowing",
    "cattle": "a cow mooing",
    "chopping": "wood being chopped",
    "clicking": "sharp clicking",
    "clock": "a clock ticking",
    "coins": "coins clinking",
    "cowbell": "a cowbell",
    "crowd": "a crowd of people",
    "cymbal": "a cymbal",
    "dialling": "telephone keys being dialled",
    "dog": "a dog barking or howling",
    "door": "a door opening or closing",
    "drum": "a hand drum",
    "drums": "a drum kit",
    "engine": "an engine running",
    "explosion": "an explosion",
    "falling sweep": "a falling tone",
    "fire": "a crackling fire",
    "footsteps": "footsteps",
    "growling": "a creature growling",
    "hammering": "metallic hammering",
    "hand clap": "hand claps",
    "heartbeat": "a heartbeat",
    "helicopter": "a helicopter",
    "hi-hat": "a hi-hat",
    "hiss": "steady hissing noise",
    "hooves": "horse hooves",
    "horn": "a horn blowing",
    "horse": "a horse neighing",
    "hum": "an electric hum",
    "insects": "insects chirping",
    "knocking": "knocking on wood",
    "laser": "a laser zapping",
    "laughter": "laughter",
    "machinery": "machinery",
    "pig": "a pig grunting",
    "poultry": "poultry calling",
    "rain": "rain falling",
    "rising sweep": "a rising tone",
    "rumble": "a deep rumble",
    "running water": "running water",
    "sawing": "sawing",
    "scream": "a scream",
    "shaker": "a shaker",
    "sheep": "a sheep or goat bleating",
    "siren": "a wailing siren",
    "snare drum": "a snare drum",
    "splash": "splashing water",
    "sword": "a blade striking",
    "telephone": "a telephone ringing",
    "thunder": "thunder rolling",
    "tone": "a steady tone",
    "typing": "typing on a keyboard",
    "waves": "waves breaking",
    "whoosh": "a whoosh",
    "wind": "wind blowing",
}

LOUDNESS = {"quiet": "quiet", "moderate": "moderately loud", "loud": "loud"}
NOISE = {"none": "no background noise", "faint": "faint background noise", "strong": "strong background noise"}


@dataclass(frozen=True)
class Event:
    """One sound. `manner`: of speaking, or of an instrument's part; `rate`: beats per second, 0 if not stated."""

    kind: str
    language: str = ""
    manner: str = ""
    rate: float = 0.0


@dataclass(frozen=True)
class Facts:
    """Facts of a clip. Events of an `overlap` are in the caption's order, other events in order of time."""

    events: tuple[Event, ...]
    duration_s: float
    overlap: bool = False
    loudness: str = "moderate"
    noise: str = "none"
    reverberant: bool = False
    clipped: bool = False


def stated_rate(event: Event) -> float:
    """Return the rate as stated: music in tens of beats per minute; else per second in tenths, from 4 on in halves."""
    if event.kind in INSTRUMENTS or event.kind == "drums":
        return round(event.rate * 6) / 6
    return round(event.rate * 10) / 10 if event.rate < 4 else round(event.rate * 2) / 2


def stated_duration(duration_s: float) -> float:
    """Return the duration as stated: half a second, or full seconds."""
    return 0.5 if duration_s < 0.75 else float(round(duration_s))


def phrase(event: Event) -> str:
    """Return the words for one sound."""
    if event.kind == "person":
        return f"a person whispering in {event.language}"
    if event.kind in SPEAKERS:
        adverb = f" {event.manner}" if event.manner in ("slowly", "quickly") else ""
        return f"{SPEAKERS[event.kind]} speaking {event.language}{adverb}"
    instrument = INSTRUMENTS.get(event.kind)
    words = STYLES[event.manner].format(instrument) if instrument else SOUNDS[event.kind]
    if not event.rate:
        return words
    rate = stated_rate(event)
    if event.kind in INSTRUMENTS or event.kind == "drums":
        return f"{words} at about {rate * 60:.0f} beats per minute"
    return f"{words} at about {rate:g} per second"


def caption(facts: Facts) -> str:
    """Return the paragraph that states `facts`."""
    seconds = stated_duration(facts.duration_s)
    lasts = {0.5: "half a second", 1.0: "1 second"}.get(seconds, f"{seconds:.0f} seconds")
    phrases = [phrase(event) for event in facts.events]
    if facts.overlap:
        sounds = f"Two sounds overlap: {' and '.join(phrases)}."
    elif len(phrases) == 1:
        sounds = f"It holds {phrases[0]}."
    else:
        sounds = f"It begins with {phrases[0]}, " + "".join(f"then {words}, " for words in phrases[1:-1])
        sounds += f"and ends with {phrases[-1]}."
    quality = f"The recording is {LOUDNESS[facts.loudness]}, with {NOISE[facts.noise]}"
    quality += ", and distorted by clipping." if facts.clipped else "."
    room = "The room echoes like a large hall." if facts.reverberant else "The room is dry."
    return f"The audio clip lasts about {lasts}. {sounds} {quality} {room}"


_WORDS = {
    **{words: (kind, "") for kind, words in SOUNDS.items()},
    **{STYLES[style].format(words): (kind, style) for kind, words in INSTRUMENTS.items() for style in STYLES},
}
_SOUND = "|".join(re.escape(words) for words in sorted(_WORDS, key=len, reverse=True))
_EVENT = re.compile(
    rf"a (?P<who>man|woman|child) speaking (?P<tongue>{'|'.join(LANGUAGES)})(?: (?P<pace>slowly|quickly))?"
    rf"|a person whispering in (?P<whispered>{'|'.join(LANGUAGES)})"
    rf"|(?P<sound>{_SOUND})(?: at about (?P<rate>[\d.]+) (?P<unit>beats per minute|per second))?"
)


def parse(text: str) -> Facts | None:
    """Return the facts that a caption states, or None if it does not follow the grammar.

    `parse(caption(facts))` is `facts` with the duration and the rates as stated.
    """
    shape = re.fullmatch(
        r"The audio clip lasts about (?:(half a)|(\d+)) seconds?\. "
        r"(It begins with|It holds|Two sounds overlap:) (.+?)\. "
        r"The recording is (\w+(?: loud)?), with (\w+) background noise(, and distorted by clipping)?\. "
        r"The room (echoes like a large hall|is dry)\.",
        text.strip(),
    )
    if not shape:
        return None
    half, seconds, form, sounds, loudness, noise, clipped, room = shape.groups()
    levels = {words: level for level, words in LOUDNESS.items()}
    noises = {"no": "none", "faint": "faint", "strong": "strong"}
    events = tuple(_event(match) for match in _EVENT.finditer(sounds))
    if not events or loudness not in levels or noise not in noises:
        return None
    return Facts(
        events,
        0.5 if half else float(seconds),
        form.startswith("Two"),
        levels[loudness],
        noises[noise],
        room.startswith("echoes"),
        bool(clipped),
    )


def _event(match: re.Match[str]) -> Event:
    if match["who"]:
        return Event(match["who"], match["tongue"], match["pace"] or "")
    if match["whispered"]:
        return Event("person", match["whispered"], "whispered")
    kind, manner = _WORDS[match["sound"]]
    rate = float(match["rate"]) / (60 if match["unit"] == "beats per minute" else 1) if match["rate"] else 0.0
    return Event(kind, "", manner, rate)
