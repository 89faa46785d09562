"""What a tenant, and each key of it, may take: checked and taken in one step, and given back at the end.

    admit ─► (audio decoded) charge ─► (ended, in whatever way) settle

Limits per minute hold in every 60 seconds: time is counted in whole seconds, and what was taken within the last 61 of
them counts. So a limit is never exceeded, and a place comes back up to a second late. Where the counters are kept is
the `Store`'s business: in this process (`limits_memory.py`) or in Redis for all replicas (`limits_redis.py`).
"""

from __future__ import annotations

import datetime as dt
import enum
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

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
from serving.types import FreeQuota, Limits

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from serving.errors import CaptionerError
    from serving.types import Caller

WINDOW_S = 61
"""Seconds, the current one included, that count as the last minute: any 60 s lie within so many."""

_LONGEST_RETRY_S = 60
"""Clients wait no longer by themselves; a second too early at worst."""

_SEEDINGS = 2
"""A store that is lost while it is told what was spent loses what it was told; the one that stands in is told again."""

_BURST_PART, _LEAST_BURST = 6, 10
"""Of a minute's requests, this part may come within a second (or two that touch), or so many if that is more."""


class Reason(enum.IntEnum):
    """Why something is refused. The numbers are those of `limits.lua`."""

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
    """Nothing is known of what was spent before; `Store.seed` it and ask again."""


@dataclass(frozen=True, slots=True)
class Sums:
    """What was billed on this day and in this month (UTC)."""

    tokens_per_day: int = 0
    tokens_per_month: int = 0
    nanos_per_day: int = 0
    nanos_per_month: int = 0


@dataclass(frozen=True, slots=True)
class Spent:
    """What a caller was billed before, from the ledger: asked for when the counters do not know."""

    tenant: Sums = field(default_factory=Sums)
    key: Sums = field(default_factory=Sums)
    free_tokens: int = 0
    """Of its free quota, used so far."""


@dataclass(frozen=True, slots=True)
class Scope:
    """One holder of limits: a tenant, or a key."""

    name: str
    limits: Limits
    burst: int
    free_tokens: int | None = None
    """Free quota that has not ended."""
    only_free: bool = False
    """Nothing is let in after the free quota."""

    @property
    def has_budget(self) -> bool:
        """Whether what it spends has to be known."""
        limits = self.limits
        budgets = limits.tokens_per_day, limits.tokens_per_month, limits.nanos_per_day, limits.nanos_per_month
        return any(budget is not None for budget in budgets)


@dataclass(slots=True, eq=False)
class Held:
    """What one request holds in each scope, from its admission until it is settled. The store keeps it."""

    scopes: Sequence[Scope]
    admitted: bool = False
    audio_ms: int = 0
    tokens: int = 0
    nanos: int = 0
    free_tokens: int = 0
    """Free tokens reserved for the expected length of the caption."""
    free_left: int = 0
    """Free tokens that were unused when the request was charged: the most it may get if the counters are lost."""
    charged_s: int = 0
    """In which second (by the store's clock) its tokens were counted."""
    pending: asyncio.Future[Answer | None] | None = None
    """A step whose outcome is not known yet."""


