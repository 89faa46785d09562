"""Limits of a tenant and of each of its keys: checked and reserved in one step, released when the request ends.

    admit ─► (audio decoded) charge ─► (ended, in whatever way) settle

Limits per minute hold in every 60 seconds: time is counted in whole seconds, and amounts counted in the last 61 of them
(`WINDOW_S`) are in use. So a limit is never exceeded, and amounts become free up to a second late.
"""

from __future__ import annotations

import datetime as dt
import math
import time
from typing import TYPE_CHECKING

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
from serving.tenancy.billing.prices import money
from serving.tenancy.limits.counter_store import BUDGETS, WINDOW_S, Period, Reason, Reservation, Scope, Spent
from serving.tenancy.limits.remaining import with_spent, without_budgets
from serving.tenancy.limits.spending import SMALLEST, Amounts
from serving.types import FreeQuota, Limits

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from serving.errors import CaptionerError
    from serving.tenancy.limits.counter_store import Answer, CounterStore, Use
    from serving.types import Caller

_MAX_RETRY_AFTER_S = 60
"""Clients wait no longer without being asked to; a retry may be one second too early."""

_MAX_SEEDINGS = 2
"""A store that is lost during a seeding loses it; the store that replaces it is seeded again."""

_BURST_FRACTION, _MIN_BURST = 6, 10
"""One in `_BURST_FRACTION` of a minute's requests, but at least `_MIN_BURST`, may come within a second."""

_UNLIMITED = Limits()

_NOTHING = Amounts(max_output_tokens=0)
"""Amounts that change no counter: a charge of nothing only reads."""


class Limiter:
    """Holds callers to their limits.

    `spent` reads what a caller was billed before, in the period of a time in ms and in a currency, from the ledger.
    """

    def __init__(self, store: CounterStore, spent: Callable[[Caller, int, str], Awaitable[Spent]]) -> None:
        self.store = store
        self._spent = spent

    async def start(self) -> None:
        """Start the store. A store that does not answer is no reason not to start."""
        await self.store.start()

    async def stop(self) -> None:
        """Stop the store. Idempotent."""
        await self.store.stop()

    async def admit(
        self, caller: Caller, *, at_ms: int | None = None, currency: str = "", smallest: Amounts = SMALLEST
    ) -> Reservation:
        """Count a request; `settle` its reservation however it ends. Raises `RateLimited`, `FreeTierExhausted`.

        The request counts in the day and month (UTC) of `at_ms`, by default now, and in the money budgets of
        `currency`. Budgets that do not leave the `smallest` request refuse it.
        """
        at_ms = time.time_ns() // 1_000_000 if at_ms is None else at_ms
        reservation = Reservation(caller, _scopes(caller, at_ms), _period(at_ms, currency), at_ms=at_ms)
        try:
            await self._take(reservation, lambda: self.store.admit(reservation, smallest))
        except BaseException:
            await self.settle(reservation, tokens=0, nanos=0)
            raise
        return reservation

    async def charge(self, reservation: Reservation, amounts: Amounts) -> int:
        """Reserve what the request may use; return how many output tokens it may write.

        Raises `RateLimited` and `FreeTierExhausted`.
        """
        answer = await self._take(reservation, lambda: self.store.charge(reservation, amounts))
        return answer.output_tokens if answer else amounts.max_output_tokens

    async def settle(self, reservation: Reservation, *, tokens: int, nanos: int) -> int:
        """Release what was reserved, count what is billed, and return how many of the tokens are free.

        `nanos` is the price of all tokens. Idempotent.
        """
        return await self.store.settle(reservation, tokens, nanos) if reservation.scopes else 0

    async def uses(self, caller: Caller, *, at_ms: int, currency: str) -> Sequence[tuple[Scope, Use]]:
        """Return what counts now in each scope of the caller that limits anything. Nothing is counted or reserved.

        Minutes and what is running come from the counters. What was billed in the day and month of `at_ms` comes from
        the ledger, which knows it also where the counters do not. Raises `Overloaded` if the ledger cannot be read.
        """
        scopes, period = _scopes(caller, at_ms), _period(at_ms, currency)
        spends = any(scope.has_budget or scope.free_tokens is not None for scope in scopes)
        spent = await self._spent(caller, at_ms, currency) if spends else Spent()
        found = []
        for scope in scopes:
            reservation = Reservation(caller, [without_budgets(scope)], period, at_ms=at_ms)
            answer = await self.store.charge(reservation, _NOTHING)
            found.append((scope, with_spent(answer.uses[0], scope, caller, spent)))
        return found

    async def _take(self, reservation: Reservation, step: Callable[[], Awaitable[Answer]]) -> Answer | None:
        """Take a step; where the counters do not know what was billed before, seed them from the ledger first."""
        if not reservation.scopes:
            return None
        caller, period = reservation.caller, reservation.period
        answer = await step()
        for _ in range(_MAX_SEEDINGS):
            if answer.reason is not Reason.UNSEEDED:
                break
            spent = await self._spent(caller, reservation.at_ms, period.currency)
            for scope in reservation.scopes:
                is_tenant = scope.name == _tenant(caller)
                sums, free_tokens = (spent.tenant, spent.free_tokens) if is_tenant else (spent.key, 0)
                await self.store.seed(scope, period, sums, free_tokens)
            answer = await step()
        headers = _headers(reservation.scopes, answer.uses)
        if answer.reason is not Reason.NONE:
            raise _refusal(answer, headers)
        reservation.headers = headers
        return answer


