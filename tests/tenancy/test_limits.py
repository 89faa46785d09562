"""Limits: never exceeded, and released at every end, with counters in memory and in Redis."""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import (
    AudioLimited,
    BudgetExhausted,
    BurstLimited,
    ConcurrencyLimited,
    FreeTierExhausted,
    RateLimited,
    RequestsLimited,
    TokensLimited,
)
from serving.tenancy.limits.counter_store import Spent, Sums
from serving.tenancy.limits.memory import MemoryStore
from serving.tenancy.limits.redis import RedisStore
from serving.types import Caller, FreeQuota, Limits
from tests.tenancy.limits_support import caller, charge, limiter

if TYPE_CHECKING:
    from serving.tenancy.limits.counter_store import CounterStore, Reservation


@pytest.fixture(params=["memory", "redis"])
def store(request: pytest.FixtureRequest) -> CounterStore:
    """An empty store of each kind."""
    return MemoryStore() if request.param == "memory" else RedisStore(request.getfixturevalue("redis_server").url)


async def test_requests_per_minute_of_tenant_and_key(store: CounterStore) -> None:
    """The tighter limit decides, a refused request counts nowhere, and the headers state what is left."""
    async with limiter(store) as limits:
        who = caller(Limits(requests_per_minute=9), Limits(requests_per_minute=3))
        reservations = [await limits.admit(who) for _ in range(3)]
        assert reservations[2].headers["x-ratelimit-limit-requests"] == "3"
        assert [reservation.headers["x-ratelimit-remaining-requests"] for reservation in reservations] == [
            "2",
            "1",
            "0",
        ]
        for _ in range(9):
            with pytest.raises(RequestsLimited) as refused:
                await limits.admit(who)
        assert refused.value.limit == "requests_per_minute"
        assert 58 <= refused.value.retry_after_s <= 60
        assert refused.value.headers["x-ratelimit-remaining-requests"] == "0"
        other = Caller(who.tenant_id, f"other{who.key_id}", tenant_limits=who.tenant_limits)
        assert (await limits.admit(other)).headers["x-ratelimit-remaining-requests"] == "5"


async def test_requests_at_once_are_a_burst(store: CounterStore) -> None:
    """Only a part of a minute's requests may come within a second."""
    async with limiter(store) as limits:
        who = caller(Limits(requests_per_minute=120))
        for _ in range(20):
            await limits.admit(who)
        with pytest.raises(BurstLimited):
            await asyncio.gather(*(limits.admit(who) for _ in range(41)))


@pytest.mark.parametrize("seen", [0, 1, 2])
async def test_idle_scopes_make_room_for_new_ones(monkeypatch: pytest.MonkeyPatch, seen: int) -> None:
    """When idle scopes make room for a caller's, scopes just made, with reservations, or seeded, stay."""
    monkeypatch.setattr("serving.tenancy.limits.memory._MAX_SCOPES", 3)
    store = MemoryStore()
    async with limiter(store) as limits:
        for _ in range(seen):
            await limits.admit(caller(Limits(concurrent_requests=1)))
        idle = await limits.admit(caller(Limits(concurrent_requests=1)))
        await limits.settle(idle, tokens=0, nanos=0)
        monkeypatch.setattr(store, "_now_s", lambda: time.time() + 100)
        who = caller(Limits(concurrent_requests=1, tokens_per_day=1000), Limits(tokens_per_day=1000))
        reservation = await limits.admit(who)
        with pytest.raises(ConcurrencyLimited):
            await limits.admit(who)
        await charge(limits, reservation)
        await limits.settle(reservation, tokens=100, nanos=0)
        await limits.settle(await limits.admit(who), tokens=0, nanos=0)
        if seen == 2:
            assert len(store._counters) == seen + 2, "the idle scope is dropped; tenant and key are new"


async def test_a_store_lost_during_its_seeding_is_seeded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store that replaces it lacks the first scope's sums; it is seeded again, and the request is admitted."""
    store = MemoryStore()
    seed, seeded = store.seed, []

    async def lose_once(scope: Any, *rest: Any) -> None:
        seeded.append(scope.name)
        if len(seeded) == 2:
            store._counters.clear()
        await seed(scope, *rest)

    monkeypatch.setattr(store, "seed", lose_once)
    async with limiter(store) as limits:
        await limits.admit(caller(Limits(tokens_per_day=1000), Limits(tokens_per_day=1000)))
    assert len(seeded) == 4


