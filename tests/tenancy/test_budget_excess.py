"""Budgets in tokens and in money are never exceeded: not by training, nor by parallel or long captions."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import BudgetExhausted, FreeTierExhausted
from serving.tenancy.limits.memory import MemoryStore
from serving.tenancy.limits.redis import RedisStore
from serving.tenancy.limits.spending import Amounts
from serving.types import Caller, FreeQuota, Limits
from tests.support.wire import COMPATIBLE, compatible_body, data_url, wav
from tests.tenancy.limits_support import caller, limiter, unfree
from tests.tenancy.test_usage_session import KEY, serving

if TYPE_CHECKING:
    from benchmarks.servers import Redis
    from serving.tenancy.limits.counter_store import CounterStore, Reservation

CLIP = data_url(wav(1))
PRICES = [(15_800, 12_700), (27_962, 22_458), (1, 3), (0, 7), (5, 0)]
ROUNDING_NANOS = 1
"""A tenant's bill is rounded up once: in the caption in which its free quota ends."""


@pytest.fixture(params=["memory", "redis"])
def store(request: pytest.FixtureRequest) -> CounterStore:
    """An empty store of each kind."""
    return MemoryStore() if request.param == "memory" else RedisStore(request.getfixturevalue("redis_server").url)


async def spend_at_random(store: CounterStore, seed: int) -> None:
    """Run captions of random arrivals, lengths and ends, and assert after each end that no budget is exceeded."""
    rng = random.Random(seed)
    price = rng.choice(PRICES)
    tokens_limit = rng.choice([None, rng.randint(0, 40_000)])
    nanos_limit = rng.choice([None, rng.randint(0, 40_000) * max(price)])
    key_nanos = rng.choice([None, rng.randint(0, 20_000) * max(price)])
    free = rng.choice([None, FreeQuota(rng.randint(1, 30_000), time.time() + 1000)])
    who = caller(
        Limits(tokens_per_day=tokens_limit, nanos_per_month=nanos_limit), Limits(nanos_per_day=key_nanos), quota=free
    )
    second = Caller(who.tenant_id, f"{who.key_id}-2", tenant_limits=who.tenant_limits, free_quota=free)
    billed_tokens = billed_nanos = key_billed = 0
    running: list[tuple[Reservation, int, int]] = []
    async with limiter(store) as limits:
        for _ in range(60):
            if running and rng.random() < 0.4:
                reservation, input_tokens, output_tokens = running.pop(rng.randrange(len(running)))
                paid = rng.random() < 0.8
                written = rng.choice([0, rng.randint(0, output_tokens), output_tokens]) if paid else 0
                tokens = input_tokens + written if paid else 0
                nanos = (input_tokens * price[0] + written * price[1]) if paid else 0
                free_tokens = await limits.settle(reservation, tokens=tokens, nanos=nanos)
                amount = unfree(nanos, free_tokens, tokens)
                billed_tokens += tokens
                billed_nanos += amount
                key_billed += amount if reservation.caller is who else 0
                assert tokens_limit is None or billed_tokens <= tokens_limit
                assert nanos_limit is None or billed_nanos <= nanos_limit + ROUNDING_NANOS
                assert key_nanos is None or key_billed <= key_nanos + ROUNDING_NANOS
                continue
            chosen = who if rng.random() < 0.6 else second
            input_tokens, asked = rng.choice([21, 383, 5000]), rng.choice([1, 10, 500, 32_768])
            with contextlib.suppress(BudgetExhausted):
                reservation = await limits.admit(chosen)
                amounts = Amounts(
                    0,
                    input_tokens,
                    min(asked, rng.choice([1, 450])),
                    asked,
                    input_tokens * price[0],
                    price[1],
                    min(price),
                )
                try:
                    output_tokens = await limits.charge(reservation, amounts)
                except BudgetExhausted:
                    await limits.settle(reservation, tokens=0, nanos=0)
                    raise
                assert 1 <= output_tokens <= asked
                running.append((reservation, input_tokens, output_tokens))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**64))
def test_no_budget_is_exceeded_in_memory(seed: int) -> None:
    """Whatever comes when, and however it ends, what is billed stays within every budget of tenant and key."""
    asyncio.run(spend_at_random(MemoryStore(), seed))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**64))
def test_no_budget_is_exceeded_in_redis(redis_server: Redis, seed: int) -> None:
    """The same holds with counters in Redis."""
    asyncio.run(spend_at_random(RedisStore(redis_server.url), seed))


async def test_a_request_that_runs_alone_may_use_all_that_is_left(store: CounterStore) -> None:
    """A request with 21 input tokens may write 979 of 1,000 tokens; 52 of 1,000,000 nano-units."""
    async with limiter(store) as limits:
        amounts = Amounts(1000, 21, 450, 32_768, 21 * 15_800, 12_700, 12_700)
        reservation = await limits.admit(caller(Limits(tokens_per_day=1000)))
        assert await limits.charge(reservation, amounts) == 979
        reservation = await limits.admit(caller(Limits(nanos_per_day=1_000_000)))
        # 1,000,000 - 21 x 15,800 = 668,200; 668,200 / 12,700 = 52.6
        assert await limits.charge(reservation, amounts) == 52
        reservation = await limits.admit(caller(Limits(tokens_per_minute=10**6)))
        assert await limits.charge(reservation, amounts) == 32_768


