"""Admission: authentication of a key, limits of a tenant, and fair queueing between many tenants.

pytest benchmarks/micro/test_admission.py --benchmark-sort=name
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import itertools
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.servers import Redis
from serving.config import Settings
from serving.scheduling.fair_queue import FairQueue, SortedQueue
from serving.tenancy.database import connect, migrate
from serving.tenancy.keys import Keyring
from serving.tenancy.limits.counter_store import Spent
from serving.tenancy.limits.limiter import Limiter
from serving.tenancy.limits.memory import MemoryStore
from serving.tenancy.limits.redis import RedisStore
from serving.tenancy.limits.spending import Amounts
from serving.types import Caller, Limits, SchedulingClass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LIMITS = Limits(requests_per_minute=10**9, tokens_per_minute=10**12)
AMOUNTS = Amounts(30_000, input_tokens=383, expected_output_tokens=450, max_output_tokens=32_768)
CALLER = Caller("acme", "k1", tenant_limits=LIMITS, key_limits=LIMITS)
KEY = "sk-0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    """URL of a fresh Redis."""
    with Redis() as server:
        yield server.url


@pytest.mark.parametrize("kind", ["memory", "redis"])
def test_limits(benchmark: Callable[..., Any], kind: str, request: pytest.FixtureRequest) -> None:
    """One request is admitted, charged and settled, under limits of its tenant and of its key."""
    numbers = itertools.count()

    async def spent(_: Caller, __: int, ___: str) -> Spent:
        return Spent()

    async def one(limiter: Limiter) -> None:
        next(numbers)
        reservation = await limiter.admit(CALLER)
        await limiter.charge(reservation, AMOUNTS)
        await limiter.settle(reservation, tokens=700, nanos=0)

    with asyncio.Runner() as runner:
        store = MemoryStore() if kind == "memory" else RedisStore(request.getfixturevalue("redis_url"))
        limiter = Limiter(store, spent)
        runner.run(limiter.start())
        benchmark(lambda: runner.run(one(limiter)))
        runner.run(limiter.stop())
    assert next(numbers) > 0


def test_limits_reference(benchmark: Callable[..., Any]) -> None:
    """A coroutine that does nothing is run; its time is no cost of the limits."""

    async def nothing() -> None:
        for _ in range(3):
            await asyncio.sleep(0)

    with asyncio.Runner() as runner:
        benchmark(lambda: runner.run(nothing()))


def test_key(benchmark: Callable[..., Any], tmp_path: Path) -> None:
    """The key of a header is resolved to its tenant."""
    database = connect(f"sqlite:///{tmp_path / 'keys.db'}")
    migrate(database)
    keyring = Keyring(Settings(api_keys=[KEY], data_dir=tmp_path), database)
    keyring.refresh()
    assert benchmark(keyring.authenticate, {"authorization": f"Bearer {KEY}"}).tenant_id == "default"


def test_key_reference(benchmark: Callable[..., Any]) -> None:
    """One keyed hash of the key is computed."""
    assert benchmark(lambda: hmac.digest(b"pepper", KEY.encode(), hashlib.sha256))


@dataclass(eq=False, slots=True)
class _Item:
    scheduling_class: SchedulingClass
    arrived_s: float
    cost: float = 100.0
    tags: list[float] = field(default_factory=list)


def _arrived(item: _Item) -> float:
    return item.arrived_s


@pytest.mark.parametrize("tenants", [1, 10, 1000])
def test_queue(benchmark: Callable[..., Any], tenants: int) -> None:
    """One item is enqueued and the next dequeued, while 1,000 items of this number of tenants wait."""
    queue = FairQueue(_arrived, patience_s=1e9, now_s=lambda: 0.0)
    numbers = itertools.count()
    classes = [SchedulingClass(f"tenant {number}") for number in range(tenants)]

    def enqueue() -> None:
        number = next(numbers)
        queue.add(_Item(classes[number % tenants], float(number)))

    def one() -> None:
        enqueue()
        queue.dequeue(next(queue.in_order()))

    for _ in range(1000):
        enqueue()
    benchmark(one)
    assert len(queue) == 1000


def test_queue_reference(benchmark: Callable[..., Any]) -> None:
    """The same happens in one queue for all tenants, without fairness."""
    queue: SortedQueue[_Item] = SortedQueue(_arrived)
    numbers = itertools.count()
    item = partial(_Item, SchedulingClass())

    def one() -> None:
        queue.add(item(float(next(numbers))))
        queue.discard(next(iter(queue)))

    for _ in range(1000):
        queue.add(item(float(next(numbers))))
    benchmark(one)
    assert len(queue) == 1000
