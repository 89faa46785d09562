"""Sorted queue, its key that lets short clips go first, and the drain rate behind `Retry-After`."""

from __future__ import annotations

from functools import partial

from hypothesis import given
from hypothesis import strategies as st

from serving.scheduling.drain_rate import DrainRate
from serving.scheduling.fair_queue import SortedQueue, shortest_first

KEY = partial(shortest_first, longest_s=2400.0, patience_s=60.0)


@given(st.lists(st.tuples(st.floats(0, 1000), st.floats(0, 2400))), st.data())
def test_items_are_ordered_by_key_and_leave_at_once(clips: list[tuple[float, float]], data: st.DataObject) -> None:
    """After any removals the rest is in the order of keys, first in, first out among equal keys."""
    items = [object() for _ in clips]
    keys = dict(zip(items, clips, strict=True))
    queue: SortedQueue[object] = SortedQueue(lambda item: KEY(*keys[item]))
    for item in items:
        queue.add(item)
    gone = data.draw(st.sets(st.sampled_from(items))) if items else set()
    assert all(queue.discard(item) for item in gone)
    assert not any(queue.discard(item) for item in gone)
    assert list(queue) == sorted((item for item in items if item not in gone), key=lambda item: KEY(*keys[item]))
    assert len(queue) == len(items) - len(gone)


@given(st.floats(0, 1000), st.floats(0, 2400), st.floats(0, 1000), st.floats(0, 2400))
def test_nobody_is_overtaken_for_longer_than_the_patience(
    first_s: float, first_audio_s: float, second_s: float, second_audio_s: float
) -> None:
    """A clip that overtakes an earlier one is shorter, and arrived within the patience."""
    if second_s > first_s and KEY(second_s, second_audio_s) < KEY(first_s, first_audio_s):
        assert second_audio_s < first_audio_s
        assert second_s - first_s <= 60 * first_audio_s / 2400


def test_retry_after() -> None:
    """`Retry-After` is the backlog over the recent rate, and always between 1 s and a minute."""
    drain = DrainRate()
    assert drain.retry_after_s(100, 0) == 60
    for second in range(120):
        drain.add(20, second)
    assert 9 <= drain.retry_after_s(200, 120) <= 12
    assert drain.retry_after_s(1, 120) == drain.retry_after_s(0, 120) == 1
    assert drain.retry_after_s(20_000, 120) == 60
    assert drain.retry_after_s(200, 1000) == 60, "nothing has left the queue for a long time"
