"""What waits, in order, and when to come again."""

from __future__ import annotations

from functools import partial

from hypothesis import given
from hypothesis import strategies as st

from serving.scheduling.drain_rate import DrainRate
from serving.scheduling.fair_queue import SortedQueue, shortest_first

KEY = partial(shortest_first, longest_s=2400.0, patience_s=60.0)


@given(st.lists(st.tuples(st.floats(0, 1000), st.floats(0, 2400))), st.data())
def test_the_order_is_the_keys_and_leaving_is_at_once(clips: list[tuple[float, float]], data: st.DataObject) -> None:
    """Whoever is taken out, the rest stays in the order of its keys, first in, first out among equals."""
    items = [object() for _ in clips]
    keys = dict(zip(items, clips, strict=True))
    line: SortedQueue[object] = SortedQueue(lambda item: KEY(*keys[item]))
    for item in items:
        line.add(item)
    gone = data.draw(st.sets(st.sampled_from(items))) if items else set()
    assert all(line.discard(item) for item in gone)
    assert not any(line.discard(item) for item in gone)
    assert list(line) == sorted((item for item in items if item not in gone), key=lambda item: KEY(*keys[item]))
    assert len(line) == len(items) - len(gone)


@given(st.floats(0, 1000), st.floats(0, 2400), st.floats(0, 1000), st.floats(0, 2400))
def test_nobody_is_overtaken_for_longer_than_the_patience(
    first_s: float, first_audio_s: float, second_s: float, second_audio_s: float
) -> None:
    """Who goes first though it came later is shorter, and came within the patience."""
    if second_s > first_s and KEY(second_s, second_audio_s) < KEY(first_s, first_audio_s):
        assert second_audio_s < first_audio_s
        assert second_s - first_s <= 60 * first_audio_s / 2400


def test_when_to_come_again() -> None:
    """What waits, divided by how fast it has gone of late; and between 1 s and a minute whatever comes."""
    drain = DrainRate()
    assert drain.retry_after_s(100, 0) == 60
    for second in range(120):
        drain.add(20, second)
    assert 9 <= drain.retry_after_s(200, 120) <= 12
    assert drain.retry_after_s(1, 120) == drain.retry_after_s(0, 120) == 1
    assert drain.retry_after_s(20_000, 120) == 60
    assert drain.retry_after_s(200, 1000) == 60, "nothing has gone for long"
