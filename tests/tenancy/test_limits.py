"""Limits: never over, everything given back, whichever store counts; and Redis lost, found and shared by processes."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import signal
import time
import uuid
from contextlib import asynccontextmanager
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
from serving.tenancy.limits.limiter import Lease, Limiter, Spent, Store, Sums
from serving.tenancy.limits.memory import MemoryStore
from serving.tenancy.limits.redis import RedisStore
from serving.types import Caller, FreeQuota, Limits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from benchmarks.servers import Redis


@pytest.fixture(params=["memory", "redis"])
def store(request: pytest.FixtureRequest) -> Store:
    """Each kind of store, empty."""
    return MemoryStore() if request.param == "memory" else RedisStore(request.getfixturevalue("redis_server").url)


@asynccontextmanager
async def limiter(store: Store, spent: Spent | None = None) -> AsyncIterator[Limiter]:
    """A limiter that is started."""

    async def told(caller: Caller) -> Spent:
        return spent or Spent()

    limits = Limiter(store, told)
    await limits.start()
    try:
        yield limits
    finally:
        await limits.stop()


def caller(limits: Limits | None = None, key: Limits | None = None, quota: FreeQuota | None = None) -> Caller:
    """A tenant that nobody has seen before."""
    name = uuid.uuid4().hex
    return Caller(name, f"k{name}", tenant_limits=limits or Limits(), key_limits=key or Limits(), free_quota=quota)


async def charge(lease: Lease, audio_s: float = 1, tokens: int = 100, nanos: int = 0) -> None:
    """Take so much."""
    await lease.charge(audio_s=audio_s, input_tokens=tokens, output_tokens=0, nanos=nanos)


async def test_requests_per_minute_of_tenant_and_key(store: Store) -> None:
    """The tighter of the two decides, nothing is counted for who is refused, and the headers tell what is left."""
    async with limiter(store) as limits:
        who = caller(Limits(requests_per_minute=9), Limits(requests_per_minute=3))
        leases = [await limits.admit(who, "r") for _ in range(3)]
        assert leases[2].headers["x-ratelimit-limit-requests"] == "3"
        assert [lease.headers["x-ratelimit-remaining-requests"] for lease in leases] == ["2", "1", "0"]
        for _ in range(9):
            with pytest.raises(RequestsLimited) as refused:
                await limits.admit(who, "r")
        assert refused.value.limit == "requests_per_minute"
        assert 58 <= refused.value.retry_after_s <= 60
        assert refused.value.headers["x-ratelimit-remaining-requests"] == "0"
        other = Caller(who.tenant_id, f"other{who.key_id}", tenant_limits=who.tenant_limits)
        assert (await limits.admit(other, "r")).headers["x-ratelimit-remaining-requests"] == "5"


async def test_all_at_once_is_a_burst(store: Store) -> None:
    """Of many requests per minute only a part may come within a second."""
    async with limiter(store) as limits:
        who = caller(Limits(requests_per_minute=120))
        for _ in range(20):
            await limits.admit(who, "r")
        with pytest.raises(BurstLimited):
            await asyncio.gather(*(limits.admit(who, "r") for _ in range(41)))


@pytest.mark.parametrize("seen", [0, 1, 2])
async def test_of_more_scopes_than_are_remembered_none_in_use_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, seen: int
) -> None:
    """Where idle scopes make room for a caller's, those just made, held, or told what was spent before, stay."""
    monkeypatch.setattr("serving.tenancy.limits.memory._SCOPES", 3)
    store = MemoryStore()
    async with limiter(store) as limits:
        for _ in range(seen):
            await limits.admit(caller(Limits(concurrent_requests=1)), "r")
        idle = await limits.admit(caller(Limits(concurrent_requests=1)), "r")
        await idle.settle(tokens=0, nanos=0)
        monkeypatch.setattr(store, "_now_s", lambda: time.time() + 100)
        who = caller(Limits(concurrent_requests=1, tokens_per_day=1000), Limits(tokens_per_day=1000))
        lease = await limits.admit(who, "r")
        with pytest.raises(ConcurrencyLimited):
            await limits.admit(who, "r")
        await charge(lease)
        await lease.settle(tokens=100, nanos=0)
        await (await limits.admit(who, "r")).settle(tokens=0, nanos=0)
        if seen == 2:
            assert len(store._counters) == seen + len("tk"), "the idle one is gone"


