"""Limits in Redis: shared by processes, lost and found, and released after a process was killed."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

from serving.errors import ConcurrencyLimited
from serving.tenancy.limits.counter_store import Reservation, Spent, Sums
from serving.tenancy.limits.limiter import Limiter
from serving.tenancy.limits.redis import RedisStore
from serving.types import FreeQuota, Limits
from tests.tenancy.limits_support import caller, charge, limiter

if TYPE_CHECKING:
    from benchmarks.servers import Redis
    from serving.types import Caller


def _hammer(url: str, who: Caller, hold: bool, results: Any) -> None:  # noqa: FBT001 - a process's argument
    async def main() -> None:
        async with limiter(RedisStore(url)) as limits:
            admitted = 0
            for _ in range(40):
                answers = await asyncio.gather(*(limits.admit(who) for _ in range(5)), return_exceptions=True)
                admitted += sum(isinstance(answer, Reservation) for answer in answers)
            results.put((os.getpid(), admitted))
            if hold:
                await asyncio.sleep(600)

    asyncio.run(main())


def _spawn(url: str, who: Caller, *, hold: bool, count: int) -> tuple[list[Any], list[int]]:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_hammer, args=(url, who, hold, results)) for _ in range(count)]
    for process in processes:
        process.start()
    return processes, [results.get(timeout=120)[1] for _ in processes]


def test_processes_that_share_redis_never_exceed_a_limit(redis_server: Redis) -> None:
    """Three processes send 600 requests for 50 slots: exactly 50 are admitted."""
    who = caller(Limits(requests_per_minute=6000, concurrent_requests=50))
    processes, admitted = _spawn(redis_server.url, who, hold=True, count=3)
    try:
        assert sum(admitted) == 50
    finally:
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
            process.join()


async def test_redis_that_is_lost_and_found(redis_server: Redis) -> None:
    """Without Redis limits hold per process; when it is back, empty, it gets reservations and sums of the ledger."""
    store = RedisStore(redis_server.url)
    async with limiter(store, Spent(Sums(tokens_per_day=100))) as limits:
        who = caller(Limits(concurrent_requests=3, tokens_per_day=1000))
        first = await limits.admit(who)
        redis_server.stop()
        try:
            second = await limits.admit(who)
            third = await limits.admit(who)
            assert (store.degraded, store.fallbacks > 0) == (True, True)
            with pytest.raises(ConcurrencyLimited):
                await limits.admit(who)
            await limits.settle(first, tokens=10, nanos=0)
        finally:
            redis_server.start()
        async with asyncio.timeout(60):
            while store.degraded:  # noqa: ASYNC110 - the store has no event for this
                await asyncio.sleep(0.1)
        await limits.admit(who)
        with pytest.raises(ConcurrencyLimited):
            await limits.admit(who)
        for reservation in (second, third):
            await limits.settle(reservation, tokens=0, nanos=0)
        await limits.admit(who)


async def test_reservations_of_a_killed_process_end(redis_server: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its slots are free when its key in Redis has expired; those of living processes stay in use."""
    monkeypatch.setattr("serving.tenancy.limits.redis._LIFE_S", 1)
    who = caller(Limits(concurrent_requests=2))
    async with limiter(RedisStore(redis_server.url)) as limits:
        dead = RedisStore(redis_server.url)
        await dead.start()
        assert dead._renewing
        dead._renewing.cancel()  # as if it were killed
        await Limiter(dead, limits._spent).admit(who)
        await limits.admit(who)
        with pytest.raises(ConcurrencyLimited):
            await limits.admit(who)
        async with asyncio.timeout(60):
            while True:
                await limits.store._renew()  # type: ignore[attr-defined]
                try:
                    await limits.admit(who)
                    break
                except ConcurrencyLimited:
                    await asyncio.sleep(0.2)
        with pytest.raises(ConcurrencyLimited):
            await limits.admit(who)
        await dead._redis.aclose()


async def test_redis_lost_before_the_settlement_bills_no_quota(redis_server: Redis) -> None:
    """If the counters are lost, the quota that was left when the audio was known is free."""
    async with limiter(RedisStore(redis_server.url)) as limits:
        who = caller(quota=FreeQuota(1000, time.time() + 1000))
        reservation = await limits.admit(who)
        await charge(limits, reservation, tokens=100)
        redis_server.stop()
        try:
            assert await limits.settle(reservation, tokens=1200, nanos=0) == 1000
        finally:
            redis_server.start()
