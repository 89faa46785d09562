"""Fair queueing and shared capacity, exact in virtual time."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import count

import pytest

from serving.errors import Overloaded
from serving.scheduling.fair_queue import FairQueue
from serving.scheduling.shared_capacity import Permit, SharedCapacity
from serving.types import NO_TENANT, SchedulingClass

PATIENCE_S = 60.0


@dataclass(eq=False)
class Work:
    scheduling_class: SchedulingClass
    cost: float
    arrived_s: float = 0.0
    key: float = 0.0
    done_s: float | None = None


@dataclass
class Server:
    """A server of one item at a time from a queue, in virtual time; an item takes as long as its cost."""

    now_s: float = 0.0
    served: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.queue: FairQueue[Work] = FairQueue(lambda work: work.key, patience_s=PATIENCE_S, now_s=lambda: self.now_s)

    def add(self, scheduling_class: SchedulingClass, cost: float, *, key: float = 0.0) -> Work:
        """Enqueue an item that arrives now."""
        work = Work(scheduling_class, cost, self.now_s, key)
        self.queue.add(work)
        return work

    def serve(self) -> Work:
        """Serve the next item."""
        work = next(self.queue.in_order())
        self.queue.dequeue(work)
        self.now_s += work.cost
        self.served[work.scheduling_class.tenant] += round(work.cost)
        work.done_s = self.now_s
        return work


def tenant(name: str, weight: float = 1.0, priority: int = 0) -> SchedulingClass:
    """Return the scheduling class of a tenant."""
    return SchedulingClass(name, weight, priority)


@pytest.mark.parametrize(
    ("weights", "costs"), [((3, 1), (5, 5)), ((3, 1), (2, 60)), ((1, 1), (1, 40)), ((5, 2), (7, 3))]
)
def test_service_is_in_proportion_to_the_weights(weights: tuple[int, int], costs: tuple[int, int]) -> None:
    """Tenants are served in proportion to their weights, by cost and not by items, within one item of each."""
    server = Server()
    shares = [tenant(name, weight) for name, weight in zip("ab", weights, strict=True)]
    for scheduling_class, cost in zip(shares, costs, strict=True):
        for _ in range(3000):
            server.add(scheduling_class, cost)
    while server.now_s < 3000:
        server.serve()
    a, b = (server.served[scheduling_class.tenant] / scheduling_class.weight for scheduling_class in shares)
    assert abs(a - b) <= max(cost / weight for cost, weight in zip(costs, weights, strict=True)) + 1


def delays(flood: int) -> list[float]:
    """Return the delays of B, which uses a quarter of the server, next to `flood` items of A per second."""
    server, rng = Server(), random.Random(3)
    a, b, waited, arrivals = tenant("a"), tenant("b"), [], []
    for second in range(2000):
        arrivals += [(second + rng.random(), a, 0.5 / flood if flood == 1 else 0.5) for _ in range(flood)]
        arrivals += [(second + rng.random(), b, 0.25)]
    arrivals.sort(key=lambda arrival: arrival[0])
    pending = iter(arrivals)
    due = next(pending, None)
    while due is not None or len(server.queue):
        while due is not None and (due[0] <= server.now_s or not len(server.queue)):
            server.now_s = max(server.now_s, due[0])
            server.add(due[1], due[2])
            due = next(pending, None)
        if server.now_s > 2000:
            break
        work = server.serve()
        if work.scheduling_class is b and work.done_s is not None:
            waited.append(work.done_s - work.arrived_s)
    return sorted(waited)


def test_a_flood_does_not_delay_others() -> None:
    """B's 95th percentile delay under 20 times A's load is at most 1.25 times the normal one, plus one of A's items."""
    calm, flooded = delays(1), delays(20)
    at = int(0.95 * len(calm))
    assert len(flooded) == pytest.approx(len(calm), rel=0.01)
    assert flooded[at] <= 1.25 * calm[at] + 0.5


def test_idle_share_is_used_and_not_saved_up() -> None:
    """A alone gets all service; B gets its half as soon as it arrives, and no more for its idle time."""
    server, a, b = Server(), tenant("a"), tenant("b")
    for _ in range(100):
        server.add(a, 1)
    for _ in range(50):
        assert server.serve().scheduling_class is a
    for _ in range(100):
        server.add(b, 1)
    turns = Counter(server.serve().scheduling_class.tenant for _ in range(40))
    assert turns == {"a": 20, "b": 20}


def test_a_cost_above_the_estimate_is_charged_later() -> None:
    """A's items cost three times their estimate: B gets three turns for each of A's."""
    server, a, b = Server(), tenant("a"), tenant("b")
    for _ in range(400):
        server.add(a, 1)
        server.add(b, 1)
    turns: Counter[str] = Counter()
    for _ in range(200):
        work = server.serve()
        turns[work.scheduling_class.tenant] += 1
        if work.scheduling_class is a:
            server.queue.correct_cost(work, 3)
    assert turns["b"] == pytest.approx(3 * turns["a"], abs=4)


