"""Speech: sentences in six languages, spoken by voices of espeak-ng and flite, and prompts recorded by people.

`python -m deploy.embedded.corpus.speech CACHE` writes the pool. The kind of speaker is determined by measured pitch,
never by the name of a voice: for an unknown name espeak-ng silently falls back to its male voice.
"""

from __future__ import annotations

import html
import multiprocessing
import random
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile
import soxr
from scipy import signal

from deploy.embedded.corpus.packages import unpack
from deploy.embedded.corpus.pool import HELD_OUT, SAMPLE_RATE, TRAIN, trimmed, write_pool

if TYPE_CHECKING:
    from collections.abc import Iterator

LANGUAGES = {
    "English": ("en-us", "fortunes"),
    "Mandarin Chinese": ("cmn", "libreoffice-help-zh-cn"),
    "Spanish": ("es", "fortunes-es"),
    "French": ("fr", "libreoffice-help-fr"),
    "German": ("de", "fortunes-de"),
    "Russian": ("ru", "fortunes-ru"),
}
"""Language: espeak-ng's code, and the Debian package with the sentences."""

SENTENCE = {
    "Mandarin Chinese": r"[\u4e00-\u9fff][\u4e00-\u9fff\uff0c\u3001]{8,26}[\u3002\uff1f\uff01]",
    "Russian": r"[\u0410-\u042f][\u0430-\u044f\u0451,\s]{20,80}[.?!]",
}
"""Patterns of a plain sentence, without digits and names, of languages not in Latin script."""
LATIN_SENTENCE = r"[A-ZÀ-Þ][a-zà-ÿ',\s]{20,80}[.?!]"
ENGLISH_WORDS = re.compile(r"\b(the|and|of|is|to|with|for)\b", re.IGNORECASE)

PROMPTS = {
    "English": (("asterisk-core-sounds-en-wav",), "ktuberling-data/**/sounds/en"),
    "Spanish": (("asterisk-core-sounds-es-wav", "asterisk-prompt-es-co"), "tuxpaint-stamps-default/**/*_es.ogg"),
    "French": (("asterisk-core-sounds-fr-wav", "asterisk-prompt-fr-armelle"), "tuxpaint-stamps-default/**/*_fr.ogg"),
    "Russian": (("asterisk-core-sounds-ru-wav",), "ktuberling-data/**/sounds/ru"),
    "German": ((), "ktuberling-data/**/sounds/de"),
}
"""Recordings of people: packages for training, and the pattern of paths of other people for the evaluation."""

PACKAGES = (
    *(package for _, package in LANGUAGES.values()),
    *(package for packages, _ in PROMPTS.values() for package in packages),
    "ktuberling-data",
    "tuxpaint-stamps-default",
)

VARIANTS = (
    "Alex", "Alicia", "Andrea", "Andy", "Annie", "Denis", "Diogo", "Gene", "Gene2", "Henrique", "Hugo", "Jacky",
    "Lee", "Marco", "Mario", "Michael", "Mike", "Nguyen", "adam", "anika", "antonio", "aunty", "belinda",
    "benjamin", "boris", "caleb", "david", "ed", "edward", "edward2", "f1", "f2", "f4", "grandma", "gustave",
    "iven", "iven2", "iven4", "john", "klatt", "klatt2", "klatt4", "m1", "m3", "m4", "m6", "m7", "marcelo", "max",
    "michel", "miguel", "norbert", "paul", "pedro", "quincy", "rob", "robert", "sandro", "steph", "steph2",
    "victor",
)  # fmt: skip
HELD_OUT_VARIANTS = (
    "m2", "m5", "m8", "pablo", "travis", "zac", "klatt3", "f3", "f5", "linda", "steph3", "Storm",
)  # fmt: skip
FLITE = {"kal16": TRAIN, "awb": TRAIN, "slt": TRAIN, "rms": HELD_OUT}

WORDS_PER_MINUTE = {"slowly": 105, "": 175, "quickly": 310}
WHISPERED = "whispered"
UTTERANCES = {TRAIN: 9, HELD_OUT: 2}
"""Utterances per voice, language and manner. Few sentences are soon memorized, and languages are learnt from them."""

Sound = tuple[np.ndarray, dict[str, object]]


def _text(page: str) -> str:
    """Return the text of an HTML page; blocks are separated, because a sentence ends with its block."""
    page = re.sub(r"(?s)<(script|style).*?</\1>", " ", page)
    page = re.sub(r"</?(?:p|div|h\d|li|td|tr|title|br)\b[^>]*>", " % ", page)
    return html.unescape(re.sub(r"<[^>]+>", " ", page))


