"""The counters of limits: their steps, what the steps take and answer, and the constants of both implementations.

`MemoryStore` keeps the counters in this process, `RedisStore` in Redis for all replicas. Both implement one algorithm
(deploy/adr/0008). Constants that they share are defined here; `redis_script.py` puts them into the script.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping, Sequence

    from serving.tenancy.limits.spending import Amounts
    from serving.types import Caller, Limits

WINDOW_S = 61
"""Whole seconds, the current one included, that count as the last minute: any 60 s lie within 61 of them."""

BURST_S = 2
"""Whole seconds, the current one included, that count as "at once": any 1 s lies within 2 of them."""


BUDGETS = ("tokens_per_day", "tokens_per_month", "nanos_per_day", "nanos_per_month")
"""Limits of what is billed on a day and in a month: fields of `Limits` and of `Sums`, reasons in upper case."""


class Reason(enum.IntEnum):
    """The limit that refuses a step. The numbers are those of the script's answers."""

    NONE = 0
    CONCURRENT_REQUESTS = 1
    BURST = 2
    REQUESTS_PER_MINUTE = 3
    TOKENS_PER_DAY = 4
    TOKENS_PER_MONTH = 5
    NANOS_PER_DAY = 6
    NANOS_PER_MONTH = 7
    FREE_TIER = 8
    TOKENS_PER_MINUTE = 9
    AUDIO_SECONDS_PER_MINUTE = 10
    CONCURRENT_AUDIO_SECONDS = 11
    UNSEEDED = 12
    """The counters do not know what was billed before: `CounterStore.seed` them and repeat the step."""


class Period(NamedTuple):
    """Periods and currency of one bill: the day and the month (UTC) of its admission, and the currency of its price."""

    day: str = ""
    """As in `2026-11-28`."""
    month: str = ""
    """As in `2026-11`."""
    currency: str = ""


@dataclass(frozen=True, slots=True)
class Sums:
    """Tokens, and money in one currency, billed to requests that were admitted on one day and in its month (UTC)."""

    tokens_per_day: int = 0
    tokens_per_month: int = 0
    nanos_per_day: int = 0
    nanos_per_month: int = 0


@dataclass(frozen=True, slots=True)
class Spent:
    """The ledger's sums for a caller, read when the counters do not have them."""

    tenant: Sums = field(default_factory=Sums)
    key: Sums = field(default_factory=Sums)
    free_tokens: int = 0
    """Tokens of the tenant's free quota used so far."""


@dataclass(frozen=True, slots=True)
class Scope:
    """A tenant or a key, with its limits."""

    name: str
    limits: Limits
    burst: int
    """Requests allowed within `BURST_S`."""
    free_tokens: int | None = None
    """Free quota that has not expired."""
    only_free: bool = False
    """Requests are refused once the free quota is used up."""

    @property
    def has_budget(self) -> bool:
        """True if any limit needs the sums of what was billed."""
        return any(getattr(self.limits, name) is not None for name in BUDGETS)


@dataclass(slots=True, eq=False)
class Reservation:
    """Reserved amounts of one request in each scope, from its admission until it is settled; the store fills it."""

    caller: Caller
    scopes: Sequence[Scope]
    period: Period = field(default_factory=Period)
    """Fixed at the admission: a request that runs over midnight counts in the period in which it was admitted."""
    at_ms: int = 0
    """Time of the admission."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """`x-ratelimit-…` headers of the last step."""
    admitted: bool = False
    audio_ms: int = 0
    expected_tokens: int = 0
    """Input and expected output, counted in the limit of tokens per minute."""
    max_tokens: int = 0
    """Input and the most output that the request may write, reserved in budgets and the free quota."""
    max_nanos: int = 0
    """List price of `max_tokens`, reserved in budgets."""
    free_left: int = 0
    """Unused free tokens when the request was charged: the most that are free if the counters are lost."""
    charged_s: int = 0
    """Second, by the store's clock, in which the tokens were counted."""
    pending: asyncio.Future[Answer | None] | None = None
    """A step that has no answer yet."""

    def reserve(self, amounts: Amounts, output_tokens: int) -> None:
        """Fill in the amounts of a charged request that may write `output_tokens`."""
        self.audio_ms, self.expected_tokens = amounts.audio_ms, amounts.expected_tokens
        self.max_tokens = amounts.input_tokens + output_tokens
        self.max_nanos = amounts.input_nanos + output_tokens * amounts.output_token_nanos


class Use(NamedTuple):
    """Amounts that count in one scope: in its last minute, at this moment, and billed in the request's period."""

    requests: int
    tokens: int
    audio_ms: int
    running: int
    running_audio_ms: int
    tokens_per_day: int
    tokens_per_month: int
    nanos_per_day: int
    nanos_per_month: int
    free_tokens: int
    """Free tokens that ended requests have used."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A store's answer to a step: refused (nothing was reserved, in no scope), or the use now, by scope."""

    reason: Reason = Reason.NONE
    retry_after_s: int = 0
    uses: Sequence[Use] = ()
    free_tokens: int = 0
    """Free tokens of a settled request."""
    output_tokens: int = 0
    """Output tokens that a charged request may write."""


class CounterStore(Protocol):
    """The counters. Each step is atomic over all scopes: it is taken in all of them or in none.

    A cancelled step is either taken or not; `settle` releases what was reserved.
    """

    @property
    def degraded(self) -> bool:
        """True while limits hold per process, because the shared store does not answer."""
        ...

    @property
    def fallbacks(self) -> int:
        """Number of steps taken without the shared store."""
        ...

    async def start(self) -> None:
        """Connect. Never fails: a shared store that cannot be reached is retried."""
        ...

    async def stop(self) -> None:
        """Send what is not sent yet. Idempotent."""
        ...

    async def admit(self, reservation: Reservation, smallest: Amounts) -> Answer:
        """Count one request, and one running request until it is settled; budgets must leave the smallest request."""
        ...

    async def charge(self, reservation: Reservation, amounts: Amounts) -> Answer:
        """Count a request's expected amounts, and reserve the most that it may use."""
        ...

    async def settle(self, reservation: Reservation, tokens: int, nanos: int) -> int:
        """Release a reservation, count what was billed, and return how many of the tokens are free.

        `nanos` is the price of all tokens. A token is free as long as settled requests have not used up the quota,
        whatever was expected or is reserved by other requests. Never fails; waits only if a free quota is counted in a
        shared store. Idempotent.
        """
        ...

    async def seed(self, scope: Scope, period: Period, sums: Sums, free_tokens: int) -> None:
        """Set what was billed before, where the counters do not know it."""
        ...


def nanos_to_pay(nanos: int, free_tokens: int, tokens: int) -> int:
    """Return the price of the tokens that are not free, rounded up to a nano-unit."""
    return nanos if not free_tokens else -(-nanos * (tokens - free_tokens) // tokens)


def free_of(scope: Scope, used: int, tokens: int) -> int:
    """Return how many of a settled request's tokens are free, if `used` tokens of the scope's quota were used before.

    With "free tier only" all are: the last admitted request may exceed the quota, and is never billed.
    """
    if scope.free_tokens is None:
        return 0
    return tokens if scope.only_free else min(tokens, max(0, scope.free_tokens - used))
