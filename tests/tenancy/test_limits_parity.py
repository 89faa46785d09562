"""Counters in memory and in Redis: the same steps get the same answers (deploy/adr/0008)."""

from __future__ import annotations

import asyncio
import random
import re
import uuid
from collections import Counter
from typing import TYPE_CHECKING, Any, Self

import pytest
import redis as redis_client
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import FreeTierExhausted, RateLimited
from serving.tenancy.limits import limiter as limiters
from serving.tenancy.limits.counter_store import Period, Reason, Reservation, Spent, Sums
from serving.tenancy.limits.limiter import Limiter
from serving.tenancy.limits.memory import MemoryStore
from serving.tenancy.limits.redis import RedisStore
from serving.tenancy.limits.redis_script import SCRIPT, Numbers
from serving.tenancy.limits.spending import Amounts
from serving.types import Caller, FreeQuota, Limits
from tests.tenancy.limits_support import unfree

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping, Sequence

    from benchmarks.servers import Redis
    from serving.tenancy.limits.counter_store import CounterStore

NOW_KEY = "test:now_s"
FAR_FUTURE = 4e9
CURRENCIES = ("CNY", "USD")

UNITS = {
    "requests_per_minute": (1, 40),
    "tokens_per_minute": (50, 20),
    "audio_seconds_per_minute": (5, 30),
    "concurrent_requests": (1, 10),
    "concurrent_audio_seconds": (5, 20),
    "tokens_per_day": (50, 40),
    "tokens_per_month": (50, 60),
    "nanos_per_day": (1, 40),
    "nanos_per_month": (1, 60),
}
"""Limits are multiples (up to the second number) of units, so that steps often reach them exactly."""


def random_limits(rng: random.Random) -> Limits:
    """Draw limits of which at most three are set."""
    names = rng.sample([*UNITS], rng.randint(0, 3))
    return Limits(**{name: UNITS[name][0] * rng.randint(1, UNITS[name][1]) for name in names})


def random_step(rng: random.Random) -> tuple[Any, ...]:
    """Draw a step: its name and its values."""
    match rng.choices(("admit", "charge", "settle", "wait", "next day"), (40, 35, 20, 8, 1))[0]:
        case "admit":
            return "admit", rng.randint(0, 1), rng.choice([0, 0, 0, 1]), rng.choice([0, 22])
        case "charge":
            output = rng.choice([0, 20, 50, 3000])
            expected = min(output, rng.choice([0, 30]))
            prices = rng.choice([(0, 0, 0), (5, 0, 0), (40, 1, 1), (33, 2, 1)])
            return "charge", 5000 * rng.randint(0, 4), rng.choice([50, 50, 100, 33]), expected, output, *prices
        case "settle":
            return "settle", rng.randint(0, 9), rng.choice([0, 50, 50, 100, 33, 171]), rng.randint(0, 5)
        case "wait":
            return "wait", rng.choice([1, 1, 1, 2, 30, 58, 59, 60, 61])
        case name:
            return (name,)


class World:
    """A day and a second that the test sets, for both stores."""

    def __init__(self, server: Redis) -> None:
        self._redis = redis_client.Redis.from_url(server.url)
        self.day = 0
        self.set_now_s(1_000_000)

    def set_now_s(self, now_s: int) -> None:
        self.now_s = now_s
        self._redis.set(NOW_KEY, now_s)

    def period(self, at_ms: int, currency: str = "") -> Period:
        """Return the period of a time, which is a number of days here."""
        return Period(f"day{at_ms}", f"month{at_ms // 2}", currency)

    def close(self) -> None:
        self._redis.close()


