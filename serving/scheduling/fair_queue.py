"""Queues in front of workers and engine: tenants share them by weight, and a tenant's short clips go first.

Start-time fair queueing (Goyal, Vin and Cheng, "Start-time fair queueing: a scheduling algorithm for integrated
services packet switching networks", IEEE/ACM Transactions on Networking 5(5), 1997).
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from serving.scheduling.shared_capacity import within_threshold

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from serving.types import SchedulingClass

T = TypeVar("T")

_MAX_IDLE_TENANTS = 256
"""Number of tenants without queued items above which their state is pruned."""


def shortest_first(arrived_s: float, audio_s: float, *, longest_s: float, patience_s: float) -> float:
    """Return the sort key of an order in which short clips precede long clips and none starves.

    The key is the time of arrival plus a delay in proportion to the clip's length: `patience_s` for a clip of
    `longest_s`. A clip is therefore overtaken only by shorter clips that arrive within that delay, however many arrive
    later. The key is constant, so one comparison orders two clips for good.
    """
    return arrived_s + patience_s * audio_s / longest_s


class SortedQueue(Generic[T]):
    """A queue in the order of keys, first in, first out among equal keys."""

    def __init__(self, key: Callable[[T], float]) -> None:
        self._key = key
        self._numbers = count()
        self._entries: list[tuple[float, int, T]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[T]:
        return (item for _, _, item in self._entries)

    def add(self, item: T) -> None:
        """Enqueue `item` in the order of its key."""
        bisect.insort(self._entries, (self._key(item), next(self._numbers), item))

    def discard(self, item: T) -> bool:
        """Remove `item` if it is queued; return whether it was."""
        for index, entry in enumerate(self._entries):
            if entry[2] is item:
                del self._entries[index]
                return True
        return False

    def clear(self) -> list[T]:
        """Remove and return all items."""
        items = list(self)
        self._entries.clear()
        return items


class QueueItem(Protocol):
    """An item of a `FairQueue`: its scheduling class, its cost in the queue's own unit (an estimate), its arrival."""

    scheduling_class: SchedulingClass
    cost: float
    arrived_s: float


Q = TypeVar("Q", bound=QueueItem)


@dataclass(eq=False, slots=True)
class _TenantQueue(Generic[Q]):
    """The queued items of one tenant, and the virtual start time of its next item."""

    items: SortedQueue[Q]
    weight: float
    priority: int
    start: float