@dataclass(frozen=True, slots=True)
class Use:
    """What counts in one scope's last minute."""

    requests: int
    tokens: int
    audio_ms: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What a store says to a step: refused (nothing was taken, in no scope), or what is in use now, by scope."""

    reason: Reason = Reason.NONE
    retry_after_s: int = 0
    uses: Sequence[Use] = ()
    free_tokens: int = 0
    """Of a settled request: how many of its tokens are free."""


@dataclass(frozen=True, slots=True)
class Amounts:
    """What a request is expected to take."""

    audio_ms: int
    tokens: int
    nanos: int


class Store(Protocol):
    """The counters. Each step is atomic over all scopes: it is taken in all of them or in none.

    A step that is cancelled is taken or not; `settle` gives back what was. `periods` names the current day and month.
    """

    @property
    def degraded(self) -> bool:
        """Whether limits hold per process now, since what all share does not answer."""
        ...

    @property
    def fallbacks(self) -> int:
        """Steps that were taken without it."""
        ...

    async def start(self) -> None:
        """Get ready; it is none of its failures that it cannot be reached."""
        ...

    async def stop(self) -> None:
        """Write what is not written. Idempotent."""
        ...

    async def admit(self, held: Held, periods: tuple[str, str]) -> Answer:
        """Count one request, under way until it is settled."""
        ...

    async def charge(self, held: Held, periods: tuple[str, str], amounts: Amounts) -> Answer:
        """Count what a request takes, as far as one knows, and note in `held` what was reserved."""
        ...

    async def settle(self, held: Held, periods: tuple[str, str], tokens: int, nanos: int) -> int:
        """Release what is held and count what was billed; return how many of the tokens are free.

        `nanos` is the price of all tokens. A token is free as long as the quota is not used up by settled requests,
        whatever was expected or is reserved by others. Never fails; waits only where a free quota is counted elsewhere.
        """
        ...

    async def seed(self, scope: Scope, periods: tuple[str, str], sums: Sums, free_tokens: int) -> None:
        """Tell what was spent before, where nothing is known of it."""
        ...


class Limiter:
    """Holds callers to their limits. `spent` tells what a caller was billed before."""

    def __init__(self, store: Store, spent: Callable[[Caller], Awaitable[Spent]]) -> None:
        self.store = store
        self._spent = spent

    async def start(self) -> None:
        """Get ready. A store that does not answer is no reason not to start."""
        await self.store.start()

    async def stop(self) -> None:
        """Tell the store what it has not heard yet. Idempotent."""
        await self.store.stop()

    async def admit(self, caller: Caller, request_id: str) -> Lease:
        """Let a request in. Raises `RateLimited` and `FreeTierExhausted`."""
        del request_id  # nothing keeps a caller from sending the same twice
        lease = Lease(self, caller)
        try:
            await lease.admit()
        except BaseException:
            await lease.settle(tokens=0, nanos=0)
            raise
        return lease

    async def ask(
        self, caller: Caller, held: Held, step: Callable[[tuple[str, str]], Awaitable[Answer]]
    ) -> Mapping[str, str]:
        """Take a step, having learnt what was spent before if that is not known; return what the headers tell.

        Raises `RateLimited` and `FreeTierExhausted`.
        """
        periods = _periods()
        answer = await step(periods)
        for _ in range(_SEEDINGS):
            if answer.reason is not Reason.UNSEEDED:
                break
            spent = await self._spent(caller)
            for scope in held.scopes:
                of_tenant = scope.name == _tenant(caller)
                sums, free_tokens = (spent.tenant, spent.free_tokens) if of_tenant else (spent.key, 0)
                await self.store.seed(scope, periods, sums, free_tokens)
            answer = await step(periods)
        headers = _headers(held.scopes, answer.uses)
        if answer.reason is not Reason.NONE:
            raise _refusal(answer, headers)
        return headers


class Lease:
    """What one request holds of its caller's limits. To be settled on every way out."""

    def __init__(self, limiter: Limiter, caller: Caller) -> None:
        self.headers: Mapping[str, str] = {}
        """What the answer tells of the limits: `x-ratelimit-…`."""
        self._limiter = limiter
        self._caller = caller
        self._held = Held(_scopes(caller))

    async def admit(self) -> None:
        """Count the request. Raises `RateLimited` and `FreeTierExhausted`."""
        if (held := self._held).scopes:
            store = self._limiter.store
            self.headers = await self._limiter.ask(self._caller, held, lambda periods: store.admit(held, periods))

    async def charge(self, *, audio_s: float, input_tokens: int, output_tokens: int, nanos: int) -> None:
        """Take what a request is expected to take. Raises `RateLimited` and `FreeTierExhausted`.

        `output_tokens` is an estimate, not the most that may come; `nanos` is the price of everything.
        """
        if (held := self._held).scopes:
            store, amounts = self._limiter.store, Amounts(round(audio_s * 1000), input_tokens + output_tokens, nanos)
            self.headers = await self._limiter.ask(
                self._caller, held, lambda periods: store.charge(held, periods, amounts)
            )

    async def settle(self, *, tokens: int, nanos: int) -> int:
        """Release what was reserved, and count what is billed; return how many of the tokens are free.

        `nanos` is the price of all of them. A second call changes nothing.
        """
        held, self._held = self._held, Held(())
        if not held.scopes:
            return 0
        return await self._limiter.store.settle(held, _periods(), tokens, nanos)