async def test_a_store_lost_while_it_is_told_what_was_spent_is_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that stands in for it knows nothing of the first scope; the request is let in even so."""
    store = MemoryStore()
    seed, told = store.seed, []

    async def lose_once(scope: Any, *rest: Any) -> None:
        told.append(scope.name)
        if len(told) == 2:
            store._counters.clear()
        await seed(scope, *rest)

    monkeypatch.setattr(store, "seed", lose_once)
    async with limiter(store) as limits:
        await limits.admit(caller(Limits(tokens_per_day=1000), Limits(tokens_per_day=1000)), "r")
    assert len(told) == 4


async def test_concurrent_requests_and_audio(store: Store) -> None:
    """What is under way counts until it is settled; settling twice gives back once."""
    async with limiter(store) as limits:
        who = caller(Limits(concurrent_requests=2, concurrent_audio_seconds=50))
        one, two = await limits.admit(who, "r"), await limits.admit(who, "r")
        with pytest.raises(ConcurrencyLimited):
            await limits.admit(who, "r")
        await charge(one, audio_s=30)
        with pytest.raises(ConcurrencyLimited) as refused:
            await charge(two, audio_s=21)
        assert refused.value.limit == "concurrent_audio_seconds"
        for _ in range(2):
            await one.settle(tokens=0, nanos=0)
        await charge(two, audio_s=50)
        await limits.admit(who, "r")
        with pytest.raises(ConcurrencyLimited):
            await limits.admit(who, "r")


async def test_tokens_and_audio_per_minute(store: Store) -> None:
    """Reserved at first; what was reserved and not used is given back, what was used beyond it counts."""
    async with limiter(store) as limits:
        who = caller(Limits(tokens_per_minute=1000, audio_seconds_per_minute=60))
        one, two = await limits.admit(who, "r"), await limits.admit(who, "r")
        await charge(one, tokens=700, audio_s=40)
        with pytest.raises(TokensLimited):
            await charge(two, tokens=301)
        with pytest.raises(AudioLimited):
            await charge(two, tokens=300, audio_s=20.5)
        await one.settle(tokens=100, nanos=0)
        await charge(two, tokens=900, audio_s=20)
        assert two.headers["x-ratelimit-remaining-tokens"] == "0"
        assert two.headers["x-ratelimit-remaining-audio-seconds"] == "0"
        await two.settle(tokens=950, nanos=0)
        with pytest.raises(TokensLimited):
            await charge(await limits.admit(who, "r"), tokens=1)


@pytest.mark.parametrize("budget", ["tokens_per_day", "tokens_per_month", "nanos_per_day", "nanos_per_month"])
async def test_budgets_know_what_was_spent_before(store: Store, budget: str) -> None:
    """What the ledger tells counts, so does what is reserved, and what is billed; then it is over until the next."""
    async with limiter(store, Spent(Sums(**{budget: 500}))) as limits:
        who = caller(Limits(**{budget: 1000}))
        one, two = await limits.admit(who, "r"), await limits.admit(who, "r")
        await charge(one, tokens=400, nanos=400)
        with pytest.raises(BudgetExhausted) as refused:
            await charge(two, tokens=101, nanos=101)
        assert refused.value.limit == budget
        await one.settle(tokens=300, nanos=300)
        await charge(two, tokens=200, nanos=200)
        await two.settle(tokens=200, nanos=200)
        with pytest.raises(BudgetExhausted):
            await charge(await limits.admit(who, "r"), tokens=1, nanos=1)


async def test_the_free_quota(store: Store) -> None:
    """Free is what is left of it; with "free tier only" nothing is let in after it."""
    later = time.time() + 1000
    async with limiter(store, Spent(free_tokens=700)) as limits:
        who = caller(quota=FreeQuota(1000, later))
        one, two = await limits.admit(who, "r"), await limits.admit(who, "r")
        await charge(one, tokens=250)
        await charge(two, tokens=250)
        assert (await one.settle(tokens=200, nanos=0), await two.settle(tokens=250, nanos=0)) == (200, 100)
        third = await limits.admit(who, "r")
        await charge(third, tokens=100)
        assert await third.settle(tokens=100, nanos=0) == 0
        only = caller(quota=FreeQuota(1000, later, only=True))
        last = await limits.admit(only, "r")
        await charge(last, tokens=400)
        with pytest.raises(FreeTierExhausted):
            await limits.admit(only, "r")
        assert await last.settle(tokens=400, nanos=0) == 400
        with pytest.raises(FreeTierExhausted):
            await limits.admit(only, "r")
        with pytest.raises(FreeTierExhausted):
            await limits.admit(caller(quota=FreeQuota(1000, time.time() - 1, only=True)), "r")


async def test_longer_captions_than_expected_are_free_while_quota_is_left(store: Store) -> None:
    """What was expected when the audio was known does not bound what is free: only the quota does, to the token."""
    async with limiter(store) as limits:
        who = caller(Limits(nanos_per_day=10**9), quota=FreeQuota(10_000, time.time() + 1000))
        free = []
        for tokens in (3000, 3000, 3000, 3000, 3000):
            lease = await limits.admit(who, "r")
            await charge(lease, tokens=471, nanos=471 * 12_700)
            free.append(await lease.settle(tokens=tokens, nanos=tokens * 12_700))
        assert free == [3000, 3000, 3000, 1000, 0]
        last = await limits.admit(who, "r")
        with pytest.raises(BudgetExhausted):  # 5000 tokens were billed: 63,500,000 of 1,000,000,000 nanos
            await charge(last, tokens=1, nanos=10**9 - 5000 * 12_700 + 1)
        await charge(last, tokens=1, nanos=10**9 - 5000 * 12_700)


async def test_free_tier_only_is_never_billed(store: Store) -> None:
    """The last request that is let in may write beyond the quota; all of it is free."""
    async with limiter(store) as limits:
        who = caller(quota=FreeQuota(1000, time.time() + 1000, only=True))
        lease = await limits.admit(who, "r")
        await charge(lease, tokens=500)
        assert await lease.settle(tokens=2500, nanos=2500) == 2500
        with pytest.raises(FreeTierExhausted):
            await limits.admit(who, "r")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3000), st.lists(st.tuples(st.integers(1, 500), st.integers(1, 900), st.booleans()), max_size=30))
def test_the_free_quota_is_used_to_the_token(quota: int, requests: list[tuple[int, int, bool]]) -> None:
    """Whatever is expected, written and under way at once: while quota is left nothing is billed."""

    async def main() -> None:
        async with limiter(MemoryStore()) as limits:
            who = caller(quota=FreeQuota(quota, time.time() + 1000))
            open_: list[tuple[Lease, int]] = []
            used = 0
            for expected, written, waits in requests:
                lease = await limits.admit(who, "r")
                await charge(lease, tokens=expected)
                open_.append((lease, written))
                while open_ and not waits:
                    lease, tokens = open_.pop()
                    free = await lease.settle(tokens=tokens, nanos=tokens)
                    assert free == min(tokens, quota - used)
                    used += free

    asyncio.run(main())


async def test_redis_lost_before_the_end_bills_nothing_of_the_quota(redis_server: Redis) -> None:
    """If nobody can count any more, what was left of the quota when the audio was known is free."""
    async with limiter(RedisStore(redis_server.url)) as limits:
        who = caller(quota=FreeQuota(1000, time.time() + 1000))
        lease = await limits.admit(who, "r")
        await charge(lease, tokens=100)
        redis_server.stop()
        try:
            assert await lease.settle(tokens=1200, nanos=0) == 1000
        finally:
            redis_server.start()


async def test_a_step_that_is_cancelled_is_given_back(store: Store) -> None:
    """Wherever a request is cut, nothing of it is held."""
    async with limiter(store) as limits:
        who = caller(Limits(concurrent_requests=50, concurrent_audio_seconds=500))

        async def one() -> None:
            lease = await limits.admit(who, "r")
            try:
                await charge(lease, audio_s=10)
                await asyncio.sleep(0.01)
            finally:
                await lease.settle(tokens=0, nanos=0)

        rng = random.Random(1)
        for _ in range(200):
            task = asyncio.create_task(one())
            await asyncio.sleep(rng.choice([0, 0, 0.0005, 0.003]))
            task.cancel()
            await asyncio.wait((task,))
            assert task.cancelled() or task.exception() is None
        await asyncio.sleep(0.2)
        leases = [await limits.admit(who, "r") for _ in range(5)]
        await charge(leases[0], audio_s=100)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_in_any_minute_no_more_than_the_limits(data: st.DataObject) -> None:
    """Whatever comes when: any 60 s hold no more than the limits, and in the end nothing is held."""

    async def main() -> None:
        clock = [1000.0]
        store = MemoryStore(lambda: clock[0])
        chosen = Limits(requests_per_minute=6, tokens_per_minute=100, concurrent_requests=3)
        who = caller(chosen)
        async with limiter(store) as limits:
            taken: list[tuple[float, int]] = []
            open_: list[Lease] = []
            for wait_s, tokens, ends in data.draw(
                st.lists(st.tuples(st.floats(0, 40), st.integers(1, 60), st.booleans()), max_size=40)
            ):
                clock[0] += wait_s
                if ends and open_:
                    await open_.pop(0).settle(tokens=0, nanos=0)
                try:
                    lease = await limits.admit(who, "r")
                except RateLimited:
                    continue
                open_.append(lease)
                assert len(open_) <= 3
                taken.append((clock[0], 0))
                try:
                    await charge(lease, tokens=tokens)
                except TokensLimited:
                    continue
                await lease.settle(tokens=tokens, nanos=0)
                open_.remove(lease)
                taken[-1] = (clock[0], tokens)
            for at_s, _ in taken:
                minute = [amount for when_s, amount in taken if at_s <= when_s < at_s + 60]
                assert len(minute) <= 6
                assert sum(minute) <= 100
            for lease in open_:
                await lease.settle(tokens=0, nanos=0)
            clock[0] += 61
            for _ in range(3):
                await limits.admit(who, "r")

    asyncio.run(main())


# ---- Redis


def _hammer(url: str, who: Caller, hold: bool, told: Any) -> None:  # noqa: FBT001 - a process's argument
    async def main() -> None:
        async with limiter(RedisStore(url)) as limits:
            let_in = 0
            for _ in range(40):
                answers = await asyncio.gather(*(limits.admit(who, "r") for _ in range(5)), return_exceptions=True)
                let_in += sum(isinstance(answer, Lease) for answer in answers)
            told.put((os.getpid(), let_in))
            if hold:
                await asyncio.sleep(600)

    asyncio.run(main())


def _spawn(url: str, who: Caller, *, hold: bool, count: int) -> tuple[list[Any], list[int]]:
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    processes = [context.Process(target=_hammer, args=(url, who, hold, told)) for _ in range(count)]
    for process in processes:
        process.start()
    return processes, [told.get(timeout=120)[1] for _ in processes]


def test_processes_that_share_redis_never_exceed_a_limit(redis_server: Redis) -> None:
    """Three processes at once ask 600 times for 50 places: exactly 50 are let in."""
    who = caller(Limits(requests_per_minute=6000, concurrent_requests=50))
    processes, let_in = _spawn(redis_server.url, who, hold=True, count=3)
    try:
        assert sum(let_in) == 50
    finally:
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
            process.join()


async def test_redis_that_is_lost_and_found(redis_server: Redis) -> None:
    """Without Redis limits hold here; when it is back, empty, it learns what is held and asks what was spent."""
    store = RedisStore(redis_server.url)
    async with limiter(store, Spent(Sums(tokens_per_day=100))) as limits:
        who = caller(Limits(concurrent_requests=3, tokens_per_day=1000))
        first = await limits.admit(who, "r")
        redis_server.stop()
        try:
            second = await limits.admit(who, "r")
            third = await limits.admit(who, "r")
            assert (store.degraded, store.fallbacks > 0) == (True, True)
            with pytest.raises(ConcurrencyLimited):
                await limits.admit(who, "r")
            await first.settle(tokens=10, nanos=0)
        finally:
            redis_server.start()
        async with asyncio.timeout(60):
            while store.degraded:  # noqa: ASYNC110 - the store has no event for a test alone
                await asyncio.sleep(0.1)
        await limits.admit(who, "r")
        with pytest.raises(ConcurrencyLimited):
            await limits.admit(who, "r")
        for lease in (second, third):
            await lease.settle(tokens=0, nanos=0)
        await limits.admit(who, "r")


async def test_what_a_killed_process_held_comes_back(redis_server: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its places are free when its life in Redis has ended; those of the living stay taken."""
    monkeypatch.setattr("serving.tenancy.limits.redis._LIFE_S", 1)
    who = caller(Limits(concurrent_requests=2))
    async with limiter(RedisStore(redis_server.url)) as limits:
        dead = RedisStore(redis_server.url)
        await dead.start()
        assert dead._living
        dead._living.cancel()  # as if it was killed
        await Limiter(dead, limits._spent).admit(who, "r")
        await limits.admit(who, "r")
        with pytest.raises(ConcurrencyLimited):
            await limits.admit(who, "r")
        async with asyncio.timeout(60):
            while True:
                await limits.store._say()  # type: ignore[attr-defined]
                try:
                    await limits.admit(who, "r")
                    break
                except ConcurrencyLimited:
                    await asyncio.sleep(0.2)
        with pytest.raises(ConcurrencyLimited):
            await limits.admit(who, "r")
        await dead._redis.aclose()