class FairQueue(Generic[Q]):
    """A queue that serves tenants in proportion to their weights, by cost.

    Each tenant has a virtual start time, and the tenant with the least is served next. Serving an item advances its
    tenant's start time by cost over weight. A tenant that returns starts at the current virtual time: idle time is not
    saved up, and service received while no other tenant queued is not charged later. Among tenants that always have
    items queued, each gets its share within one item, whatever the others have queued. An empty queue resets all
    virtual times.

    Tenants of a higher priority are served before those of a lower one. Items that have waited for `patience_s` get the
    highest priority: together they are served like one tenant of weight 1, in order of arrival.

    Within a tenant the order is that of `key`.
    """

    def __init__(self, key: Callable[[Q], float], *, patience_s: float, now_s: Callable[[], float]) -> None:
        self._key = key
        self._patience_s = patience_s
        self._now_s = now_s
        self._tenants: dict[str, _TenantQueue[Q]] = {}
        self._waiting: dict[str, _TenantQueue[Q]] = {}
        self._count = 0
        self._virtual_time: defaultdict[int, float] = defaultdict(float)  # by priority
        self._aged_start = 0.0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Q]:
        """Iterate over all queued items, in no order."""
        return (item for tenant in self._waiting.values() for item in tenant.items)

    def add(self, item: Q) -> None:
        """Enqueue `item`."""
        its = item.scheduling_class
        if (tenant := self._tenants.get(its.tenant)) is None:
            self._prune_idle()
            tenant = _TenantQueue(SortedQueue(self._key), its.weight, its.priority, 0.0)
            self._tenants[its.tenant] = tenant
        if tenant.priority != its.priority:
            tenant.start += self._virtual_time[its.priority] - self._virtual_time[tenant.priority]
        tenant.weight, tenant.priority = its.weight, its.priority
        if not tenant.items:
            tenant.start = max(tenant.start, self._virtual_time[tenant.priority])
            self._waiting[its.tenant] = tenant
        tenant.items.add(item)
        self._count += 1

    def in_order(self) -> Iterator[Q]:
        """Yield queued items in the order of service; dequeuing the first that can be served keeps the queue fair.

        If a tenant's first item cannot be served, its next may be; if none can, the next tenant's.
        """
        if len(self._waiting) == 1:
            yield from next(iter(self._waiting.values())).items
            return
        highest = self._highest_priority()
        order: list[tuple[int, float, float, SortedQueue[Q] | list[Q]]] = [
            (-tenant.priority, tenant.start, next(iter(tenant.items)).arrived_s, tenant.items)
            for tenant in self._waiting.values()
        ]
        if aged := self._aged(highest):
            order.append((-highest, max(self._aged_start, self._virtual_time[highest]), aged[0].arrived_s, aged))
        for *_, items in sorted(order, key=lambda entry: entry[:3]):
            yield from items

    def dequeue(self, item: Q) -> None:
        """Remove `item` to be served, and charge its cost to its tenant."""
        tenant, highest = self._waiting[item.scheduling_class.tenant], self._highest_priority()
        if tenant.priority < highest and self._is_aged(item):
            self._aged_start = max(self._aged_start, self._virtual_time[highest])
            self._virtual_time[highest] = self._aged_start
            self._aged_start += item.cost
        self._virtual_time[tenant.priority] = max(self._virtual_time[tenant.priority], tenant.start)
        tenant.start += item.cost / tenant.weight
        self.discard(item)

    def correct_cost(self, item: Q, cost: float) -> None:
        """Replace the estimated cost of a dequeued item by its measured cost."""
        if tenant := self._tenants.get(item.scheduling_class.tenant):
            tenant.start += (cost - item.cost) / tenant.weight
        item.cost = cost

    def discard(self, item: Q) -> bool:
        """Remove `item` without serving it, if it is queued; return whether it was."""
        tenant = self._waiting.get(item.scheduling_class.tenant)
        if tenant is None or not tenant.items.discard(item):
            return False
        self._count -= 1
        if not tenant.items:
            del self._waiting[item.scheduling_class.tenant]
        if not self._count:
            self._reset()
        return True

    def clear(self) -> list[Q]:
        """Remove and return all items."""
        items = list(self)
        self._waiting.clear()
        self._count = 0
        self._reset()
        return items

    def fits(self, item: Q, size: int) -> bool:
        """Return whether a queued `item` may stay in a queue of `size` slots, shared like a `SharedCapacity`."""
        held = len(self._waiting[item.scheduling_class.tenant].items) - 1
        return within_threshold(item.scheduling_class, held, size - (self._count - 1))

    def _reset(self) -> None:
        self._tenants.clear()
        self._virtual_time.clear()
        self._aged_start = 0.0

    def _highest_priority(self) -> int:
        return max((tenant.priority for tenant in self._waiting.values()), default=0)

    def _is_aged(self, item: Q) -> bool:
        return item.arrived_s <= self._now_s() - self._patience_s

    def _aged(self, highest: int) -> list[Q]:
        """Return the items that have waited too long behind higher priorities, in order of arrival."""
        lower = (tenant for tenant in self._waiting.values() if tenant.priority < highest)
        aged = (item for tenant in lower for item in tenant.items if self._is_aged(item))
        return sorted(aged, key=lambda item: item.arrived_s)

    def _prune_idle(self) -> None:
        """Remove tenants whose state no longer matters, so that the table does not grow with every tenant ever seen."""
        if len(self._tenants) < 2 * len(self._waiting) + _MAX_IDLE_TENANTS:
            return
        for name, tenant in list(self._tenants.items()):
            if not tenant.items and tenant.start <= self._virtual_time[tenant.priority]:
                del self._tenants[name]
