"""Rules of the fair queue, each with the order of service worked out by hand. An item takes as long as its cost."""

from __future__ import annotations

from serving.scheduling.fair_queue import SortedQueue, shortest_first
from tests.scheduling.test_fair_queue import Server, Work, tenant


def order(server: Server, items: int) -> str:
    """Serve this many items and return the names of their tenants."""
    return "".join(server.serve().scheduling_class.tenant for _ in range(items))


def test_a_short_clip_is_delayed_less() -> None:
    """The key is the arrival plus a part of the patience in proportion to the length."""
    assert shortest_first(10, 30, longest_s=60, patience_s=20) == 20.0
    assert shortest_first(10, 0, longest_s=60, patience_s=20) == 10.0


def test_a_sorted_queue_is_first_in_first_out_among_equal_keys() -> None:
    """Items are in the order of their keys, then of their arrival; what is removed is removed once."""
    queue: SortedQueue[str] = SortedQueue(len)
    for item in ("bb", "a", "cc", "d"):
        queue.add(item)
    assert ([*queue], len(queue)) == (["a", "d", "bb", "cc"], 4)
    assert queue.discard("bb") is True
    assert queue.discard("bb") is False
    assert queue.clear() == ["a", "d", "cc"]
    assert ([*queue], len(queue), queue.clear()) == ([], 0, [])


def test_a_new_tenant_starts_at_the_virtual_time() -> None:
    """A tenant that comes after two turns of another one has its turn next, and then alternates."""
    server, a, b = Server(), tenant("a"), tenant("b")
    for _ in range(4):
        server.add(a, 0.25)
    assert order(server, 2) == "aa"
    for _ in range(3):
        server.add(b, 0.25)
    assert order(server, 5) == "babab"


def test_an_empty_queue_forgets() -> None:
    """Service that a tenant has received while no item was left is not charged once it comes back."""
    server, a, b = Server(), tenant("a"), tenant("b")
    server.add(a, 10)
    assert order(server, 1) == "a"
    server.add(a, 1)
    server.add(b, 1)
    assert order(server, 2) == "ab"
    assert (len(server.queue), [*server.queue], [*server.queue.in_order()]) == (0, [], [])


def test_a_corrected_cost_counts_over_the_weight_and_once() -> None:
    """An item of cost 9, expected to cost 3, moves a tenant of weight 3 by 3; a second equal correction by nothing."""
    server, a, b = Server(), tenant("a", 3), tenant("b")
    for _ in range(5):
        server.add(a, 3)
        server.add(b, 1)
    first = server.serve()
    assert first.scheduling_class is a
    server.queue.correct_cost(first, 9)
    server.queue.correct_cost(first, 9)
    assert first.cost == 9
    assert order(server, 4) == "bbba"
    server.queue.correct_cost(Work(tenant("gone"), 1), 5)


def test_a_cost_below_the_estimate_is_given_back() -> None:
    """An item that cost 1, expected to cost 5, lets its tenant have the next but one turn."""
    server, a, b = Server(), tenant("a"), tenant("b")
    for _ in range(3):
        server.add(a, 5)
        server.add(b, 2)
    server.queue.correct_cost(server.serve(), 1)
    assert order(server, 3) == "bab"


def test_items_that_have_waited_too_long_take_turns_with_the_highest_priority() -> None:
    """Aged items are served like one tenant of weight 1; of two that start at the same time the earlier one is first.

    What aged items have received before the queue was empty is not charged to later ones.
    """
    server, low, high = Server(), tenant("l"), tenant("h", priority=1)
    for _ in range(2):
        began_s = server.now_s
        for _ in range(3):
            server.add(low, 0.5)
        server.now_s = began_s + 60
        for _ in range(4):
            server.add(high, 0.5)
        assert order(server, 7) == "lhlhlhh"


def test_an_item_is_aged_at_the_patience_and_not_before() -> None:
    """At 60 s an item of the lower priority is first, at 59 s it is last."""
    for now_s, expected in ((60, "lh"), (59, "hl")):
        server = Server()
        server.add(tenant("l"), 0.5)
        server.now_s = now_s
        server.add(tenant("h", priority=1), 0.5)
        assert order(server, 2) == expected


def test_aged_items_do_not_make_up_for_what_the_highest_priority_has_had() -> None:
    """Items that age while another tenant is served get every other turn from then on, not all turns."""
    server, low, high = Server(), tenant("l"), tenant("h", priority=1)
    for _ in range(70):
        server.add(high, 1)
    for _ in range(4):
        server.add(low, 1)
    assert order(server, 60) == "h" * 60
    assert order(server, 8) == "lhlhlhlh"


def test_a_tenant_that_comes_while_aged_items_are_served_starts_at_their_time() -> None:
    """A new tenant of the highest priority has no turn before those that have waited there."""
    server, low, high = Server(), tenant("l"), tenant("h", priority=1)
    for _ in range(3):
        server.add(low, 1)
    server.now_s = 60
    for _ in range(3):
        server.add(high, 1)
    assert order(server, 3) == "lhl"
    server.add(tenant("g", priority=1), 1)
    assert order(server, 4) == "hglh"


