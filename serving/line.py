"""What waits: in which order it goes, and when to come again if there is no room. Before workers and engine alike."""

from __future__ import annotations

import bisect
import math
from itertools import count
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

_DRAIN_WINDOW_S, _LEAST_WINDOW_S = 30.0, 5.0
"""The drain rate is a mean that forgets this fast, and never over less than the second."""

_MAX_RETRY_AFTER_S = 60
"""Clients honour no longer time (PROTOCOL 2.13)."""


def shortest_first(arrived_s: float, audio_s: float, *, longest_s: float, patience_s: float) -> float:
    """The key of an order in which short clips go before long ones, and nothing starves.

    It is the time of arrival, put off in proportion to the clip's length: by `patience_s` for one of `longest_s`. So a
    clip is overtaken only by shorter ones that arrive within that time after it, however many more of them come. The
    key does not change as time goes by, so one comparison orders two clips for good.
    """
    return arrived_s + patience_s * audio_s / longest_s


class Line(Generic[T]):
    """Items in the order of their keys, first in, first out among equals. Another key is another order."""

    def __init__(self, key: Callable[[T], float]) -> None:
        self._key = key
        self._numbers = count()
        self._entries: list[tuple[float, int, T]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[T]:
        return (item for _, _, item in self._entries)

    def add(self, item: T) -> None:
        """Put it where its key belongs."""
        bisect.insort(self._entries, (self._key(item), next(self._numbers), item))

    def discard(self, item: T) -> bool:
        """Take it out, if it is in; whether it was."""
        for index, entry in enumerate(self._entries):
            if entry[2] is item:
                del self._entries[index]
                return True
        return False

    def clear(self) -> list[T]:
        """Take everything out."""
        items = list(self)
        self._entries.clear()
        return items


class DrainRate:
    """How fast a line gets shorter, in audio-seconds per second, as its last half minute or so tells."""

    def __init__(self) -> None:
        self._began_s = math.inf
        self._at_s = self._audio_s = 0.0

    def add(self, audio_s: float, now_s: float) -> None:
        """So much audio has left the line."""
        self._forget(now_s)
        self._audio_s += audio_s

    def retry_after_s(self, backlog_s: float, now_s: float) -> int:
        """Seconds until a backlog of that much audio is gone, as a client is told: 1 to 60."""
        self._forget(now_s)
        # Of the window only so much has been seen; what an empty engine takes at once, at first, tells little.
        seen_s = max(_LEAST_WINDOW_S, _DRAIN_WINDOW_S * -math.expm1((self._began_s - now_s) / _DRAIN_WINDOW_S))
        if backlog_s * seen_s >= _MAX_RETRY_AFTER_S * self._audio_s:
            return _MAX_RETRY_AFTER_S
        return max(1, math.ceil(backlog_s * seen_s / self._audio_s))

    def _forget(self, now_s: float) -> None:
        self._began_s = min(self._began_s, now_s)
        self._audio_s *= math.exp((self._at_s - now_s) / _DRAIN_WINDOW_S)
        self._at_s = now_s
