"""Stop sequences of token ids, compared with a search in the full caption."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.vllm.stop_sequences import StopSequences
from serving.types import FinishReason

IDS = st.integers(0, 2)


def decode(ids: list[int]) -> str:
    """Return a letter per token."""
    return "".join("abc"[token_id] for token_id in ids)


@settings(deadline=None)  # a busy machine is no failure
@given(
    deltas=st.lists(st.lists(IDS, max_size=4), min_size=1, max_size=12),
    sequences=st.lists(st.lists(IDS, min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_all_text_before_the_first_sequence_is_returned(deltas: list[list[int]], sequences: list[list[int]]) -> None:
    """For any division of tokens into deltas, no part of the sequence is sent, and no text before it is lost."""
    stops = StopSequences(sequences, decode)
    sent, finish_reason = "", None
    for number, ids in enumerate(deltas, 1):
        last = FinishReason.LENGTH if number == len(deltas) else None
        text, finish_reason = stops.feed(decode(ids), ids, last)
        sent += text
        if finish_reason is not None:
            break

    full = decode([token_id for ids in deltas for token_id in ids])
    ends = [full.find(decode(s)) + len(s) for s in sequences if decode(s) in full]
    if not ends:
        assert (sent, finish_reason) == (full, FinishReason.LENGTH)
        return
    end = min(ends)
    begins = [end - len(s) for s in sequences if full[:end].endswith(decode(s))]
    assert sent in {full[:begin] for begin in begins}
    assert finish_reason is FinishReason.STOP


def test_a_sequence_may_be_part_of_the_caption() -> None:
    """With `include` the caption ends after the sequence, however its tokens are divided into deltas."""
    stops = StopSequences([[1, 2]], decode, include=True)
    assert stops.feed("ab", [0, 1], None) == ("", None)
    assert stops.feed("ca", [2, 0], None) == ("abc", FinishReason.STOP)


def test_nothing_stops_within_the_least_number_of_tokens() -> None:
    """A sequence that is complete within `min_tokens` tokens stays in the text; the next one stops."""
    stops = StopSequences([[1]], decode, min_tokens=2)
    assert stops.feed("aba", [0, 1, 0], None) == ("aba", None)
    assert stops.feed("cb", [2, 1], None) == ("c", FinishReason.STOP)
