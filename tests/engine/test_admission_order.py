"""The order of admission between tenants and sizes: counted turns, in simulated time."""

from __future__ import annotations

import asyncio
from collections import Counter

from serving.types import SchedulingClass
from tests.engine.simulated import admission, assert_empty, run, simulate


def test_a_clip_that_waits_for_context_is_not_passed_by_smaller_ones() -> None:
    """Two clips fill the cache and small ones come without end: the large one is next once they may not overtake it.

    A large clip of 60 s is overtaken by clips that arrive within 1.5 s, so by three of those that come every 0.4 s.
    """

    async def main() -> None:
        async with admission(fake_kv_tokens=1000, fake_tokens=100, max_num_seqs=8) as (control, engine):
            tasks = [asyncio.create_task(run(control, "first", 5, max_tokens=100)) for _ in range(2)]
            await asyncio.sleep(0)
            tasks.append(asyncio.create_task(run(control, "large", 60, max_tokens=100)))
            for _ in range(50):
                tasks.append(asyncio.create_task(run(control, "small", 5, max_tokens=100)))
                await asyncio.sleep(0.4)
            assert "large" in engine.seen.order[2:8]
            await asyncio.gather(*tasks)
            assert_empty(control)

    simulate(main())


async def turns(of_a: SchedulingClass, of_b: SchedulingClass, **stops: tuple[str, ...]) -> str:
    """Return the order of 12 captions each of two tenants that wait before one slot and a further one."""
    async with admission(max_num_seqs=1, fake_tokens=400) as (control, engine):
        tasks = [asyncio.create_task(run(control, "-", 5)) for _ in range(2)]
        await asyncio.sleep(0)
        for _ in range(12):
            for name, whose in (("b", of_b), ("a", of_a)):
                stop = stops.get(name, ())
                tasks.append(asyncio.create_task(run(control, name, 5, whose, stop=stop)))
        await asyncio.gather(*tasks)
        assert_empty(control)
        return "".join(engine.seen.order[2:])


def test_captions_of_tenants_alternate_by_weight() -> None:
    """A tenant of weight 3 has three turns for each of another tenant's; with equal weights they alternate."""

    async def main() -> None:
        order = await turns(SchedulingClass("a", 3), SchedulingClass("b", 1))
        assert abs(Counter(order[:8])["a"] - 6) <= 1
        assert abs(Counter(order[:16])["a"] - 12) <= 1
        order = await turns(SchedulingClass("a", 1), SchedulingClass("b", 1))
        assert all(abs(Counter(order[:captions])["a"] - captions / 2) <= 1 for captions in (2, 4, 8, 16, 24))

    simulate(main())


def test_output_that_is_not_written_is_given_back() -> None:
    """A tenant whose captions end after two tokens has more turns than one whose captions have 400.

    Two tokens cost 89 with the input and 400 cost 1,681, so a fair order has all of the first tenant's captions among
    the first 14.
    """

    async def main() -> None:
        order = await turns(SchedulingClass("a"), SchedulingClass("b"), a=("clip",))
        assert Counter(order[:14])["a"] >= 11

    simulate(main())
