"""Sources of the corpus: labels of recordings, sentences, voices, notes."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile

from deploy.embedded.corpus import effects, music, speech
from deploy.embedded.corpus.captions import SOUNDS, Event, stated_rate
from deploy.embedded.corpus.pool import SAMPLE_RATE, TRAIN

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("megaglest-data/x/sounds/cow_die1.wav", "cattle"),
        ("hydrogen-drumkits/x/gmrockkit/cowbell-hard.wav", "cowbell"),
        ("scratch/x/animal/kitten.wav", "cat"),
        ("tuxpaint-stamps-default/x/animals/mammals/cats/lion.ogg", None),
        ("lbreakout2-data/x/sounds/goldshower.wav", "coins"),
        ("minetest-mod-homedecor/x/sounds/homedecor_shower.ogg", "running water"),
        ("sonic-pi-samples/x/buffers/rand-stream.wav", None),
        ("wesnoth-1.16-data/x/sounds/chat-friend.ogg", None),
        ("hydrogen-drumkits/x/gmrockkit/hat-closed.wav", "hi-hat"),
        ("lugaru-data/x/sounds/bark2.ogg", "dog"),
        ("lugaru-data/x/sounds/whooshhit.ogg", None),
        ("widelands-data/x/woodcutting/tree_falling_00.ogg", None),
        ("widelands-data/x/woodcutting/fast_woodcutting_00.ogg", "chopping"),
        ("tuxpaint-stamps-default/x/animals/dog_desc_fr.ogg", None),
    ],
)
def test_a_files_name_determines_its_kind(path: str, kind: str | None) -> None:
    """Similar names are distinguished, and a name without a kind is left out."""
    assert effects.kind_of(path) == kind


def test_every_label_has_words() -> None:
    """Each kind of a rule has words in a caption, or too few files, so that it is left out."""
    assert {kind for kind, _ in effects.RULES} - set(SOUNDS) <= {"crow", "frogs", "gunshot", "train"}


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """Folder with a page of a partly English French book, and a page of a Chinese book."""
    french = tmp_path / "libreoffice-help-fr" / "help" / "fr" / "page.html"
    chinese = tmp_path / "libreoffice-help-zh-cn" / "help" / "zh-CN" / "page.html"
    french.parent.mkdir(parents=True)
    chinese.parent.mkdir(parents=True)
    french.write_text(
        "<script>La variable n'est pas une phrase du tout.</script><h1>Le titre n'a pas de point</h1>"
        "<p>Cliquez sur la <em>couleur</em> de votre choix.</p><p>The output is used to print results.</p>"
        "<p>Avec 3 chiffres ce n'est rien.</p>"
    )
    chinese.write_text("<p>选择要将新模版保存到哪个类别。</p><p>使用 Calc 打开。</p>")
    return tmp_path


def test_sentences_are_plain_and_of_their_language(books: Path) -> None:
    """There is no script, title, digit, name or untranslated sentence."""
    speech.sentences.cache_clear()
    assert speech.sentences(books, "French") == ["Cliquez sur la couleur de votre choix."]
    assert speech.sentences(books, "Mandarin Chinese") == ["选择要将新模版保存到哪个类别。"]


def hummed(pitch_hz: float) -> np.ndarray:
    """Return two seconds of a voice-like sound."""
    t = np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    harmonics = np.array([np.sin(2 * np.pi * pitch_hz * n * t) / n for n in range(1, 12)])
    return np.asarray(harmonics.sum(axis=0), np.float32)


@pytest.mark.parametrize(("pitch_hz", "who"), [(110, "man"), (220, "woman"), (157, "")])
def test_pitch_determines_the_speaker(pitch_hz: float, who: str) -> None:
    """The speaker is a man, a woman, or unknown for an ambiguous pitch."""
    assert speech.pitch_hz(hummed(pitch_hz)) == pytest.approx(pitch_hz, rel=0.02)
    assert speech.speaker(hummed(pitch_hz)) == who


def test_an_utterance_has_variants() -> None:
    """A woman's slow utterance is also a child's at a common pace; a whisper has no pitch and no gender."""
    as_woman, as_child = speech.utterances_of(hummed(220), "voice", TRAIN, "French", "slowly")
    assert (as_woman[1]["kind"], as_woman[1]["manner"]) == ("woman", "slowly")
    assert (as_child[1]["kind"], as_child[1]["manner"]) == ("child", "")
    assert speech.pitch_hz(as_child[0]) > 1.3 * 220
    assert len(as_child[0]) < len(as_woman[0])
    assert list(speech.utterances_of(hummed(157), "voice", TRAIN, "French", "")) == []
    assert speech.pitch_hz(speech.whisper(hummed(220), np.random.default_rng(0))) == 0


def test_bare_gsm_is_read(tmp_path: Path) -> None:
    """A prompt of GSM frames without a header is decoded at 8 kHz."""
    path = tmp_path / "prompt.gsm"
    soundfile.write(path, hummed(220)[::2], 8_000, format="RAW", subtype="GSM610")
    samples = speech.decoded(path)
    assert len(samples) == pytest.approx(2 * SAMPLE_RATE, rel=0.05)
    assert speech.pitch_hz(samples) == pytest.approx(220, rel=0.03)


@pytest.mark.parametrize("family", music.FAMILIES)
def test_notes_stay_within_the_instruments_range(family: str) -> None:
    """Melodies and chords stay within it; each chord has three different keys, and none is cut off at the top."""
    _, low, high = music.FAMILIES[family]
    for seed in range(20):
        chords = music.chords(random.Random(seed), 0.5, 5.0, low, high)
        assert all(low <= key <= high for _, _, key, _ in chords)
        assert all(len({key for at, _, key, _ in chords if at == beat / 2}) == 3 for beat in range(10))
        keys = [key for _, _, key, _ in music.melody(random.Random(seed), 0.5, 5.0, low, high)]
        assert all(low <= key <= high for key in keys)
        assert all(before != after for before, after in pairwise(keys))


def test_recorded_notes_are_played_at_their_key_and_time(tmp_path: Path) -> None:
    """A key without a recording is the nearest one, played faster; it stops when the key is released."""
    tone = np.sin(2 * np.pi * 440 * np.arange(2 * 44_100) / 44_100)
    soundfile.write(tmp_path / "A4.mp3", 0.5 * tone, 44_100, format="MP3")
    played = music.Sampler(tmp_path).play([(0.0, 0.5, 69, 127), (1.0, 0.5, 81, 127)], 2.0)
    assert len(played) == 2 * SAMPLE_RATE

    def pitch(start_s: float) -> float:
        piece = played[int(start_s * SAMPLE_RATE) :][:4_000] * np.hanning(4_000)
        return float(np.abs(np.fft.rfft(piece)).argmax() * SAMPLE_RATE / 4_000)

    assert pitch(0.1) == pytest.approx(440, abs=4)
    assert pitch(1.1) == pytest.approx(880, abs=4)
    assert np.abs(played[int(0.7 * SAMPLE_RATE) : int(0.95 * SAMPLE_RATE)]).max() == 0


@pytest.mark.parametrize(
    ("kind", "rate", "stated"),
    [("clock", 2.04, 2.0), ("clock", 1.27, 1.3), ("clock", 6.3, 6.5), ("piano", 1.33, 4 / 3)],
)
def test_rates_are_stated_more_finely_than_the_tolerance(kind: str, rate: float, stated: float) -> None:
    """Steps are within a few of the 20 %: tenths below 4 per second, halves above, tens of beats per minute."""
    assert stated_rate(Event(kind, rate=rate)) == pytest.approx(stated)