def not_free(nanos: int, free_tokens: int, tokens: int) -> int:
    """The price of what is not free."""
    return nanos if not free_tokens else -(-nanos * (tokens - free_tokens) // tokens)


def free_of(scope: Scope, used: int, tokens: int) -> int:
    """How many of a settled request's tokens are free, if `used` of the scope's quota were used before.

    With "free tier only" all are: the last request that was let in may exceed the quota, and is never billed.
    """
    if scope.free_tokens is None:
        return 0
    return tokens if scope.only_free else min(tokens, max(0, scope.free_tokens - used))


def _tenant(caller: Caller) -> str:
    return f"tenant:{caller.tenant_id}"


def _scopes(caller: Caller) -> Sequence[Scope]:
    """Those of a caller that limit anything."""
    quota = caller.free_quota
    if quota and quota.ends_at <= time.time():
        quota = FreeQuota(0, quota.ends_at, only=True) if quota.only else None
    scopes = []
    if quota or caller.tenant_limits != _UNLIMITED:
        scopes.append(_scope(_tenant(caller), caller.tenant_limits, quota))
    if caller.key_limits != _UNLIMITED:
        scopes.append(_scope(f"key:{caller.key_id}", caller.key_limits, None))
    return scopes


def _scope(name: str, limits: Limits, quota: FreeQuota | None) -> Scope:
    return Scope(
        name,
        limits,
        burst=max(_LEAST_BURST, (limits.requests_per_minute or 0) // _BURST_PART),
        free_tokens=quota.tokens if quota else None,
        only_free=bool(quota and quota.only),
    )


_UNLIMITED = Limits()


def _periods() -> tuple[str, str]:
    today = dt.datetime.now(dt.UTC).date()
    return today.isoformat(), today.isoformat()[:7]


def _headers(scopes: Sequence[Scope], uses: Sequence[Use]) -> Mapping[str, str]:
    """What a client is told of the limits per minute: of those of tenant and key, the one with less left."""
    headers: dict[str, str] = {}
    for name, limit_of, used_of in _PER_MINUTE:
        pairs = [(limit_of(scope.limits), used_of(use)) for scope, use in zip(scopes, uses, strict=False)]
        left = [(limit - used, limit) for limit, used in pairs if limit is not None]
        if left:
            remaining, limit = min(left)
            headers[f"x-ratelimit-limit-{name}"] = str(limit)
            headers[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(remaining)))
            headers[f"x-ratelimit-reset-{name}"] = f"{0 if remaining == limit else WINDOW_S}s"
    return headers


_PER_MINUTE: Sequence[tuple[str, Callable[[Limits], int | None], Callable[[Use], float]]] = (
    ("requests", lambda limits: limits.requests_per_minute, lambda use: use.requests),
    ("tokens", lambda limits: limits.tokens_per_minute, lambda use: use.tokens),
    ("audio-seconds", lambda limits: limits.audio_seconds_per_minute, lambda use: use.audio_ms / 1000),
)


def _refusal(answer: Answer, headers: Mapping[str, str]) -> CaptionerError:
    reason = answer.reason
    if reason is Reason.FREE_TIER:
        return FreeTierExhausted()
    retry_after_s = min(answer.retry_after_s, _LONGEST_RETRY_S)
    if reason in _BUDGETS:
        retry_after_s = _until_next(month=reason in {Reason.TOKENS_PER_MONTH, Reason.NANOS_PER_MONTH})
    error = _KINDS[reason](limit=reason.name.lower(), retry_after_s=max(1, retry_after_s))
    error.headers = headers
    return error


_BUDGETS = frozenset((Reason.TOKENS_PER_DAY, Reason.TOKENS_PER_MONTH, Reason.NANOS_PER_DAY, Reason.NANOS_PER_MONTH))
_KINDS: Mapping[Reason, type[RateLimited]] = {
    Reason.CONCURRENT_REQUESTS: ConcurrencyLimited,
    Reason.BURST: BurstLimited,
    Reason.REQUESTS_PER_MINUTE: RequestsLimited,
    Reason.TOKENS_PER_MINUTE: TokensLimited,
    Reason.AUDIO_SECONDS_PER_MINUTE: AudioLimited,
    Reason.CONCURRENT_AUDIO_SECONDS: ConcurrencyLimited,
} | dict.fromkeys(_BUDGETS, BudgetExhausted)


def _until_next(*, month: bool) -> int:
    """Seconds until the next day begins, or the next month."""
    now = dt.datetime.now(dt.UTC)
    begun = now.replace(hour=0, minute=0, second=0, microsecond=0)
    following = begun + dt.timedelta(days=32 - now.day if month else 1)
    return math.ceil(((following.replace(day=1) if month else following) - now).total_seconds())
