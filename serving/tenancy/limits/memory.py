"""Counters of limits in this process: for one machine with one frontend, and while Redis does not answer."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from serving.tenancy.limits.counter_store import (
    BUDGETS,
    BURST_S,
    WINDOW_S,
    Amounts,
    Answer,
    Reason,
    Reservation,
    Scope,
    Sums,
    Use,
    free_of,
    nanos_to_pay,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from serving.tenancy.limits.counter_store import Periods

    Refusal = tuple[Reason, int]  # the limit, and seconds until a retry may succeed

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

    async def admit(self, reservation: Reservation, periods: Periods) -> Answer:
        now_s = int(self._now_s())
        self._drop_idle(reservation.scopes, now_s)
        pairs = self._of(reservation.scopes, periods)
        for scope, counters in pairs:
            if refusal := next(counters.refuse_request(scope, now_s), None):
                return _answer(refusal, pairs, now_s)
        for _, counters in pairs:
            counters.running += 1
            counters.requests.add(now_s, 1)
        reservation.admitted = True
        return _answer((Reason.NONE, 0), pairs, now_s)

    async def charge(self, reservation: Reservation, periods: Periods, amounts: Amounts) -> Answer:
        now_s = int(self._now_s())
        pairs = self._of(reservation.scopes, periods)
        free_tokens = max((counters.grant(scope, amounts.tokens) for scope, counters in pairs), default=0)
        nanos = nanos_to_pay(amounts.nanos, free_tokens, amounts.tokens)
        for scope, counters in pairs:
            if refusal := next(counters.refuse_amounts(scope, amounts, nanos, now_s), None):
                return _answer(refusal, pairs, now_s)
        reservation.audio_ms, reservation.tokens, reservation.nanos = amounts.audio_ms, amounts.tokens, nanos
        reservation.free_tokens, reservation.charged_s = free_tokens, now_s
        for scope, counters in pairs:
            counters.tokens.add(now_s, amounts.tokens)
            counters.audio_ms.add(now_s, amounts.audio_ms)
            counters.reserve(scope, reservation)
        reservation.free_left = max((counters.free_left(scope) for scope, counters in pairs), default=0)
        return _answer((Reason.NONE, 0), pairs, now_s)

    async def settle(self, reservation: Reservation, periods: Periods, tokens: int, nanos: int) -> int:
        return self.settle_now(reservation, periods, tokens, nanos)

    def settle_now(self, reservation: Reservation, periods: Periods, tokens: int, nanos: int) -> int:
        """Settle as `settle` does, which never waits here."""
        if not reservation.admitted:
            return 0
        reservation.admitted = False
        now_s = int(self._now_s())
        pairs = self._of(reservation.scopes, periods)
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
        more = tokens - reservation.tokens
        for scope, counters in pairs:
            counters.running -= 1
            counters.reserve(scope, reservation, sign=-1)
            counters.tokens.add(reservation.charged_s if more < 0 else now_s, more)
            counters.bill(tokens, nanos)
            if counters.free_used is not None and scope.free_tokens is not None:
                counters.free_used += free_tokens
        return free_tokens

    def adopt(self, reservation: Reservation) -> None:
        """Take over a reservation that was made in another store."""
        for scope, counters in self._of(reservation.scopes, ("", "")):
            counters.running += 1
            counters.reserve(scope, reservation)

    async def seed(self, scope: Scope, periods: Periods, sums: Sums, free_tokens: int) -> None:
        [(_, counters)] = self._of([scope], periods)
        if counters.sums is None:
            counters.periods, counters.sums = periods, sums
        if counters.free_used is None:
            counters.free_used = free_tokens

    def _of(self, scopes: Sequence[Scope], periods: Periods) -> list[tuple[Scope, _Counters]]:
        pairs = []
        for scope in scopes:
            if (counters := self._counters.get(scope.name)) is None:
                counters = self._counters[scope.name] = _Counters()
            counters.turn(periods)
            pairs.append((scope, counters))
        return pairs

    def _drop_idle(self, scopes: Sequence[Scope], now_s: int) -> None:
        """Make room for new scopes. Called before they are counted: later, one just made or seeded would be dropped."""
        kept = {scope.name for scope in scopes}
        if len(self._counters) >= _MAX_SCOPES and not kept <= self._counters.keys():
            self._counters = {
                name: counters
                for name, counters in self._counters.items()
                if name in kept or not counters.is_idle(now_s)
            }


def _answer(refusal: Refusal, pairs: Sequence[tuple[Scope, _Counters]], now_s: int) -> Answer:
    return Answer(*refusal, [counters.use(now_s) for _, counters in pairs])


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
        self.periods: Periods = ("", "")
        self.sums: Sums | None = None
        """Sums billed in `periods`, `None` if unknown."""
        self.free_used: int | None = None
        self._reserved_audio_ms = self._reserved_tokens = self._reserved_nanos = self._reserved_free = 0

    def use(self, now_s: int) -> Use:
        return Use(self.requests.sum(now_s), self.tokens.sum(now_s), self.audio_ms.sum(now_s))

    def is_idle(self, now_s: int) -> bool:
        use = self.use(now_s)
        return not (self.running or use.requests or use.tokens or use.audio_ms)

    def turn(self, periods: Periods) -> None:
        """Set the sums of a day, or a month, that has ended to 0."""
        if (sums := self.sums) is None or periods == self.periods:
            return
        same_day, same_month = (now == before for now, before in zip(periods, self.periods, strict=True))
        self.periods = periods
        self.sums = Sums(
            sums.tokens_per_day * same_day,
            sums.tokens_per_month * same_month,
            sums.nanos_per_day * same_day,
            sums.nanos_per_month * same_month,
        )

    def bill(self, tokens: int, nanos: int) -> None:
        """Add what was billed to the sums, if they are known."""
        if (sums := self.sums) is not None:
            self.sums = Sums(
                sums.tokens_per_day + tokens,
                sums.tokens_per_month + tokens,
                sums.nanos_per_day + nanos,
                sums.nanos_per_month + nanos,
            )

    def reserve(self, scope: Scope, reservation: Reservation, *, sign: int = 1) -> None:
        """Add the reservation's amounts to what is reserved; with `sign` -1 subtract them."""
        self._reserved_audio_ms += sign * reservation.audio_ms
        self._reserved_tokens += sign * reservation.tokens
        self._reserved_nanos += sign * reservation.nanos
        if scope.free_tokens is not None:
            self._reserved_free += sign * reservation.free_tokens

    def free_left(self, scope: Scope) -> int:
        """Return how many tokens of the free quota no settled request has used."""
        return 0 if scope.free_tokens is None else max(0, scope.free_tokens - (self.free_used or 0))

    def grant(self, scope: Scope, tokens: int) -> int:
        """Return how many of the tokens are expected to be free; with "free tier only" all, while any is left."""
        if scope.free_tokens is None or self.free_used is None:
            return 0
        left = max(0, scope.free_tokens - self.free_used - self._reserved_free)
        return tokens if left and scope.only_free else min(left, tokens)

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
        yield from self._refuse_spending(scope, 1, 0)

    def refuse_amounts(self, scope: Scope, amounts: Amounts, nanos: int, now_s: int) -> Iterator[Refusal]:
        """Yield the limits that these amounts would exceed; `nanos` is the price of the tokens that are not free."""
        limits = scope.limits
        if (limit := limits.tokens_per_minute) is not None and self.tokens.sum(now_s) + amounts.tokens > limit:
            yield Reason.TOKENS_PER_MINUTE, self.tokens.retry_after_s(amounts.tokens, limit, now_s)
        if (limit := limits.audio_seconds_per_minute) is not None:
            limit_ms = 1000 * limit
            if self.audio_ms.sum(now_s) + amounts.audio_ms > limit_ms:
                yield Reason.AUDIO_SECONDS_PER_MINUTE, self.audio_ms.retry_after_s(amounts.audio_ms, limit_ms, now_s)
        limit = limits.concurrent_audio_seconds
        if limit is not None and self._reserved_audio_ms + amounts.audio_ms > 1000 * limit:
            yield Reason.CONCURRENT_AUDIO_SECONDS, 1
        yield from self._refuse_spending(scope, amounts.tokens, nanos)

    def _refuse_spending(self, scope: Scope, tokens: int, nanos: int) -> Iterator[Refusal]:
        limits, sums = scope.limits, self.sums
        if scope.has_budget:
            if sums is None:
                yield Reason.UNSEEDED, 0
                return
            tokens, nanos = tokens + self._reserved_tokens, nanos + self._reserved_nanos
            for name in BUDGETS:
                limit, more = getattr(limits, name), tokens if name.startswith("tokens") else nanos
                if limit is not None and getattr(sums, name) + more > limit:
                    yield Reason[name.upper()], 0
        if scope.free_tokens is not None:
            if self.free_used is None:
                yield Reason.UNSEEDED, 0
            elif scope.only_free and self.free_used + self._reserved_free >= scope.free_tokens:
                yield Reason.FREE_TIER, 0
