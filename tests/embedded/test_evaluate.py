"""Scores of captions against facts."""

from __future__ import annotations

from deploy.embedded.codecs import differences
from deploy.embedded.corpus.captions import Event, Facts
from deploy.embedded.evaluate import REAL_EFFECT, SYNTHETIC, Scores, report, source_of

TRUTH = Facts((Event("man", "French", "quickly"), Event("hammering", rate=4.0)), 6.3, loudness="loud")
RIGHT = Facts((Event("man", "French", "quickly"), Event("hammering", rate=4.0)), 6.0, loudness="loud")


def scores(stated: Facts | None) -> dict[str, tuple[int, int]]:
    """Return right answers and all answers, by attribute."""
    found = Scores()
    found.add_clip(TRUTH, stated, [SYNTHETIC, SYNTHETIC])
    return {name: (right, total) for name, (right, total) in found.counts.items()}


def test_a_right_caption_is_right_in_everything() -> None:
    """Rounded numbers count as right."""
    assert all(right == total for right, total in scores(RIGHT).values())


def test_a_wrong_word_costs_its_own_attribute_only() -> None:
    """A woman for a man is wrong in gender, right as speech."""
    stated = Facts((Event("woman", "French", "quickly"), RIGHT.events[1]), 6.0, loudness="loud")
    wrong = {name for name, (right, total) in scores(stated).items() if right < total}
    assert wrong == {"gender, synthetic", "everything right (synthetic clips)"}


def test_order_is_scored_only_if_the_kinds_are_right() -> None:
    """The same sounds in reverse are right kinds in a wrong order."""
    counts = scores(Facts(RIGHT.events[::-1], 6.0, loudness="loud"))
    assert counts["order, where the kinds are right"] == (0, 1)
    assert counts["kind per event, synthetic"] == (2, 2)


def test_rates_and_durations_have_a_tolerance() -> None:
    """A deviation of a fifth in rate and of a second in duration is right, a larger one is wrong."""
    for rate, seconds, right in ((4.8, 7.0, 1), (5.2, 8.0, 0)):
        counts = scores(Facts((RIGHT.events[0], Event("hammering", rate=rate)), seconds, loudness="loud"))
        assert counts["rate or tempo within 20 %"] == (right, 1)
        assert counts["duration within 1 s (clips to 8 s)"] == (right, 1)


def test_text_outside_the_grammar_is_wrong_in_all_attributes() -> None:
    """A caption that cannot be parsed counts as one without facts."""
    counts = scores(None)
    assert counts["caption follows the grammar"] == (0, 1)
    assert counts["kind per event, synthetic"] == (0, 2)
    assert counts["loudness"] == (0, 1)


def test_an_origin_determines_the_material() -> None:
    """Real recordings are distinguished from synthetic sounds."""
    assert source_of("espeak-ng f1") == source_of("formula") == SYNTHETIC
    assert source_of("scratch/usr/share/Dog1.wav") == REAL_EFFECT


def test_the_report_has_a_confusion_table_of_languages() -> None:
    """French stated as German counts in the row of French; a caption without speech in the last column."""
    found = Scores()
    for stated in (RIGHT, Facts((Event("man", "German"),), 6.0), None):
        found.add_clip(TRUTH, stated, [SYNTHETIC, SYNTHETIC])
    assert "| French | 0 | 0 | 0 | 1 | 1 | 0 | 1 |" in report(found, Scores(), "here", 3)


def test_differences_have_the_evaluations_tolerance() -> None:
    """Rates within 20 % and durations within a second are equal; another kind or a missing rate is a difference."""
    plain = Facts((Event("hammering", rate=2.0), Event("rain")), 5.0)
    near = Facts((Event("hammering", rate=2.3), Event("rain")), 6.0)
    assert differences(plain, near) == []
    far = Facts((Event("hammering", rate=3.0), Event("rain")), 7.0, noise="faint")
    assert differences(plain, far) == ["noise", "rates", "duration"]
    assert differences(plain, Facts((Event("hammering"), Event("hiss")), 5.0)) == ["kinds", "rates"]
    assert differences(plain, Facts(plain.events[:1], 5.0)) == ["kinds", "languages", "manners", "rates"]
    assert differences(plain, None) == ["grammar"]