@cache
def sentences(sounds: Path, language: str) -> list[str]:
    """Return the plain sentences of a language in a fixed random order; the last tenth is for the evaluation."""
    package = LANGUAGES[language][1]
    texts = []
    for path in sorted((sounds / package).rglob("*")):
        if path.suffix == ".html":
            texts.append(_text(path.read_text(errors="ignore")))
        elif "games/fortunes" in str(path) and path.is_file() and path.suffix in {"", ".fortunes"}:
            texts.append(path.read_text(errors="ignore"))
    text = re.sub(r"\x1b\[[\d;]*m|[\x00-\x08]", "", " % ".join(texts))
    found = re.findall(SENTENCE.get(language, LATIN_SENTENCE), text)
    if language != "English":  # translated books contain untranslated parts
        found = [sentence for sentence in found if not ENGLISH_WORDS.search(sentence)]
    plain = sorted({re.sub(r"\s+", " ", sentence) for sentence in found})
    random.Random("sentences").shuffle(plain)
    return plain


def pitch_hz(samples: np.ndarray) -> float:
    """Return the median fundamental frequency of the voiced frames by autocorrelation, 0 with fewer than four."""
    frame, lags = 800, slice(SAMPLE_RATE // 420, SAMPLE_RATE // 65)
    found = []
    for start in range(0, len(samples) - 2 * frame, frame):
        piece = samples[start : start + 2 * frame] - samples[start : start + 2 * frame].mean()
        if (piece**2).mean() < 0.1 * (samples**2).mean():
            continue
        spectrum = np.abs(np.fft.rfft(piece * np.hanning(len(piece)), 4096)) ** 2
        correlation = np.fft.irfft(spectrum)
        window = correlation[lags]
        best = int(window.argmax())
        if window[best] > 0.45 * correlation[0]:
            found.append(SAMPLE_RATE / (lags.start + best))
    return float(np.median(found)) if len(found) >= 4 else 0.0


def whisper(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the same words whispered: noise with the spectral envelope, which is too coarse for harmonics."""
    frequencies, _, spectrum = signal.stft(samples, SAMPLE_RATE, nperseg=128, noverlap=96)
    noise = rng.standard_normal(len(samples) + 128)
    _, _, carrier = signal.stft(noise, SAMPLE_RATE, nperseg=128, noverlap=96)
    tilt = np.minimum(1, frequencies / 800)[:, None] + 0.05
    envelope = smoothed(np.abs(spectrum))
    _, whispered = signal.istft(
        envelope * carrier[:, : spectrum.shape[1]] * tilt, SAMPLE_RATE, nperseg=128, noverlap=96
    )
    return whispered.astype(np.float32)


def smoothed(magnitudes: np.ndarray) -> np.ndarray:
    """Return magnitudes averaged over neighbouring frames, which removes the pitch period."""
    return signal.convolve(magnitudes, np.ones((1, 5)) / 5, mode="same")


def espeak(text: str, voice: str, words_per_minute: int, pitch: int) -> np.ndarray:
    """Return `text` spoken by espeak-ng at 16 kHz."""
    command = ["espeak-ng", "-v", voice, "-s", str(words_per_minute), "-p", str(pitch), "--stdout"]
    wav = subprocess.run([*command, text], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout
    return decoded(BytesIO(wav))


def flite(text: str, voice: str, stretch: float) -> np.ndarray:
    """Return `text` spoken by flite at 16 kHz, `stretch` times as long as usual."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as wav:
        command = ["flite", "-voice", voice, "--setf", f"duration_stretch={stretch}", "-t", text, "-o", wav.name]
        subprocess.run(command, check=True)
        return decoded(wav.name)


def decoded(source: BytesIO | str | Path) -> np.ndarray:
    """Return mono 16 kHz samples without the silence at the ends."""
    # A file of bare GSM frames has no header.
    bare = {"samplerate": 8_000, "channels": 1, "format": "RAW", "subtype": "GSM610"}
    shape = bare if str(source).endswith(".gsm") else {}
    samples, rate = soundfile.read(source, dtype="float32", always_2d=True, **shape)
    return trimmed(soxr.resample(samples.mean(axis=1), rate, SAMPLE_RATE).astype(np.float32))


def speaker(samples: np.ndarray) -> str:
    """Return `man` or `woman` by pitch, or nothing in the ambiguous range."""
    pitch = pitch_hz(samples)
    return "man" if 70 < pitch < 145 else "woman" if 170 < pitch < 270 else ""


def synthesised(sounds: Path) -> Iterator[Sound]:
    """Yield utterances of every voice in every language and manner."""
    voices = [(variant, TRAIN) for variant in VARIANTS] + [(variant, HELD_OUT) for variant in HELD_OUT_VARIANTS]
    tasks = []
    for language, (code, _) in LANGUAGES.items():
        print(language, len(sentences(sounds, language)), "sentences", flush=True)
        spoken_by = [(f"espeak-ng {name}", f"{code}+{name}", split) for name, split in voices]
        if language == "English":
            spoken_by += [(f"flite {name}", name, split) for name, split in FLITE.items() for _ in range(4)]
        tasks += [(sounds, language, *by, turn) for turn, by in enumerate(spoken_by)]
    with multiprocessing.Pool() as workers:
        for utterances in workers.imap(spoken, tasks):
            yield from utterances


def spoken(task: tuple[Path, str, str, str, str, int]) -> list[Sound]:
    """Return utterances of one voice in one language; voices for training vary in pitch and pace."""
    sounds, language, origin, voice, split, turn = task
    plain = sentences(sounds, language)
    texts = plain[: -len(plain) // 10] if split == TRAIN else plain[-len(plain) // 10 :]
    rng = random.Random(f"{language} {origin} {turn}")
    pitch = rng.choice((35, 45, 50, 55, 65))
    utterances: list[Sound] = []
    for manner, words_per_minute in WORDS_PER_MINUTE.items():
        for _ in range(UTTERANCES[split]):
            text, pace = rng.choice(texts), 1.0
            if split == TRAIN:
                pitch, pace = rng.randint(25, 75), rng.uniform(0.9, 1.1)
            if origin.startswith("flite"):
                samples = flite(text, voice, 175 / words_per_minute / pace)
            else:
                samples = espeak(text, voice, round(words_per_minute * pace), pitch)
            utterances += utterances_of(samples, origin, split, language, manner)
    return utterances


def utterances_of(samples: np.ndarray, origin: str, split: str, language: str, manner: str) -> Iterator[Sound]:
    """Yield the utterance unchanged, sometimes whispered, and a woman's slow utterance also as a child's."""
    who = speaker(samples)
    if not who or not SAMPLE_RATE // 2 < len(samples) < 12 * SAMPLE_RATE:
        return
    facts = {"origin": origin, "split": split, "language": language, "manner": manner}
    yield samples, {"kind": who, **facts}
    rng = np.random.default_rng(len(samples))
    if not manner and rng.random() < 0.5:
        yield whisper(samples, rng), {"kind": "person", **facts, "manner": WHISPERED}
    if who == "woman" and manner == "slowly":
        # A smaller head and a higher voice; the slow utterance gets a common pace.
        smaller = float(rng.uniform(1.32, 1.45))
        if 260 < pitch_hz(samples) * smaller < 400:
            yield soxr.resample(samples, SAMPLE_RATE * smaller, SAMPLE_RATE), {"kind": "child", **facts, "manner": ""}


def recorded(sounds: Path) -> Iterator[Sound]:
    """Yield people's prompts. Their pace is unknown, so the manner is `recorded` and captions do not state it."""
    for language, (packages, others) in PROMPTS.items():
        trained = sorted(path for package in packages for path in (sounds / package).rglob("*"))
        held_out = [
            path
            for path in sorted(sounds.glob(others))
            for path in (sorted(path.glob("*")) if path.is_dir() else [path])
        ]
        for split, paths in ((TRAIN, trained), (HELD_OUT, held_out)):
            chosen = [
                path
                for path in paths
                if path.suffix in {".wav", ".ogg", ".gsm"} and not re.search("beep|tone|tt-", path.name)
            ]
            random.Random("prompts").shuffle(chosen)
            kept: dict[str, int] = defaultdict(int)
            for path in chosen:
                samples = decoded(path)
                who = speaker(samples) if 0.8 * SAMPLE_RATE < len(samples) < 10 * SAMPLE_RATE else ""
                origin = f"prompts {path.relative_to(sounds).parts[0]} {language}"
                if who and kept[f"{who}, {origin}"] < 120:
                    kept[f"{who}, {origin}"] += 1
                    facts = {"kind": who, "origin": origin, "split": split, "language": language, "manner": "recorded"}
                    yield samples, facts
            print("recorded", language, split, dict(kept), flush=True)


def pool(sounds: Path) -> Iterator[Sound]:
    """Yield all utterances."""
    yield from recorded(sounds)
    yield from synthesised(sounds)


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    unpack(directory / "sounds", PACKAGES)
    print(write_pool(directory / "speech", pool(directory / "sounds")), "utterances")
