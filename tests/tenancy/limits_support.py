"""A limiter, callers and charges, for the tests of limits."""

from __future__ import annotations

import uuid
from contextlib import asynccontextmanager
from fractions import Fraction
from math import ceil
from typing import TYPE_CHECKING

from serving.tenancy.limits.counter_store import Reservation, Spent
from serving.tenancy.limits.limiter import Limiter
from serving.tenancy.limits.spending import Amounts
from serving.types import Caller, FreeQuota, Limits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from serving.tenancy.limits.counter_store import CounterStore


def unfree(nanos: int, free_tokens: int, tokens: int) -> int:
    """Return the price of the tokens that are not free, rounded up, by hand: not by the code under test."""
    return ceil(Fraction(nanos) * (tokens - free_tokens) / tokens) if tokens else 0


@asynccontextmanager
async def limiter(store: CounterStore, spent: Spent | None = None) -> AsyncIterator[Limiter]:
    """Run a limiter whose ledger has billed `spent` to every caller before."""

    async def read(_: Caller, __: int, ___: str) -> Spent:
        return spent or Spent()

    limits = Limiter(store, read)
    await limits.start()
    try:
        yield limits
    finally:
        await limits.stop()


def caller(limits: Limits | None = None, key: Limits | None = None, quota: FreeQuota | None = None) -> Caller:
    """Return a caller of a new tenant."""
    name = uuid.uuid4().hex
    return Caller(name, f"k{name}", tenant_limits=limits or Limits(), key_limits=key or Limits(), free_quota=quota)


async def charge(
    limits: Limiter, reservation: Reservation, audio_s: float = 1, tokens: int = 100, nanos: int = 0
) -> None:
    """Charge amounts that are known exactly, of which most tests name only one."""
    amounts = Amounts(round(1000 * audio_s), input_tokens=tokens, max_output_tokens=0, input_nanos=nanos)
    await limits.charge(reservation, amounts)