async def test_requests_in_parallel_share_what_is_left(store: CounterStore) -> None:
    """With others running, a request may write an eighth of what is left, but not less than 2,048 tokens."""
    async with limiter(store) as limits:
        who = caller(Limits(tokens_per_day=40_000))
        one, two, three = [await limits.admit(who) for _ in range(3)]
        amounts = Amounts(1000, 100, 450, 32_768)
        # (40,000 - 100) / 8 = 4,987; then 40,000 - 5,087 - 100 = 34,813, of which an eighth is 4,351
        assert [await limits.charge(each, amounts) for each in (one, two)] == [4987, 4351]
        # 40,000 - 5,087 - 4,451 - 15,000 = 15,462; an eighth is less than 2,048
        assert await limits.charge(three, Amounts(1000, 15_000, 450, 32_768)) == 2048


async def test_what_running_requests_hold_is_refused_for_seconds(store: CounterStore) -> None:
    """A budget that is reserved, not used up, is tried again after 2 s; a used-up one in the next period."""
    async with limiter(store) as limits:
        who = caller(Limits(tokens_per_day=1000))
        smallest = Amounts(input_tokens=21)
        reservation = await limits.admit(who, smallest=smallest)
        await limits.charge(reservation, Amounts(1000, 21, 450, 32_768))
        with pytest.raises(BudgetExhausted) as held:
            await limits.admit(who, smallest=smallest)
        assert held.value.retry_after_s == 2
        await limits.settle(reservation, tokens=979, nanos=0)
        with pytest.raises(BudgetExhausted) as used_up:  # 21 tokens are left, and the smallest request takes 22
            await limits.admit(who, smallest=smallest)
        seconds = 86_400 - time.time() % 86_400
        assert seconds - 5 <= used_up.value.retry_after_s <= seconds + 5


async def test_free_tier_only_is_exceeded_by_one_caption_at_most(store: CounterStore) -> None:
    """Captions in parallel share the quota; only one that runs alone may exceed it."""
    async with limiter(store) as limits:
        who = caller(quota=FreeQuota(1000, time.time() + 1000, only=True))
        one, two = await limits.admit(who), await limits.admit(who)
        assert await limits.charge(one, Amounts(1000, 21, 450, 600)) == 600
        # 1,000 - 621 - 21 = 358
        assert await limits.charge(two, Amounts(1000, 21, 450, 600)) == 358
        with pytest.raises(FreeTierExhausted):
            await limits.admit(who)


async def test_free_tokens_do_not_use_up_a_money_budget(store: CounterStore) -> None:
    """A tenant with a money budget of 0 uses its free quota, of which it may write what is left."""
    async with limiter(store) as limits:
        who = caller(Limits(nanos_per_day=0), quota=FreeQuota(1000, time.time() + 1000))
        amounts = Amounts(1000, 21, 450, 32_768, 21 * 15_800, 12_700, 12_700)
        reservation = await limits.admit(who)
        assert await limits.charge(reservation, amounts) == 979
        assert await limits.settle(reservation, tokens=1000, nanos=21 * 15_800 + 979 * 12_700) == 1000
        with pytest.raises(BudgetExhausted):
            await limits.charge(await limits.admit(who), amounts)


@pytest.mark.parametrize("limits", [{"tokens_per_day": 20_000}, {"nanos_per_day": 254_000_000}])
def test_a_trained_tenant_does_not_exceed_its_budget(limits: dict[str, int]) -> None:
    """After 60 captions ended by the client's own stop, 200 long ones at once stay within the budget."""
    body = compatible_body(CLIP)
    with serving("--fake-tokens=3000", "--fake-tpot-s=0.0001", limits=limits) as (service, ledger):
        with httpx.Client(headers=KEY, timeout=60) as client:
            for _ in range(60):
                client.post(service.url + COMPATIBLE, json=compatible_body(CLIP, stop=[" "]))

        def one(_: int) -> httpx.Response:
            return httpx.post(service.url + COMPATIBLE, json=body, headers=KEY, timeout=60)

        answers: list[httpx.Response] = []
        with ThreadPoolExecutor(50) as pool:
            # A caption that runs alone holds all that is left, so that one round may end with more to spend.
            while not answers or 200 in {answer.status_code for answer in answers[-200:]}:
                answers += pool.map(one, range(200))
        records: list[Any] = ledger()
    assert {answer.status_code for answer in answers} == {200, 429}
    billed = [record for record in records if record.billed]
    assert sum(record.input_tokens + record.output_tokens for record in billed) <= limits.get("tokens_per_day", 10**9)
    assert sum(record.amount_nanos for record in billed) <= limits.get("nanos_per_day", 10**12)
    reasons = {record.finish_reason for record in billed if record.output_tokens > 1}
    assert "length" in reasons, "the budget has cut a caption"
