"""Counters of limits in this process: for one machine with one frontend, and while Redis does not answer."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from serving.tenancy.limits.counter_store import (
    BUDGETS,
    BURST_S,
    WINDOW_S,
    Answer,
    Period,
    Reason,
    Reservation,
    Scope,
    Sums,
    Use,
    free_of,
    nanos_to_pay,
)
from serving.tenancy.limits.spending import NO_BUDGET, RESERVED_RETRY_S, Amounts, output_left_by_money, share_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Refusal = tuple[Reason, int]  # the limit, and seconds until a retry may succeed

_TOKENS = "tokens"
"""Key of the sum of tokens, next to the currencies of sums of money."""

_MAX_PERIODS = 80
"""Periods whose sums are kept: forty days, as in Redis, and their months. The current month is never dropped: its sum
would be read from the ledger again, where the last requests may still be missing."""

_MAX_SCOPES = 10_000
"""Number of scopes above which idle ones are dropped. The ledger has what was billed to them."""


class MemoryStore:
    """A `CounterStore` without I/O: its steps never wait, so each one is atomic."""

    degraded, fallbacks = False, 0

    def __init__(self, now_s: Callable[[], float] = time.time) -> None:
        self._now_s = now_s
        self._counters: dict[str, _Counters] = {}

    async def start(self) -> None:
        """See `CounterStore`."""

    async def stop(self) -> None:
        """See `CounterStore`."""

    async def admit(self, reservation: Reservation, smallest: Amounts) -> Answer:
        now_s = int(self._now_s())
        self._drop_idle(reservation.scopes, now_s)
        pairs = self._of(reservation.scopes)
        quota = _Quota.of(pairs)
        for scope, counters in pairs:
            spending = _Spending(scope, counters, reservation.period, smallest, quota)
            if refusal := next(counters.refuse_request(scope, now_s), None) or next(spending.refuse(), None):
                return _answer(refusal, pairs, now_s, reservation.period)
        for _, counters in pairs:
            counters.running += 1
            counters.requests.add(now_s, 1)
        reservation.admitted = True
        return _answer((Reason.NONE, 0), pairs, now_s, reservation.period)

    async def charge(self, reservation: Reservation, amounts: Amounts) -> Answer:
        now_s = int(self._now_s())
        pairs = self._of(reservation.scopes)
        quota, output_tokens = _Quota.of(pairs), amounts.max_output_tokens
        for scope, counters in pairs:
            spending = _Spending(scope, counters, reservation.period, amounts, quota)
            if refusal := next(counters.refuse_amounts(scope, amounts, now_s), None) or next(spending.refuse(), None):
                return _answer(refusal, pairs, now_s, reservation.period)
            output_tokens = min(output_tokens, share_of(spending.output_left, running=counters.running))
        reservation.reserve(amounts, output_tokens)
        reservation.charged_s = now_s
        reservation.free_left = quota.left if quota else 0
        for _, counters in pairs:
            counters.tokens.add(now_s, amounts.expected_tokens)
            counters.audio_ms.add(now_s, amounts.audio_ms)
            counters.reserve(reservation)
        return _answer((Reason.NONE, 0), pairs, now_s, reservation.period, output_tokens)

    async def settle(self, reservation: Reservation, tokens: int, nanos: int) -> int:
        return self.settle_now(reservation, tokens, nanos)

    def settle_now(self, reservation: Reservation, tokens: int, nanos: int) -> int:
        """Settle as `settle` does, which never waits here."""
        if not reservation.admitted:
            return 0
        reservation.admitted = False
        now_s = int(self._now_s())
        pairs = self._of(reservation.scopes)
        free_tokens = max(
            (
                min(reservation.free_left, tokens)
                if counters.free_used is None
                else free_of(scope, counters.free_used, tokens)
                for scope, counters in pairs
                if scope.free_tokens is not None
            ),
            default=0,
        )
        nanos = nanos_to_pay(nanos, free_tokens, tokens)
        more = tokens - reservation.expected_tokens
        for scope, counters in pairs:
            counters.running -= 1
            counters.reserve(reservation, sign=-1)
            counters.tokens.add(reservation.charged_s if more < 0 else now_s, more)
            counters.bill(reservation.period, tokens, nanos)
            if counters.free_used is not None and scope.free_tokens is not None:
                counters.free_used += free_tokens
        return free_tokens

    def adopt(self, reservation: Reservation) -> None:
        """Take over a reservation that was made in another store."""
        for _, counters in self._of(reservation.scopes):
            counters.running += 1
            counters.reserve(reservation)

    async def seed(self, scope: Scope, period: Period, sums: Sums, free_tokens: int) -> None:
        [(_, counters)] = self._of([scope])
        counters.seed(period, sums)
        if counters.free_used is None:
            counters.free_used = free_tokens

    def _of(self, scopes: Sequence[Scope]) -> list[tuple[Scope, _Counters]]:
        return [(scope, self._counters.setdefault(scope.name, _Counters())) for scope in scopes]

    def _drop_idle(self, scopes: Sequence[Scope], now_s: int) -> None:
        """Make room for new scopes. Called before they are counted: later, one just made or seeded would be dropped."""
        kept = {scope.name for scope in scopes}
        if len(self._counters) >= _MAX_SCOPES and not kept <= self._counters.keys():
            self._counters = {
                name: counters
                for name, counters in self._counters.items()
                if name in kept or not counters.is_idle(now_s)
            }


def _answer(
    refusal: Refusal, pairs: Sequence[tuple[Scope, _Counters]], now_s: int, period: Period, output_tokens: int = 0
) -> Answer:
    return Answer(*refusal, [counters.use(now_s, period) for _, counters in pairs], output_tokens=output_tokens)


class _Window:
    """Amounts counted in each of the seconds of the last minute."""

    def __init__(self) -> None:
        self._seconds: deque[list[int]] = deque()  # second, amount
        self._sum = 0

    def sum(self, now_s: int, *, seconds: int = WINDOW_S) -> int:
        """Return the sum of the last `seconds` seconds, the current one included."""
        while self._seconds and self._seconds[0][0] <= now_s - WINDOW_S:
            self._sum -= self._seconds.popleft()[1]
        if seconds == WINDOW_S:
            return self._sum
        return sum(amount for second, amount in self._seconds if second > now_s - seconds)

    def add(self, at_s: int, amount: int) -> None:
        """Count an amount in that second; a negative one only if anything is counted there."""
        if not amount:
            return
        for entry in reversed(self._seconds):
            if entry[0] == at_s:
                entry[1] += amount
                self._sum += amount
                return
            if entry[0] < at_s:
                break
        if amount > 0:
            self._seconds.append([at_s, amount])
            self._sum += amount

    def retry_after_s(self, amount: int, limit: int, now_s: int) -> int:
        """Return the seconds until `amount` fits below the limit."""
        left = self.sum(now_s)
        for second, counted in self._seconds:
            left -= counted
            if left + amount <= limit:
                return second + WINDOW_S - now_s
        return WINDOW_S


class _Counters:
    """Counters of one scope."""

    def __init__(self) -> None:
        self.requests, self.tokens, self.audio_ms = _Window(), _Window(), _Window()
        self.running = 0
        self.free_used: int | None = None
        self.reserved_audio_ms = self.reserved_tokens = 0
        self.reserved_nanos: dict[str, int] = {}
        """By currency."""
        self._billed: dict[str, dict[str, int]] = {}
        """By day and by month: tokens and, by currency, nanos, of those that are known."""

    def use(self, now_s: int, period: Period) -> Use:
        return Use(
            self.requests.sum(now_s),
            self.tokens.sum(now_s),
            self.audio_ms.sum(now_s),
            self.running,
            self.reserved_audio_ms,
            **asdict(self.billed(period) or Sums()),
            free_tokens=self.free_used or 0,
        )

    def is_idle(self, now_s: int) -> bool:
        return not (self.running or self.requests.sum(now_s) or self.tokens.sum(now_s) or self.audio_ms.sum(now_s))

    def billed(self, period: Period) -> Sums | None:
        """Return the sums of a period, `None` if they are not known."""
        day, month = self._billed.get(period.day, {}), self._billed.get(period.month, {})
        known = [sums.get(unit) for unit in (_TOKENS, period.currency) for sums in (day, month)]
        return None if None in known else Sums(*known)  # type: ignore[arg-type]

    def seed(self, period: Period, sums: Sums) -> None:
        """Set the sums of a period where they are not known."""
        for name, tokens, nanos in (
            (period.day, sums.tokens_per_day, sums.nanos_per_day),
            (period.month, sums.tokens_per_month, sums.nanos_per_month),
        ):
            known = self._billed.setdefault(name, {})
            known.setdefault(_TOKENS, tokens)
            known.setdefault(period.currency, nanos)
        while len(self._billed) > _MAX_PERIODS:
            del self._billed[next(iter(self._billed))]

    def bill(self, period: Period, tokens: int, nanos: int) -> None:
        """Add what was billed to the sums of the request's period that are known."""
        for name in (period.day, period.month):
            known = self._billed.get(name, {})
            for unit, amount in ((_TOKENS, tokens), (period.currency, nanos)):
                if unit in known:
                    known[unit] += amount

    def reserve(self, reservation: Reservation, *, sign: int = 1) -> None:
        """Add the reservation's amounts to what is reserved; with `sign` -1 subtract them."""
        self.reserved_audio_ms += sign * reservation.audio_ms
        self.reserved_tokens += sign * reservation.max_tokens
        currency = reservation.period.currency
        self.reserved_nanos[currency] = self.reserved_nanos.get(currency, 0) + sign * reservation.max_nanos

    def refuse_request(self, scope: Scope, now_s: int) -> Iterator[Refusal]:
        """Yield the limits that one more request would exceed."""
        limits, requests = scope.limits, self.requests
        if limits.concurrent_requests is not None and self.running >= limits.concurrent_requests:
            yield Reason.CONCURRENT_REQUESTS, 1
        if (limit := limits.requests_per_minute) is not None:
            if requests.sum(now_s) + 1 > limit:
                yield Reason.REQUESTS_PER_MINUTE, requests.retry_after_s(1, limit, now_s)
            if requests.sum(now_s, seconds=BURST_S) + 1 > scope.burst:
                yield Reason.BURST, BURST_S

    def refuse_amounts(self, scope: Scope, amounts: Amounts, now_s: int) -> Iterator[Refusal]:
        """Yield the limits per minute and of running audio that these amounts would exceed."""
        limits, tokens = scope.limits, amounts.expected_tokens
        if (limit := limits.tokens_per_minute) is not None and self.tokens.sum(now_s) + tokens > limit:
            yield Reason.TOKENS_PER_MINUTE, self.tokens.retry_after_s(tokens, limit, now_s)
        if (limit := limits.audio_seconds_per_minute) is not None:
            limit_ms = 1000 * limit
            if self.audio_ms.sum(now_s) + amounts.audio_ms > limit_ms:
                yield Reason.AUDIO_SECONDS_PER_MINUTE, self.audio_ms.retry_after_s(amounts.audio_ms, limit_ms, now_s)
        limit = limits.concurrent_audio_seconds
        if limit is not None and self.reserved_audio_ms + amounts.audio_ms > 1000 * limit:
            yield Reason.CONCURRENT_AUDIO_SECONDS, 1


