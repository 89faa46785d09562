"""Real recordings of effects and ambience from Debian packages, labelled by their file names.

`python -m deploy.embedded.corpus.effects CACHE` downloads and unpacks the packages without installing them, and writes
the pool.
"""

from __future__ import annotations

import hashlib
import random
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile
import soxr

from deploy.embedded.corpus.packages import unpack
from deploy.embedded.corpus.pool import HELD_OUT, SAMPLE_RATE, TRAIN, trimmed, write_pool

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGES = (
    "bucklespring-data",
    "crrcsim-data",
    "freedroidrpg-data",
    "gnome-audio",
    "hydrogen-data",
    "hydrogen-drumkits",
    "lbreakout2-data",
    "lincity-ng-data",
    "lmms-common",
    "lugaru-data",
    "megaglest-data",
    "minetest-data",
    "minetest-mod-homedecor",
    "oxygen-sounds",
    "scratch",
    "sonic-pi-samples",
    "supertux-data",
    "tuxpaint-stamps-default",
    "unknown-horizons",
    "wesnoth-1.16-data",
    "widelands-data",
)

IGNORED = (
    r"_desc|(?<!effects)/music/|_(?:[a-z]{2}|[a-z]{2}_[a-z]{2})\.ogg|symbols/|/voices?/|-miss-|select\d|_ack\d"
    r"|drumkits.*(vocal|speak)|whooshhit|homedecor.*fire_small"
)
"""Pattern of names of speech, music and sounds whose kind the name does not show."""

RULES = (
    ("dog", r"/dog\d?\.|mammals/dogs/|wolf|coyote|/bark\d?\."),
    ("cat", r"/(kitten|meow|cat|blackcat)\."),
    (
        "poultry",
        r"/(rooster|hen|duck|goose|gander|turkey|drake)\.ogg|/(rooster|duck|goose)\.wav|duck_\d|chicken|animals/rooster",
    ),
    (
        "birds",
        r"birds/(quetzal|tucan|cuckoo|blackbird|lark|seagull)|/bird\d?\.wav|ambient/(birds|morning)|birds\d\.ogg|animals/bird\d|hawk|seagull",
    ),
    ("crow", r"crow\."),
    ("cattle", r"bovines/(cow|bull|bison)|/ox_\d|cow_(select|die|ack)|mudchute_cow|/cow[\d_.]"),
    ("sheep", r"bovines/(sheep|goat|ram|mountaingoat)|/sheep|goat|lamb"),
    ("horse", r"/horse(-hit|-die|_\d)?[-\d]*\.(wav|ogg)|equines/|donkey"),
    ("hooves", r"horsegallop|horse-canter|horse-elf-canter|horseman_walk"),
    ("pig", r"mammals/pig|tusker|/boar|pig_(select|die|ack)"),
    ("insects", r"cricket|grasshopper|ambient/night|megaglest.*night"),
    ("frogs", r"/frog"),
    ("laughter", r"laugh"),
    ("scream", r"scream|human-female-die|wail"),
    ("growling", r"(orc|troll|ogre|yeti|goblin|orc-small|dwarf|naga|drake|gryphon)-(die|hit)|/(growl|snarl)\d?\."),
    ("sword", r"/sword(-\d)?\.|knife\.|dagger-swish|/spear\.|swing_then_hit|axe\.ogg|claws"),
    ("whoosh", r"-miss(-\d)?\.|swing_then_nohit|swoosh|whoosh|swash|ambi_dark_woosh|throw-\d"),
    (
        "explosion",
        r"explo(de|sion)|/exp(l_ball)?\.|fireworks|firecracker|blast_sound|cineboom|rocketexplosion|catapult_hit",
    ),
    ("gunshot", r"gunshot|thunderstick\.|/shot\.|colobot.*fire|cannon|musket"),
    ("laser", r"laser|phaser|/zap\d|plasma_pistol|pulse\.ogg"),
    ("breaking glass", r"break_glass|glass_break|icecrash|crystallo-(shatter|pop)"),
    ("footsteps", r"footstep"),
    ("typing", r"bucklespring.*\.wav|typing\.mp3"),
    (
        "door",
        r"door_(open|close)|/door\.wav|doorc(lose|reak)|perc_door|gate_(open|close)|fencegate|chest_(open|close)|open-chest|open_chest",
    ),
    (
        "running water",
        r"faucet|homedecor_shower|waterrunning|waterfall|/water\d|env_sounds_water|parklandlake|toilet|/waves|ripples",
    ),
    ("splash", r"splash\.(ogg|wav)|plunge|bubble|water_footstep|fisher_|water-blast|waterdrop|dripdrop|gulp"),
    ("rain", r"/rain\."),
    ("thunder", r"thunder\.|lightning"),
    (
        "fire",
        r"fire_(small|large|fire)|/fire\d?\.(wav|ogg)|campfire|flame(-big)?\.(wav|ogg)|torch\.|firewasteland|melee-fire|furnace",
    ),
    ("train", r"railtrain"),
    ("engine", r"trafic|carpassing|motorcyclepassing|parklandplane|electric\.wav|colobot.*engine|motor"),
    ("horn", r"horn-\d|harbor|final-roll-call"),
    ("crowd", r"sportscroud|partynoise|raving_crowd|market(low|med|full)|applause|inn_\d|tavern_\d"),
    ("bass drum", r"/bd_|kick|bassdrum|drum_bass"),
    ("snare drum", r"snare|/sn_"),
    ("hi-hat", r"hat_?(closed|open|pedal|semi|foot)|hihat|(?<!c)hat-"),
    ("drum", r"/tom|_tom|tom\d|floor|tabla|conga|bongo"),
    ("cymbal", r"cymbal|crash|/ride|splash-|splash_(hard|soft)|ride\d"),
    ("hand clap", r"clap"),
    ("cowbell", r"cowbell"),
    ("shaker", r"shaker|maracas|cabasa|tambour"),
    ("bell", r"perc_bell|belltoll|/bell[.-]|dong\d|doorbell|gong|elec_bell|triangle|savebell"),
    ("telephone", r"im-phone-ring|gnome-audio.*/phone\.|supertux.*/phone\.|mehackit_phone"),
    ("coins", r"coin|/gold\.|goldping|gold"),
    ("hammering", r"hammer|blacksmith|anvil|smith_\d|monumentconstruction|/build\d|worker_build|technician_build"),
    ("chopping", r"woodcutting/(?!tree)|harvest_wood|default_dig_choppy"),
    ("sawing", r"/saw\.|saw/|sawmill|sawing"),
    (
        "machinery",
        r"industry(high|light)|/mill\d|washing|sewing|vacuum|mill_turning|coalmine|oremine|3d_printer|loop_industrial|weav",
    ),
    ("wind", r"/wind\.|windmill|megaglest.*wind"),
    ("beeping", r"computerbeeps|elec_(beep|blip|ping|plip)|message_0"),
    (
        "drums",
        r"loop_(amen|breakbeat|compus|mika|safari|tabla|perc)|break\d|drumset|drummachine|909beat|electro_beat|jungle\d|drumkit\.ogg|wardrums",
    ),
)
"""Kind of sound, and the pattern of its file names; the first match counts."""

