"""Tenants take turns: exactly, in virtual time, and in front of an engine that is short."""

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
    """Serves one item at a time from a line, each as long as it costs, in a time of its own."""

    now_s: float = 0.0
    served: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.queue: FairQueue[Work] = FairQueue(lambda work: work.key, patience_s=PATIENCE_S, now_s=lambda: self.now_s)

    def add(self, scheduling_class: SchedulingClass, cost: float, *, key: float = 0.0) -> Work:
        """Something arrives."""
        work = Work(scheduling_class, cost, self.now_s, key)
        self.queue.add(work)
        return work

    def serve(self) -> Work:
        """Whose turn it is."""
        work = next(self.queue.in_order())
        self.queue.dequeue(work)
        self.now_s += work.cost
        self.served[work.scheduling_class.tenant] += round(work.cost)
        work.done_s = self.now_s
        return work


def flow(name: str, weight: float = 1.0, priority: int = 0) -> SchedulingClass:
    """Whose it is."""
    return SchedulingClass(name, weight, priority)


@pytest.mark.parametrize(
    ("weights", "costs"), [((3, 1), (5, 5)), ((3, 1), (2, 60)), ((1, 1), (1, 40)), ((5, 2), (7, 3))]
)
def test_what_is_served_is_in_proportion_to_the_weights(weights: tuple[int, int], costs: tuple[int, int]) -> None:
    """In cost, not in items: whatever the items cost, within one item of each."""
    server = Server()
    shares = [flow(name, weight) for name, weight in zip("ab", weights, strict=True)]
    for scheduling_class, cost in zip(shares, costs, strict=True):
        for _ in range(3000):
            server.add(scheduling_class, cost)
    while server.now_s < 3000:
        server.serve()
    a, b = (server.served[scheduling_class.tenant] / scheduling_class.weight for scheduling_class in shares)
    assert abs(a - b) <= max(cost / weight for cost, weight in zip(costs, weights, strict=True)) + 1


def delays(flood: int) -> list[float]:
    """How long each of B's items takes, which uses half of the server, beside so many of A's a second."""
    server, rng = Server(), random.Random(3)
    a, b, waited, arrivals = flow("a"), flow("b"), [], []
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
    """B's 95th percentile beside 20 times A's share is what it is beside A's share, and one of A's items."""
    calm, flooded = delays(1), delays(20)
    at = int(0.95 * len(calm))
    assert len(flooded) == pytest.approx(len(calm), rel=0.01)
    assert flooded[at] <= 1.25 * calm[at] + 0.5


def test_idle_share_is_used_and_not_saved_up() -> None:
    """Alone, A has everything; when B comes it has its half at once, and no more for having been away."""
    server, a, b = Server(), flow("a"), flow("b")
    for _ in range(100):
        server.add(a, 1)
    for _ in range(50):
        assert server.serve().scheduling_class is a
    for _ in range(100):
        server.add(b, 1)
    turns = Counter(server.serve().scheduling_class.tenant for _ in range(40))
    assert turns == {"a": 20, "b": 20}


def test_what_was_more_than_expected_is_paid_later() -> None:
    """A's items turn out to cost three times what was expected: B has three turns for each of A's."""
    server, a, b = Server(), flow("a"), flow("b")
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
    """A low one waits for all of the high ones, but no longer than the patience; then it has turns among them."""
    server, high, low = Server(), flow("high", priority=1), flow("low")
    waiting = [server.add(low, 1) for _ in range(5)]
    for _ in range(500):
        server.add(high, 1)
    order = [server.serve().scheduling_class.tenant for _ in range(59)]
    assert set(order) == {"high"}
    while any(work.done_s is None for work in waiting):
        server.serve()
    assert server.now_s <= PATIENCE_S + 2 * len(waiting) + 2


def test_within_a_flow_the_order_is_its_own() -> None:
    """Short ones of a tenant go before its long ones, whatever other tenants have."""
    server, a, b = Server(), flow("a"), flow("b")
    long, short = server.add(a, 10, key=10), server.add(a, 1, key=1)
    other = server.add(b, 1)
    order = [server.serve() for _ in range(3)]
    assert order.index(short) < order.index(long)
    assert order.index(other) < 2


def test_a_line_does_not_grow_with_everyone_who_ever_came() -> None:
    """Ten thousand tenants, one after the other, alone or beside one who is always there: only some are remembered."""
    alone, beside = Server(), Server()
    for number in range(10_000):
        for server in (alone, beside):
            server.add(flow(f"tenant-{number}"), 1)
        alone.serve()
        beside.add(flow("always"), 1)
        if number:
            beside.serve()
            beside.serve()
    assert len(alone.queue._tenants) == 0
    assert len(beside.queue._tenants) < 1000


def test_nothing_is_lost_whatever_happens() -> None:
    """Random arrivals, turns and departures: what came is served once, or has left."""
    server, rng = Server(), random.Random(5)
    shares = [flow(f"t{number}", rng.choice([0.5, 1, 3]), rng.choice([0, 0, 1])) for number in range(6)]
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


def acquired(capacity: SharedCapacity, tenant: SchedulingClass, tries: int) -> list[Permit]:
    """Permits for as many single units as the tenant gets."""
    permits, reasons = [], set()
    for _ in range(tries):
        try:
            permits.append(capacity.acquire(tenant))
        except Overloaded as refused:
            reasons.add(refused.reason)
    assert reasons <= {"bodies"}
    return permits


def test_a_shared_capacity_keeps_units_for_tenants_that_come_later() -> None:
    """One tenant alone gets eight ninths; a second one still finds some, and together they cannot fill it."""
    capacity, a, b = SharedCapacity(90, reason="bodies"), flow("a"), flow("b")
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
    """Three times the weight, three times the part of what is left."""
    heavy, light = SharedCapacity(400, reason="bodies"), SharedCapacity(400, reason="bodies")
    assert len(acquired(heavy, flow("a", 3), 400)) == 384
    assert len(acquired(light, flow("a", 1 / 8), 400)) == 200


def test_without_keys_there_is_nobody_to_keep_units_for() -> None:
    """Work of no tenant may fill a capacity."""
    capacity = SharedCapacity(10, reason="bodies")
    assert len(acquired(capacity, NO_TENANT, 20)) == 10


def test_permits_grow_are_released_once_and_refuse_whole() -> None:
    """What does not fit is refused whole; leaving the context releases all, keeping and recounting correct the sum."""
    capacity = SharedCapacity(100, reason="bodies", alpha=1.0)
    with capacity.permit(flow("a")) as permit:
        permit.grow(40)
        with pytest.raises(Overloaded):
            permit.grow(61)
        assert (permit.amount, capacity.used, dict(capacity.used_by_tenant)) == (40, 40, {"a": 40})
        permit.count(70)
        assert capacity.used == 110
    assert (capacity.used, dict(capacity.used_by_tenant)) == (0, {})
    with capacity.permit(flow("a")) as permit:
        permit.grow(30)
        permit.keep()
    assert capacity.used == 30
    capacity.recount({"a": 30}, {"a": 10, "b": 5})
    assert dict(capacity.used_by_tenant) == {"a": 10, "b": 5}
