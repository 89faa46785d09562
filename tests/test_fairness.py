"""Tenants take turns: exactly, in virtual time, and in front of an engine that is short."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import count

import pytest

from serving.scheduling.fair_queue import FairLine, Room
from serving.types import ANYONE, Share

PATIENCE_S = 60.0


@dataclass(eq=False)
class Work:
    share: Share
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
        self.line: FairLine[Work] = FairLine(lambda work: work.key, patience_s=PATIENCE_S, now_s=lambda: self.now_s)

    def add(self, share: Share, cost: float, *, key: float = 0.0) -> Work:
        """Something arrives."""
        work = Work(share, cost, self.now_s, key)
        self.line.add(work)
        return work

    def serve(self) -> Work:
        """Whose turn it is."""
        work = next(self.line.turns())
        self.line.take(work)
        self.now_s += work.cost
        self.served[work.share.flow] += round(work.cost)
        work.done_s = self.now_s
        return work


def flow(name: str, weight: float = 1.0, priority: int = 0) -> Share:
    """Whose it is."""
    return Share(name, weight, priority)


@pytest.mark.parametrize(
    ("weights", "costs"), [((3, 1), (5, 5)), ((3, 1), (2, 60)), ((1, 1), (1, 40)), ((5, 2), (7, 3))]
)
def test_what_is_served_is_in_proportion_to_the_weights(weights: tuple[int, int], costs: tuple[int, int]) -> None:
    """In cost, not in items: whatever the items cost, within one item of each."""
    server = Server()
    shares = [flow(name, weight) for name, weight in zip("ab", weights, strict=True)]
    for share, cost in zip(shares, costs, strict=True):
        for _ in range(3000):
            server.add(share, cost)
    while server.now_s < 3000:
        server.serve()
    a, b = (server.served[share.flow] / share.weight for share in shares)
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
    while due is not None or len(server.line):
        while due is not None and (due[0] <= server.now_s or not len(server.line)):
            server.now_s = max(server.now_s, due[0])
            server.add(due[1], due[2])
            due = next(pending, None)
        if server.now_s > 2000:
            break
        work = server.serve()
        if work.share is b and work.done_s is not None:
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
        assert server.serve().share is a
    for _ in range(100):
        server.add(b, 1)
    turns = Counter(server.serve().share.flow for _ in range(40))
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
        turns[work.share.flow] += 1
        if work.share is a:
            server.line.settle(work, 3)
    assert turns["b"] == pytest.approx(3 * turns["a"], abs=4)


def test_a_higher_priority_goes_first_until_others_have_waited_too_long() -> None:
    """A low one waits for all of the high ones, but no longer than the patience; then it has turns among them."""
    server, high, low = Server(), flow("high", priority=1), flow("low")
    waiting = [server.add(low, 1) for _ in range(5)]
    for _ in range(500):
        server.add(high, 1)
    order = [server.serve().share.flow for _ in range(59)]
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
    assert len(alone.line._flows) == 0
    assert len(beside.line._flows) < 1000


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
                assert server.line.discard(waiting.pop(number))
                fate[number].append("left")
            case _ if len(server.line):
                served = server.serve()
                number = next(number for number, work in waiting.items() if work is served)
                del waiting[number]
                fate[number].append("served")
        assert len(server.line) == len(waiting) == len(list(server.line)) == len(set(map(id, server.line.turns())))
    assert all(len(ends) == 1 for ends in fate.values())


def test_a_room_keeps_places_for_those_who_come_later() -> None:
    """One flow alone gets eight ninths; a second one still finds room, and together they cannot fill it."""
    room, a, b = Room(90), flow("a"), flow("b")
    assert sum(room.take(a) for _ in range(200)) == 80
    assert sum(room.take(b) for _ in range(200)) >= 8
    assert room.taken <= 90
    for _ in range(80):
        room.add(a, -1)
    assert sum(room.take(b) for _ in range(200)) + 8 <= 81


def test_a_weight_counts_in_a_room_too() -> None:
    """Three times the weight, three times the part of what is left."""
    heavy, light = Room(400), Room(400)
    of_heavy = sum(heavy.take(flow("a", 3)) for _ in range(400))
    of_light = sum(light.take(flow("a", 1 / 8)) for _ in range(400))
    assert of_heavy == 384
    assert of_light == 200


def test_without_keys_there_is_nobody_to_keep_room_for() -> None:
    """Work of nobody in particular may fill a room."""
    room = Room(10)
    assert sum(room.take(ANYONE) for _ in range(20)) == 10