LONGEST_S = 30.0
FEWEST_FILES = 4
MOST_FILES = 60


def kind_of(name: str) -> str | None:
    """Return the kind of sound of a lower-case path `package/…/file`, or None if the name does not show it."""
    if re.search(IGNORED, name):
        return None
    return next((kind for kind, pattern in RULES if re.search(pattern, name)), None)


def load(path: Path) -> np.ndarray | None:
    """Return the recording as 16 kHz mono without silence at its ends, or None if it cannot be read."""
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True, frames=48_000 * 60)
    except soundfile.LibsndfileError:
        return None
    mono = soxr.resample(samples.mean(axis=1), rate, SAMPLE_RATE)
    return trimmed(mono.astype(np.float32))[: int(LONGEST_S * SAMPLE_RATE)]


def recordings(sounds: Path) -> Iterator[tuple[np.ndarray, dict[str, object]]]:
    """Yield every distinct labelled recording; a fifth of the files of each kind is held out."""
    by_kind: dict[str, dict[str, Path]] = defaultdict(dict)
    for path in sorted(path for package in PACKAGES for path in (sounds / package).rglob("*")):
        name = str(path.relative_to(sounds)).lower()
        if path.suffix.lower() in {".wav", ".ogg", ".flac", ".mp3"} and (kind := kind_of(name)):
            by_kind[kind].setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), path)
    seen: set[bytes] = set()
    for kind, paths in sorted(by_kind.items()):
        chosen = sorted(paths.items())
        random.Random(f"effects {kind}").shuffle(chosen)
        found = []
        for _, path in chosen:
            samples = load(path)
            if samples is None or len(samples) < SAMPLE_RATE // 20:
                continue
            # The same recording in two packages with different codings has the same length and envelope.
            envelope = np.abs(samples[: len(samples) // 16 * 16]).reshape(16, -1).mean(axis=1)
            fingerprint = bytes([min(255, len(samples) // 800), *(envelope / envelope.max() * 15).astype(np.uint8)])
            if fingerprint not in seen:
                seen.add(fingerprint)
                found.append((path, samples))
            if len(found) == MOST_FILES:
                break
        if len(found) < FEWEST_FILES:
            print(f"left out: {kind}, {len(found)} files", flush=True)
            continue
        held_out = max(2 if len(found) >= 8 else 1, len(found) // 5)
        print(f"{kind}: {len(found)} files, {held_out} held out", flush=True)
        for index, (path, samples) in enumerate(found):
            split = HELD_OUT if index < held_out else TRAIN
            yield samples, {"kind": kind, "origin": str(path.relative_to(sounds)), "split": split}


if __name__ == "__main__":
    cache = Path(sys.argv[1])
    unpack(cache / "sounds", PACKAGES)
    write_pool(cache / "effects", recordings(cache / "sounds"))