def test_a_higher_priority_goes_first_until_others_have_waited_too_long() -> None:
    """A low priority waits for a higher one, but no longer than the patience; then it is served in turns."""
    server, high, low = Server(), tenant("high", priority=1), tenant("low")
    waiting = [server.add(low, 1) for _ in range(5)]
    for _ in range(500):
        server.add(high, 1)
    order = [server.serve().scheduling_class.tenant for _ in range(59)]
    assert set(order) == {"high"}
    while any(work.done_s is None for work in waiting):
        server.serve()
    assert server.now_s <= PATIENCE_S + 2 * len(waiting) + 2


def test_within_a_tenant_the_key_orders() -> None:
    """A tenant's short items are served before its long ones, whatever other tenants have queued."""
    server, a, b = Server(), tenant("a"), tenant("b")
    long, short = server.add(a, 10, key=10), server.add(a, 1, key=1)
    other = server.add(b, 1)
    order = [server.serve() for _ in range(3)]
    assert order.index(short) < order.index(long)
    assert order.index(other) < 2


def test_the_table_of_tenants_is_bounded() -> None:
    """Few of ten thousand successive tenants are kept, without or with a tenant that always has items queued."""
    alone, shared = Server(), Server()
    for number in range(10_000):
        for server in (alone, shared):
            server.add(tenant(f"tenant-{number}"), 1)
        alone.serve()
        shared.add(tenant("always"), 1)
        if number:
            shared.serve()
            shared.serve()
    assert len(alone.queue._tenants) == 0
    assert len(shared.queue._tenants) < 1000


def test_nothing_is_lost_whatever_happens() -> None:
    """Under random arrivals, service and departures, every item is served once or has left."""
    server, rng = Server(), random.Random(5)
    shares = [tenant(f"t{number}", rng.choice([0.5, 1, 3]), rng.choice([0, 0, 1])) for number in range(6)]
    numbers, fate = count(), defaultdict[int, list[str]](list)
    waiting: dict[int, Work] = {}
    for _ in range(5000):
        match rng.random():
            case luck if luck < 0.5:
                number = next(numbers)
                waiting[number] = server.add(rng.choice(shares), rng.choice([1, 5, 30]), key=rng.random())
            case luck if luck < 0.6 and waiting:
                number = rng.choice(list(waiting))
                assert server.queue.discard(waiting.pop(number))
                fate[number].append("left")
            case _ if len(server.queue):
                served = server.serve()
                number = next(number for number, work in waiting.items() if work is served)
                del waiting[number]
                fate[number].append("served")
        assert (
            len(server.queue) == len(waiting) == len(list(server.queue)) == len(set(map(id, server.queue.in_order())))
        )
    assert all(len(ends) == 1 for ends in fate.values())


def acquired(capacity: SharedCapacity, whose: SchedulingClass, tries: int) -> list[Permit]:
    """Return permits for as many single units as the tenant gets."""
    permits, reasons = [], set()
    for _ in range(tries):
        try:
            permits.append(capacity.acquire(whose))
        except Overloaded as refused:
            reasons.add(refused.reason)
    assert reasons <= {"bodies"}
    return permits


def test_a_shared_capacity_keeps_units_for_tenants_that_come_later() -> None:
    """One tenant alone gets eight ninths; a second one still gets some, and together they cannot fill the capacity."""
    capacity, a, b = SharedCapacity(90, reason="bodies"), tenant("a"), tenant("b")
    of_a = acquired(capacity, a, 200)
    assert len(of_a) == 80
    of_b = acquired(capacity, b, 200)
    assert len(of_b) >= 8
    assert capacity.used <= 90
    for permit in of_a:
        permit.release()
        permit.release()
    assert capacity.used == len(of_b)
    assert len(of_b) + len(acquired(capacity, b, 200)) <= 81


def test_a_weight_counts_in_a_shared_capacity_too() -> None:
    """A weight multiplies the threshold: 3 allows 24 times the free units, 1/8 exactly the free units."""
    heavy, light = SharedCapacity(400, reason="bodies"), SharedCapacity(400, reason="bodies")
    assert len(acquired(heavy, tenant("a", 3), 400)) == 384
    assert len(acquired(light, tenant("a", 1 / 8), 400)) == 200


def test_work_without_a_tenant_may_fill_a_capacity() -> None:
    """Without keys there is no tenant to keep units for."""
    capacity = SharedCapacity(10, reason="bodies")
    assert len(acquired(capacity, NO_TENANT, 20)) == 10


def test_permits_grow_entirely_or_not_and_are_released_once() -> None:
    """An amount that does not fit is refused entirely; leaving releases all; keeping and recounting correct the sum."""
    capacity = SharedCapacity(100, reason="bodies", alpha=1.0)
    with capacity.permit(tenant("a")) as permit:
        permit.grow(40)
        with pytest.raises(Overloaded):
            permit.grow(61)
        assert (permit.amount, capacity.used, dict(capacity.used_by_tenant)) == (40, 40, {"a": 40})
        permit.count(70)
        assert capacity.used == 110
    assert (capacity.used, dict(capacity.used_by_tenant)) == (0, {})
    with capacity.permit(tenant("a")) as permit:
        permit.grow(30)
        permit.keep()
    assert capacity.used == 30
    capacity.recount({"a": 30}, {"a": 10, "b": 5})
    assert dict(capacity.used_by_tenant) == {"a": 10, "b": 5}
