"""Reading limits: the uses of both stores are exact, and reading changes nothing."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from serving.tenancy.limits.counter_store import Spent, Sums
from serving.tenancy.limits.memory import MemoryStore
from serving.tenancy.limits.redis import RedisStore
from serving.tenancy.limits.remaining import rows
from serving.types import FreeQuota, Limits
from tests.tenancy.limits_support import caller, charge, limiter

if TYPE_CHECKING:
    from serving.tenancy.limits.counter_store import CounterStore

SPENT = Spent(Sums(600, 7000, 80, 9_000_000_000), Sums(1, 2, 3, 4), free_tokens=300)


@pytest.fixture(params=["memory", "redis"])
def store(request: pytest.FixtureRequest) -> CounterStore:
    """An empty store of each kind."""
    return MemoryStore() if request.param == "memory" else RedisStore(request.getfixturevalue("redis_server").url)


async def test_reading_counts_nothing(store: CounterStore) -> None:
    """Every limit of tenant and key has a row, equal at each reading, also where a limit is used up or exceeded."""
    now_s = time.time()
    who = caller(
        Limits(
            requests_per_minute=9,
            tokens_per_minute=100,
            audio_seconds_per_minute=60,
            concurrent_requests=1,
            concurrent_audio_seconds=2,
            tokens_per_day=500,
            nanos_per_month=10_000_000_000,
        ),
        Limits(concurrent_requests=4, nanos_per_day=3),
        FreeQuota(1000, now_s + 3600),
    )
    async with limiter(store, SPENT) as limits:
        assert not await limits.uses(caller(), at_ms=0, currency="CNY")
        running = await limits.admit(
            replace(
                who,
                free_quota=None,
                tenant_limits=Limits(
                    requests_per_minute=9,
                    tokens_per_minute=1000,
                    audio_seconds_per_minute=60,
                    concurrent_requests=1,
                    concurrent_audio_seconds=2,
                ),
                key_limits=Limits(concurrent_requests=4),
            )
        )
        await charge(limits, running, audio_s=1.5, tokens=101)
        for _ in range(3):
            uses = await limits.uses(who, at_ms=round(1000 * now_s), currency="CNY")
            shown = [
                (row["scope"], row["limit"], row["max"], row["used"], row["remaining"], row["unit"])
                for row in rows(who, uses, "CNY", lambda _: 7)
            ]
            assert shown == [
                ("tenant", "requests_per_minute", 9, 1, 8, "requests"),
                ("tenant", "tokens_per_minute", 100, 101, 0, "tokens"),
                ("tenant", "audio_seconds_per_minute", 60, 1.5, 58.5, "seconds"),
                ("tenant", "concurrent_requests", 1, 1, 0, "requests"),
                ("tenant", "concurrent_audio_seconds", 2, 1.5, 0.5, "seconds"),
                ("tenant", "tokens_per_day", 500, 600, 0, "tokens"),
                ("tenant", "money_per_month", "10.00", "9.00", "1.00", "CNY"),
                ("tenant", "free_tokens", 1000, 300, 700, "tokens"),
                ("key", "concurrent_requests", 4, 1, 3, "requests"),
                ("key", "money_per_day", "0.000000003", "0.000000003", "0.00", "CNY"),
            ]
        await limits.settle(running, tokens=0, nanos=0)


async def test_the_end_of_a_quota(store: CounterStore) -> None:
    """A quota that has ended has no row, unless nothing else may be used; times are those of the caller's limits."""
    async with limiter(store, SPENT) as limits:
        ended = caller(quota=FreeQuota(1000, 1.0))
        assert not await limits.uses(ended, at_ms=2000, currency="CNY")
        only = caller(quota=FreeQuota(1000, 1.0, only=True))
        (row,) = rows(only, await limits.uses(only, at_ms=2000, currency="CNY"), "CNY", lambda _: 7)
        assert (row["max"], row["remaining"], row["ends_at"]) == (0, 0, "1970-01-01T00:00:01Z")
        monthly = caller(Limits(tokens_per_month=8000, requests_per_minute=5))
        found = rows(monthly, await limits.uses(monthly, at_ms=2000, currency="CNY"), "CNY", len)
        assert [row["resets_in_s"] for row in found] == [0, len("month")]