def test_an_item_that_is_served_early_is_no_aged_one() -> None:
    """An item of the lower priority that is served before its time, as nothing else fits, is not charged as aged."""
    server, low, high = Server(), tenant("l"), tenant("h", priority=1)
    early, _ = server.add(low, 5), server.add(low, 5)
    server.now_s = 1
    server.add(high, 5)
    server.queue.dequeue(early)
    server.now_s = 60
    server.add(high, 5)
    assert [item.scheduling_class.tenant for item in server.queue.in_order()][:2] == ["l", "h"]


def test_of_one_tenant_alone_the_key_decides() -> None:
    """Without another tenant items are in the order of the key, aged or not."""
    server, a = Server(), tenant("a")
    late, early = server.add(a, 1, key=2), server.add(a, 1, key=1)
    server.now_s = 100
    assert [*server.queue.in_order()] == [early, late]
    assert {*server.queue} == {early, late}


def test_aged_items_are_in_the_order_of_arrival() -> None:
    """Among aged items of several tenants the earlier one is first, whatever its key."""
    server = Server()
    first = server.add(tenant("x"), 1, key=5)
    server.now_s = 1
    second = server.add(tenant("y"), 1, key=0)
    server.now_s = 70
    server.add(tenant("h", priority=1), 1)
    assert [*server.queue.in_order()][:2] == [first, second]


def test_a_tenant_that_comes_back_with_another_priority_keeps_its_distance() -> None:
    """A tenant that is one turn ahead of its priority's time is one turn ahead in the new priority too."""
    server, other = Server(), tenant("u")
    for _ in range(12):
        server.add(tenant("t"), 1)
        server.add(other, 1)
    assert order(server, 20) == "tu" * 10
    for _ in range(4):
        server.add(tenant("h", priority=1), 1)
    server.add(tenant("t", priority=1), 1)
    assert order(server, 6) == "hththt"


def test_a_new_weight_counts_from_the_next_item() -> None:
    """The weight of a tenant is that of its latest item."""
    server, b = Server(), tenant("b")
    for _ in range(6):
        server.add(tenant("a"), 2)
    for _ in range(6):
        server.add(b, 2)
    server.add(tenant("a", 2), 2)
    assert order(server, 6) == "abaaba"


def test_what_is_not_queued_is_not_removed() -> None:
    """An unknown tenant's item and one that was removed are not queued; the count of queued items stays right."""
    server, a = Server(), tenant("a")
    first, second = server.add(a, 1), server.add(a, 1)
    assert server.queue.discard(Work(tenant("none"), 1)) is False
    assert server.queue.discard(first) is True
    assert server.queue.discard(first) is False
    assert (len(server.queue), [*server.queue]) == (1, [second])
    assert server.queue.clear() == [second]
    assert (len(server.queue), [*server.queue]) == (0, [])


def test_clearing_forgets() -> None:
    """After a clear no tenant is behind another one."""
    server, a, b = Server(), tenant("a"), tenant("b")
    server.add(a, 10)
    server.add(a, 10)
    assert order(server, 1) == "a"
    server.queue.clear()
    server.add(a, 1)
    server.add(b, 1)
    assert order(server, 2) == "ab"


def test_a_tenant_fills_eight_ninths_of_a_queue() -> None:
    """The table has at most 256 tenants and twice those that wait. A tenant that has had more than its share stays."""
    for weight, slots, most in ((1, 9, 8), (0.5, 10, 8), (0.125, 10, 5)):
        server = Server()
        fits = [server.queue.fits(server.add(tenant("a", weight), 1), slots) for _ in range(most + 1)]
        assert fits == [True] * most + [False]
    server = Server()
    for _ in range(8):
        server.add(tenant("a"), 1)
    assert server.queue.fits(server.add(tenant("b"), 1), 9)
    assert not server.queue.fits(server.add(tenant("c"), 1), 9)


def test_idle_tenants_are_forgotten_beyond_256_and_those_that_are_ahead_kept() -> None:
    """The table has 256 tenants and twice those that wait at most; a tenant that has had more than its share stays."""
    server = Server()
    for _ in range(400):
        server.add(tenant("always"), 1)
    server.add(tenant("ahead"), 1000)
    assert order(server, 2) == "always" + "ahead"
    most = 0
    for number in range(300):
        server.add(tenant(f"t{number}"), 1)
        server.serve()
        server.serve()
        most = max(most, len(server.queue._tenants))
    assert most == 258
    assert "ahead" in server.queue._tenants
    server.add(tenant("ahead"), 1)
    assert "ahead" not in order(server, 50)


def test_a_tenant_that_waits_is_not_forgotten() -> None:
    """Items of a lower priority are still queued after hundreds of tenants have come and gone."""
    server, low = Server(), tenant("low", priority=-1)
    first = server.add(low, 1)
    for number in range(600):
        server.add(tenant(f"t{number}"), 0.01)
        server.serve()
    second = server.add(low, 1)
    assert [*server.queue] == [first, second]
    assert order(server, 2) == "lowlow"