async def test_concurrent_requests_and_audio(store: CounterStore) -> None:
    """Running requests count until they are settled; a second settlement releases nothing."""
    async with limiter(store) as limits:
        who = caller(Limits(concurrent_requests=2, concurrent_audio_seconds=50))
        one, two = await limits.admit(who), await limits.admit(who)
        with pytest.raises(ConcurrencyLimited):
            await limits.admit(who)
        await charge(limits, one, audio_s=30)
        with pytest.raises(ConcurrencyLimited) as refused:
            await charge(limits, two, audio_s=21)
        assert refused.value.limit == "concurrent_audio_seconds"
        for _ in range(2):
            await limits.settle(one, tokens=0, nanos=0)
        await charge(limits, two, audio_s=50)
        await limits.admit(who)
        with pytest.raises(ConcurrencyLimited):
            await limits.admit(who)


async def test_tokens_and_audio_per_minute(store: CounterStore) -> None:
    """Tokens are reserved; those not used are released, and those used beyond the reservation count."""
    async with limiter(store) as limits:
        who = caller(Limits(tokens_per_minute=1000, audio_seconds_per_minute=60))
        one, two = await limits.admit(who), await limits.admit(who)
        await charge(limits, one, tokens=700, audio_s=40)
        with pytest.raises(TokensLimited):
            await charge(limits, two, tokens=301)
        with pytest.raises(AudioLimited):
            await charge(limits, two, tokens=300, audio_s=20.5)
        await limits.settle(one, tokens=100, nanos=0)
        await charge(limits, two, tokens=900, audio_s=20)
        assert two.headers["x-ratelimit-remaining-tokens"] == "0"
        assert two.headers["x-ratelimit-remaining-audio-seconds"] == "0"
        await limits.settle(two, tokens=950, nanos=0)
        with pytest.raises(TokensLimited):
            await charge(limits, await limits.admit(who), tokens=1)


@pytest.mark.parametrize("budget", ["tokens_per_day", "tokens_per_month", "nanos_per_day", "nanos_per_month"])
async def test_budgets_include_what_was_spent_before(store: CounterStore, budget: str) -> None:
    """Sums of the ledger, reservations and bills count; a used-up budget refuses until the next period."""
    async with limiter(store, Spent(Sums(**{budget: 500}))) as limits:
        who = caller(Limits(**{budget: 1000}))
        one, two = await limits.admit(who), await limits.admit(who)
        await charge(limits, one, tokens=400, nanos=400)
        with pytest.raises(BudgetExhausted) as refused:
            await charge(limits, two, tokens=101, nanos=101)
        assert refused.value.limit == budget
        await limits.settle(one, tokens=300, nanos=300)
        await charge(limits, two, tokens=200, nanos=200)
        await limits.settle(two, tokens=200, nanos=200)
        with pytest.raises(BudgetExhausted):
            await charge(limits, await limits.admit(who), tokens=1, nanos=1)


async def test_the_free_quota(store: CounterStore) -> None:
    """Tokens are free while quota is left; with "free tier only" nothing is admitted after it."""
    later = time.time() + 1000
    async with limiter(store, Spent(free_tokens=700)) as limits:
        who = caller(quota=FreeQuota(1000, later))
        one, two = await limits.admit(who), await limits.admit(who)
        await charge(limits, one, tokens=250)
        await charge(limits, two, tokens=250)
        assert (await limits.settle(one, tokens=200, nanos=0), await limits.settle(two, tokens=250, nanos=0)) == (
            200,
            100,
        )
        third = await limits.admit(who)
        await charge(limits, third, tokens=100)
        assert await limits.settle(third, tokens=100, nanos=0) == 0
        only = caller(quota=FreeQuota(1000, later, only=True))
        last = await limits.admit(only)
        await charge(limits, last, tokens=400)
        with pytest.raises(FreeTierExhausted):
            await limits.admit(only)
        assert await limits.settle(last, tokens=400, nanos=0) == 400
        with pytest.raises(FreeTierExhausted):
            await limits.admit(only)
        with pytest.raises(FreeTierExhausted):
            await limits.admit(caller(quota=FreeQuota(1000, time.time() - 1, only=True)))


