"""What waits: in which order it goes, who finds room, and when to come again if there is none.

Before workers and engine alike. Flows (tenants, each with a weight) take turns; within a flow short clips go first.
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from serving.types import ANYONE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from serving.types import Share

T = TypeVar("T")

_GREED = 8
"""How much of a room one flow may have, against what it leaves free for the others."""

_IDLE_FLOWS = 256
"""So many flows may be remembered though they have nothing waiting, before they are looked through."""

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


class Turn(Protocol):
    """What waits for its turn: whose it is, what it takes (in the line's own unit; a guess will do), since when."""

    share: Share
    cost: float
    arrived_s: float


W = TypeVar("W", bound=Turn)


@dataclass(eq=False, slots=True)
class _Flow(Generic[W]):
    """What one flow has waiting, and the virtual time at which its next turn begins."""

    line: Line[W]
    weight: float
    priority: int
    begins: float


class FairLine(Generic[W]):
    """Flows take turns in proportion to their weights, by cost: start-time fair queueing.

    Each flow has a virtual time at which its next turn begins; the least goes first. A turn moves it on by the cost
    over the weight. A flow that comes anew begins where the others are: what it left idle before is not saved up, and
    what it took while nobody else wanted it is not held against it. So among flows that always have something waiting,
    each gets its share within one item, whatever the others have waiting. Once nothing waits all is forgotten: whoever
    had something waiting has got it.

    Flows of a higher priority go before those of a lower one. But what has waited for `patience_s` counts as of the
    highest: all of it together takes turns there like one flow of weight 1, in order of arrival.

    Within a flow the order is that of `key`.
    """

    def __init__(self, key: Callable[[W], float], *, patience_s: float, now_s: Callable[[], float]) -> None:
        self._key = key
        self._patience_s = patience_s
        self._now_s = now_s
        self._flows: dict[str, _Flow[W]] = {}
        self._waiting: dict[str, _Flow[W]] = {}
        self._count = 0
        self._at: defaultdict[int, float] = defaultdict(float)  # the virtual time of each priority
        self._aged_begin = 0.0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[W]:
        """All that waits, in no order."""
        return (item for flow in self._waiting.values() for item in flow.line)

    def add(self, item: W) -> None:
        """Let it wait."""
        share = item.share
        if (flow := self._flows.get(share.flow)) is None:
            self._forget_idle()
            flow = self._flows[share.flow] = _Flow(Line(self._key), share.weight, share.priority, 0.0)
        if flow.priority != share.priority:
            flow.begins += self._at[share.priority] - self._at[flow.priority]
        flow.weight, flow.priority = share.weight, share.priority
        if not flow.line:
            flow.begins = max(flow.begins, self._at[flow.priority])
            self._waiting[share.flow] = flow
        flow.line.add(item)
        self._count += 1

    def turns(self) -> Iterator[W]:
        """What waits, in the order in which it should go; who takes the first that can go keeps the order fair.

        If a flow's first cannot go, its next may; if none of its can, the next flow's.
        """
        if len(self._waiting) == 1:
            yield from next(iter(self._waiting.values())).line
            return
        highest = self._highest()
        order: list[tuple[int, float, float, Line[W] | list[W]]] = [
            (-flow.priority, flow.begins, next(iter(flow.line)).arrived_s, flow.line) for flow in self._waiting.values()
        ]
        if aged := self._aged(highest):
            order.append((-highest, max(self._aged_begin, self._at[highest]), aged[0].arrived_s, aged))
        for *_, line in sorted(order, key=lambda entry: entry[:3]):
            yield from line

    def take(self, item: W) -> None:
        """Its turn has come: it leaves the line, and its flow pays for it."""
        flow, highest = self._waiting[item.share.flow], self._highest()
        if flow.priority < highest and self._is_aged(item):
            self._aged_begin = max(self._aged_begin, self._at[highest])
            self._at[highest] = self._aged_begin
            self._aged_begin += item.cost
        self._at[flow.priority] = max(self._at[flow.priority], flow.begins)
        flow.begins += item.cost / flow.weight
        self.discard(item)

    def settle(self, item: W, cost: float) -> None:
        """One that was taken has cost so much."""
        if flow := self._flows.get(item.share.flow):
            flow.begins += (cost - item.cost) / flow.weight
        item.cost = cost

    def discard(self, item: W) -> bool:
        """Take it out without its turn, if it is in; whether it was."""
        flow = self._waiting.get(item.share.flow)
        if flow is None or not flow.line.discard(item):
            return False
        self._count -= 1
        if not flow.line:
            del self._waiting[item.share.flow]
        if not self._count:
            self._forget()
        return True

    def clear(self) -> list[W]:
        """Take everything out."""
        items = list(self)
        self._waiting.clear()
        self._count = 0
        self._forget()
        return items

    def fits(self, item: W, size: int) -> bool:
        """Whether it may wait, of so many at most: flows share them as they share a `Room`."""
        own = len(self._waiting[item.share.flow].line) - 1
        return _may_take(item.share, own, size - (self._count - 1))

    def _forget(self) -> None:
        self._flows.clear()
        self._at.clear()
        self._aged_begin = 0.0

    def _highest(self) -> int:
        return max((flow.priority for flow in self._waiting.values()), default=0)

    def _is_aged(self, item: W) -> bool:
        return item.arrived_s <= self._now_s() - self._patience_s

    def _aged(self, highest: int) -> list[W]:
        """What has waited too long behind higher priorities, in order of arrival."""
        lower = (flow for flow in self._waiting.values() if flow.priority < highest)
        aged = (item for flow in lower for item in flow.line if self._is_aged(item))
        return sorted(aged, key=lambda item: item.arrived_s)

    def _forget_idle(self) -> None:
        """Forget flows of which nothing is left to know: a line does not grow with everyone who ever came."""
        if len(self._flows) < 2 * len(self._waiting) + _IDLE_FLOWS:
            return
        for name, flow in list(self._flows.items()):
            if not flow.line and flow.begins <= self._at[flow.priority]:
                del self._flows[name]


class Room:
    """So many places, or bytes, that flows share: the more of them are free, the more one flow may have.

    A flow may take more as long as it has less than `greed` times its weight times what is free. So one flow alone
    gets eight ninths of a large room; who comes second finds the rest, and as places fall free each gets its share.
    Where they fall free in days rather than seconds, less greed leaves more.
    Work of nobody in particular may take all there is: without keys there is nobody else.
    """

    def __init__(self, size: int, greed: float = _GREED) -> None:
        self.taken = 0
        self._size = size
        self._greed = greed
        self._of: defaultdict[str, int] = defaultdict(int)

    def open_to(self, share: Share) -> bool:
        """Whether that flow may take more."""
        return _may_take(share, self._of.get(share.flow, 0), self._size - self.taken, self._greed)

    @property
    def by_flow(self) -> Mapping[str, int]:
        """What each flow has, now."""
        return dict(self._of)

    def take(self, share: Share, amount: int = 1) -> bool:
        """Take so much for that flow, if there is room for it; whether there was."""
        if amount > self._size - self.taken or not self.open_to(share):
            return False
        self.add(share, amount)
        return True

    def add(self, share: Share, amount: int) -> None:
        """Count what a flow has taken without asking, or has given back (negative)."""
        self.taken += amount
        self._of[share.flow] += amount
        if not self._of[share.flow]:
            del self._of[share.flow]


def _may_take(share: Share, own: int, free: int, greed: float = _GREED) -> bool:
    return free > 0 and (share.flow == ANYONE.flow or own < greed * share.weight * free)


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