class Side:
    """A store and the ledger of what was settled in it."""

    def __init__(self, store: CounterStore, world: World) -> None:
        self.limiter = Limiter(store, self._spent)
        self.open: list[Reservation] = []
        self._world = world
        self._billed: Counter[tuple[str, str, str]] = Counter()

    async def __aenter__(self) -> Self:
        await self.limiter.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.limiter.stop()

    async def step(self, callers: Sequence[Caller], name: str, *values: int) -> Any:
        """Take a step, and return everything of it that a caller sees."""
        if name == "admit":
            who, currency, smallest = values
            admitting = self.limiter.admit(
                callers[who],
                at_ms=self._world.day,
                currency=CURRENCIES[currency],
                smallest=Amounts(input_tokens=smallest),
            )
            answer = await _answer(admitted := asyncio.ensure_future(admitting))
            if not admitted.exception():
                self.open.append(admitted.result())
            return answer
        if name == "charge":
            waiting = [reservation for reservation in self.open if not reservation.charged_s]
            if not waiting:
                return None
            charging = asyncio.ensure_future(self.limiter.charge(waiting[0], Amounts(*values)))
            answer = await _answer(charging)
            return answer, None if charging.exception() else charging.result(), waiting[0].headers
        if not self.open:
            return None
        number, *amounts = values
        reservation = self.open.pop(number % len(self.open))
        return await self._settle(reservation, *(amounts if reservation.charged_s else (0, 0)))

    async def _settle(self, reservation: Reservation, tokens: int, nanos: int) -> int:
        free_tokens = await self.limiter.settle(reservation, tokens=tokens, nanos=nanos)
        if isinstance(self.limiter.store, RedisStore) and (sending := self.limiter.store._sending):
            await sending  # a settlement does not wait for Redis, and the clock must not move before it
        day, month, currency = reservation.period
        for scope in (reservation.caller.tenant_id, reservation.caller.key_id):
            for period in (day, month):
                self._billed[scope, period, "tokens"] += tokens
                self._billed[scope, period, currency] += unfree(nanos, free_tokens, tokens)
        self._billed[reservation.caller.tenant_id, "", "free"] += free_tokens
        return free_tokens

    async def _spent(self, caller: Caller, at_ms: int, currency: str) -> Spent:
        day, month, _ = self._world.period(at_ms)
        tenant, key = (
            Sums(*(self._billed[scope, period, unit] for unit in ("tokens", currency) for period in (day, month)))
            for scope in (caller.tenant_id, caller.key_id)
        )
        return Spent(tenant, key, self._billed[caller.tenant_id, "", "free"])


async def _answer(step: Awaitable[Any]) -> tuple[str, Any, int, Mapping[str, str]]:
    try:
        result = await step
    except RateLimited as error:
        return type(error).__name__, error.limit, error.retry_after_s, error.headers
    except FreeTierExhausted as error:
        return type(error).__name__, "", 0, {}
    return "ok", "", 0, result.headers if isinstance(result, Reservation) else {}


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**64))
def test_memory_and_redis_give_the_same_answers(redis_server: Redis, seed: int) -> None:
    """Headers, refusals, times to retry and free tokens are equal, for two keys of a tenant and steps at random."""
    rng = random.Random(seed)
    quota = rng.choice([None, FreeQuota(50 * rng.randint(0, 40), FAR_FUTURE, only=rng.random() < 0.5)])
    tenant = random_limits(rng)

    async def main() -> None:
        name = uuid.uuid4().hex
        callers = [
            Caller(name, f"{name}-{number}", tenant_limits=tenant, key_limits=random_limits(rng), free_quota=quota)
            for number in range(2)
        ]
        async with Side(MemoryStore(lambda: world.now_s), world) as memory, Side(RedisStore(url), world) as redis:
            for step, *values in [random_step(rng) for _ in range(100)]:
                if step == "wait":
                    world.set_now_s(world.now_s + values[0])
                    continue
                if step == "next day":
                    world.day += 1
                    continue
                assert await memory.step(callers, step, *values) == await redis.step(callers, step, *values), step
            assert not redis.limiter.store.fallbacks

    url = redis_server.url
    world = World(redis_server)
    with pytest.MonkeyPatch.context() as patch:
        frozen = SCRIPT.replace("redis.call('TIME')[1]", f"redis.call('GET', '{NOW_KEY}')")
        assert frozen != SCRIPT
        patch.setattr("serving.tenancy.limits.redis.SCRIPT", frozen)
        patch.setattr(limiters, "_period", world.period)
        patch.setattr(limiters, "until_next", lambda *, month: 30 + month)
        asyncio.run(main())
    world.close()


def test_the_script_has_python_s_constants() -> None:
    """Window, burst, reasons and the order of fields in the script are those of Python; the marker is gone."""
    assert "@constants" not in SCRIPT
    assert "local WINDOW_S, BURST_S, UNSET = 61, 2, -1\n" in SCRIPT
    [reasons] = re.findall(r"local Reason = \{(.*)\}", SCRIPT)
    assert reasons.split(", ") == [f"{reason.name} = {int(reason)}" for reason in Reason]
    assert set(re.findall(r"Reason\.(\w+)", SCRIPT)) | {"NONE"} == {reason.name for reason in Reason}
    assert set(re.findall(r"given\.(\w+)", SCRIPT)) == {
        *("step", "holder", "day", "month", "currency"),
        *Numbers._fields,
    }