async def test_longer_captions_than_expected_are_free_while_quota_is_left(store: CounterStore) -> None:
    """The expected length does not bound the free tokens: only the quota does, to the token."""
    async with limiter(store) as limits:
        who = caller(Limits(nanos_per_day=10**9), quota=FreeQuota(10_000, time.time() + 1000))
        free = []
        for tokens in (3000, 3000, 3000, 3000, 3000):
            reservation = await limits.admit(who)
            await charge(limits, reservation, tokens=471, nanos=471 * 12_700)
            free.append(await limits.settle(reservation, tokens=tokens, nanos=tokens * 12_700))
        assert free == [3000, 3000, 3000, 1000, 0]
        last = await limits.admit(who)
        with pytest.raises(BudgetExhausted):  # 5000 tokens were billed: 63,500,000 of 1,000,000,000 nanos
            await charge(limits, last, tokens=1, nanos=10**9 - 5000 * 12_700 + 1)
        await charge(limits, last, tokens=1, nanos=10**9 - 5000 * 12_700)


async def test_free_tier_only_is_never_billed(store: CounterStore) -> None:
    """The last admitted request may exceed the quota; all of it is free."""
    async with limiter(store) as limits:
        who = caller(quota=FreeQuota(1000, time.time() + 1000, only=True))
        reservation = await limits.admit(who)
        await charge(limits, reservation, tokens=500)
        assert await limits.settle(reservation, tokens=2500, nanos=2500) == 2500
        with pytest.raises(FreeTierExhausted):
            await limits.admit(who)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3000), st.lists(st.tuples(st.integers(1, 500), st.integers(1, 900), st.booleans()), max_size=30))
def test_the_free_quota_is_used_to_the_token(quota: int, requests: list[tuple[int, int, bool]]) -> None:
    """Nothing is billed while quota is left, whatever is expected, written and running at the same time."""

    async def main() -> None:
        async with limiter(MemoryStore()) as limits:
            who = caller(quota=FreeQuota(quota, time.time() + 1000))
            open_: list[tuple[Reservation, int]] = []
            used = 0
            for expected, written, waits in requests:
                reservation = await limits.admit(who)
                await charge(limits, reservation, tokens=expected)
                open_.append((reservation, written))
                while open_ and not waits:
                    reservation, tokens = open_.pop()
                    free = await limits.settle(reservation, tokens=tokens, nanos=tokens)
                    assert free == min(tokens, quota - used)
                    used += free

    asyncio.run(main())


async def test_a_cancelled_step_is_released(store: CounterStore) -> None:
    """A request that is cancelled at any point leaves no reservation."""
    async with limiter(store) as limits:
        who = caller(Limits(concurrent_requests=50, concurrent_audio_seconds=500))

        async def one() -> None:
            reservation = await limits.admit(who)
            try:
                await charge(limits, reservation, audio_s=10)
                await asyncio.sleep(0.01)
            finally:
                await limits.settle(reservation, tokens=0, nanos=0)

        rng = random.Random(1)
        for _ in range(200):
            task = asyncio.create_task(one())
            await asyncio.sleep(rng.choice([0, 0, 0.0005, 0.003]))
            task.cancel()
            await asyncio.wait((task,))
            assert task.cancelled() or task.exception() is None
        await asyncio.sleep(0.2)
        reservations = [await limits.admit(who) for _ in range(5)]
        await charge(limits, reservations[0], audio_s=100)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_in_any_minute_no_more_than_the_limits(data: st.DataObject) -> None:
    """Any 60 s hold no more than the limits, and no reservation is left, whatever comes when."""

    async def main() -> None:
        clock = [1000.0]
        store = MemoryStore(lambda: clock[0])
        chosen = Limits(requests_per_minute=6, tokens_per_minute=100, concurrent_requests=3)
        who = caller(chosen)
        async with limiter(store) as limits:
            counted: list[tuple[float, int]] = []
            open_: list[Reservation] = []
            for wait_s, tokens, ends in data.draw(
                st.lists(st.tuples(st.floats(0, 40), st.integers(1, 60), st.booleans()), max_size=40)
            ):
                clock[0] += wait_s
                if ends and open_:
                    await limits.settle(open_.pop(0), tokens=0, nanos=0)
                try:
                    reservation = await limits.admit(who)
                except RateLimited:
                    continue
                open_.append(reservation)
                assert len(open_) <= 3
                counted.append((clock[0], 0))
                try:
                    await charge(limits, reservation, tokens=tokens)
                except TokensLimited:
                    continue
                await limits.settle(reservation, tokens=tokens, nanos=0)
                open_.remove(reservation)
                counted[-1] = (clock[0], tokens)
            for at_s, _ in counted:
                minute = [amount for when_s, amount in counted if at_s <= when_s < at_s + 60]
                assert len(minute) <= 6
                assert sum(minute) <= 100
            for reservation in open_:
                await limits.settle(reservation, tokens=0, nanos=0)
            clock[0] += 61
            for _ in range(3):
                await limits.admit(who)

    asyncio.run(main())