@dataclass(frozen=True, slots=True)
class _Quota:
    """The tenant's free quota."""

    left: int
    """Tokens that no settled request has used."""
    only: bool
    reserved_tokens: int
    """The most that running requests of the tenant can use."""

    @classmethod
    def of(cls, pairs: Sequence[tuple[Scope, _Counters]]) -> _Quota | None:
        for scope, counters in pairs:
            if scope.free_tokens is not None:
                left = max(0, scope.free_tokens - (counters.free_used or 0))
                return cls(left, scope.only_free, counters.reserved_tokens)
        return None


class _Spending:
    """The budgets and the free quota of one scope, for one request."""

    def __init__(
        self, scope: Scope, counters: _Counters, period: Period, amounts: Amounts, quota: _Quota | None
    ) -> None:
        self._scope, self._counters, self._period = scope, counters, period
        self._amounts, self._quota = amounts, quota
        self.output_left = NO_BUDGET
        """Output tokens that are left, once `refuse` has yielded nothing."""

    def refuse(self) -> Iterator[Refusal]:
        """Yield the limits that leave no output token, with seconds to retry; 0 until the next period."""
        if self._scope.has_budget:
            if (sums := self._counters.billed(self._period)) is None:
                yield Reason.UNSEEDED, 0
                return
            for name in BUDGETS:
                if (limit := getattr(self._scope.limits, name)) is not None:
                    left_by = self._left_by_tokens if name.startswith("tokens") else self._left_by_money
                    if not self._leaves(left_by(limit, getattr(sums, name), reserved=True)):
                        unreserved = left_by(limit, getattr(sums, name), reserved=False)
                        held = unreserved >= self._amounts.needed_output_tokens
                        yield Reason[name.upper()], RESERVED_RETRY_S if held else 0
        if self._scope.free_tokens is not None and self._quota:
            if self._counters.free_used is None:
                yield Reason.UNSEEDED, 0
            elif self._scope.only_free and not self._leaves(self._left_by_quota(self._quota)):
                yield Reason.FREE_TIER, 0

    def _leaves(self, output_tokens: int) -> bool:
        self.output_left = min(self.output_left, output_tokens)
        return output_tokens >= self._amounts.needed_output_tokens

    def _left_by_tokens(self, limit: int, billed: int, *, reserved: bool) -> int:
        return limit - billed - reserved * self._counters.reserved_tokens - self._amounts.input_tokens

    def _left_by_money(self, limit: int, billed: int, *, reserved: bool) -> int:
        quota = self._quota
        if quota and quota.only:
            return NO_BUDGET  # never billed
        return output_left_by_money(
            self._amounts,
            limit=limit,
            billed=billed,
            reserved_nanos=reserved * self._counters.reserved_nanos.get(self._period.currency, 0),
            reserved_tokens=reserved * self._counters.reserved_tokens,
            # A key has no free tokens for certain: the tenant's other keys may use them first.
            free_left=quota.left if quota and self._scope.free_tokens is not None else 0,
        )

    def _left_by_quota(self, quota: _Quota) -> int:
        """Return what "free tier only" leaves: while no other request runs, any; the last one may exceed the quota."""
        if quota.left and not quota.reserved_tokens:
            return NO_BUDGET
        return quota.left - quota.reserved_tokens - self._amounts.input_tokens
