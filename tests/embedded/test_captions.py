"""Grammar of the captions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.embedded.corpus.captions import (
    INSTRUMENTS,
    LANGUAGES,
    LOUDNESS,
    NOISE,
    SOUNDS,
    SPEAKERS,
    STYLES,
    Event,
    Facts,
    caption,
    parse,
    stated_duration,
    stated_rate,
)

TEMPOS = st.sampled_from([0.0, 1.0, 4 / 3, 5 / 3, 2.0, 2.5, 3.0])
RATES = st.sampled_from([0.0, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0])
EVENTS = st.one_of(
    st.builds(
        Event, st.sampled_from([*SPEAKERS]), st.sampled_from(LANGUAGES), st.sampled_from(["", "slowly", "quickly"])
    ),
    st.builds(Event, st.just("person"), st.sampled_from(LANGUAGES), st.just("whispered")),
    st.builds(Event, st.sampled_from([*INSTRUMENTS]), st.just(""), st.sampled_from([*STYLES]), TEMPOS),
    st.builds(Event, st.just("drums"), rate=TEMPOS),
    st.builds(Event, st.sampled_from([kind for kind in SOUNDS if kind != "drums"]), rate=RATES),
)
FACTS = st.builds(
    Facts,
    events=st.lists(EVENTS, min_size=1, max_size=3).map(tuple),
    duration_s=st.floats(0.5, 30),
    loudness=st.sampled_from([*LOUDNESS]),
    noise=st.sampled_from([*NOISE]),
    reverberant=st.booleans(),
    clipped=st.booleans(),
)


@given(FACTS)
def test_a_caption_parses_to_its_facts(facts: Facts) -> None:
    """All facts of a clip are parsed from its caption, numbers as stated."""
    stated = parse(caption(facts))
    assert stated is not None
    assert [(e.kind, e.language, e.manner) for e in stated.events] == [
        (e.kind, e.language, e.manner) for e in facts.events
    ]
    assert [e.rate for e in stated.events] == pytest.approx([stated_rate(e) for e in facts.events])
    assert stated.duration_s == stated_duration(facts.duration_s)
    assert (stated.loudness, stated.noise) == (facts.loudness, facts.noise)
    assert (stated.reverberant, stated.clipped) == (facts.reverberant, facts.clipped)


def test_a_caption_has_two_to_four_sentences() -> None:
    """The paragraph is short, like the examples in the API's manual."""
    facts = Facts((Event("hammering", rate=2.0), Event("man", "Mandarin Chinese", "quickly")), 6.2, loudness="loud")
    assert caption(facts) == (
        "The audio clip lasts about 6 seconds. It begins with metallic hammering at about 2 per second, and ends with "
        "a man speaking Mandarin Chinese quickly. The recording is loud, with no background noise. The room is dry."
    )


@pytest.mark.parametrize(
    "text", ["", "Rain.", "The audio clip lasts about 6 seconds. It holds music. The room is dry."]
)
def test_other_text_is_not_parsed(text: str) -> None:
    """Text outside the grammar has no facts."""
    assert parse(text) is None