def _tenant(caller: Caller) -> str:
    return f"tenant:{caller.tenant_id}"


def _scopes(caller: Caller, at_ms: int) -> Sequence[Scope]:
    """Return the caller's scopes that limit anything: of its tenant, its key, both or none.

    A free quota counts if it is valid at `at_ms`, the admission.
    """
    quota = caller.free_quota
    if quota and quota.ends_at * 1000 <= at_ms:
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
        burst=max(_MIN_BURST, (limits.requests_per_minute or 0) // _BURST_FRACTION),
        free_tokens=quota.tokens if quota else None,
        only_free=bool(quota and quota.only),
    )


def _period(at_ms: int, currency: str) -> Period:
    day = dt.datetime.fromtimestamp(at_ms / 1000, dt.UTC).date().isoformat()
    return Period(day, day[: len("2026-11")], currency)


def _headers(scopes: Sequence[Scope], uses: Sequence[Use]) -> Mapping[str, str]:
    """Return headers for each limit that is set: of the tenant's and the key's limit, the one with less left."""
    headers: dict[str, str] = {}
    pairs = [*zip(scopes, uses, strict=False)]
    for name, limit_of, used_of, text, reset in _HEADERS:
        limits = [(limit, used_of(use)) for scope, use in pairs if (limit := limit_of(scope)) is not None]
        if limits:
            remaining, limit = min((limit - used, limit) for limit, used in limits)
            headers[f"x-ratelimit-limit-{name}"] = text(limit)
            headers[f"x-ratelimit-remaining-{name}"] = text(max(0, math.floor(remaining)))
            if reset is not None:
                headers[f"x-ratelimit-reset-{name}"] = f"{0 if remaining == limit else reset()}s"
    return headers


def _limit(name: str) -> Callable[[Scope], int | None]:
    return lambda scope: getattr(scope.limits, name)


def _free_tokens(scope: Scope) -> int | None:
    return scope.free_tokens


def _window() -> int:
    return WINDOW_S


def _until_next_day() -> int:
    return until_next(month=False)


def _until_next_month() -> int:
    return until_next(month=True)


_HEADERS: Sequence[
    tuple[str, Callable[[Scope], int | None], Callable[[Use], float], Callable[[int], str], Callable[[], int] | None]
] = (
    ("requests", _limit("requests_per_minute"), lambda use: use.requests, str, _window),
    ("tokens", _limit("tokens_per_minute"), lambda use: use.tokens, str, _window),
    ("audio-seconds", _limit("audio_seconds_per_minute"), lambda use: use.audio_ms / 1000, str, _window),
    ("concurrent-requests", _limit("concurrent_requests"), lambda use: use.running, str, None),
    (
        "concurrent-audio-seconds",
        _limit("concurrent_audio_seconds"),
        lambda use: use.running_audio_ms / 1000,
        str,
        None,
    ),
    ("tokens-day", _limit("tokens_per_day"), lambda use: use.tokens_per_day, str, _until_next_day),
    ("tokens-month", _limit("tokens_per_month"), lambda use: use.tokens_per_month, str, _until_next_month),
    ("money-day", _limit("nanos_per_day"), lambda use: use.nanos_per_day, money, _until_next_day),
    ("money-month", _limit("nanos_per_month"), lambda use: use.nanos_per_month, money, _until_next_month),
    ("free-tokens", _free_tokens, lambda use: use.free_tokens, str, None),
)
"""Name, limit, use, format of the value and time to the reset of each limit.

Budgets and the free quota count what requests that have ended were billed; all others include this request.
"""


def _refusal(answer: Answer, headers: Mapping[str, str]) -> CaptionerError:
    reason = answer.reason
    if reason is Reason.FREE_TIER:
        return FreeTierExhausted()
    retry_after_s = min(answer.retry_after_s, _MAX_RETRY_AFTER_S)
    limit = reason.name.lower()
    if limit in BUDGETS and not retry_after_s:
        retry_after_s = until_next(month=limit.endswith("month"))
    error = _ERRORS.get(reason, BudgetExhausted)(limit=limit, retry_after_s=max(1, retry_after_s))
    error.headers = headers
    return error


_ERRORS: Mapping[Reason, type[RateLimited]] = {
    Reason.CONCURRENT_REQUESTS: ConcurrencyLimited,
    Reason.BURST: BurstLimited,
    Reason.REQUESTS_PER_MINUTE: RequestsLimited,
    Reason.TOKENS_PER_MINUTE: TokensLimited,
    Reason.AUDIO_SECONDS_PER_MINUTE: AudioLimited,
    Reason.CONCURRENT_AUDIO_SECONDS: ConcurrencyLimited,
}


def until_next(*, month: bool) -> int:
    """Return the seconds until the next day begins, or the next month (UTC)."""
    now = dt.datetime.now(dt.UTC)
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    following = midnight + dt.timedelta(days=32 - now.day if month else 1)
    return math.ceil(((following.replace(day=1) if month else following) - now).total_seconds())
