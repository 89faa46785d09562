"""Limits counted in this process: for one machine with one frontend, and while Redis does not answer."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import TYPE_CHECKING

from serving.tenancy.limits.limiter import WINDOW_S, Amounts, Answer, Held, Reason, Scope, Sums, Use, free_of, not_free

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_SCOPES = 10_000
"""So many scopes may be remembered before idle ones are forgotten. What they spent stands in the ledger."""

_BURST_S = 2


class MemoryStore:
    """A `Store` without I/O: its steps never wait, so nothing comes between."""

    degraded, fallbacks = False, 0

    def __init__(self, now_s: Callable[[], float] = time.time) -> None:
        self._now_s = now_s
        self._counters: dict[str, _Counters] = {}

    async def start(self) -> None:
        """See `Store`."""

    async def stop(self) -> None:
        """See `Store`."""

    async def admit(self, held: Held, periods: tuple[str, str]) -> Answer:
        """See `Store`."""
        now_s = int(self._now_s())
        self._forget_idle(held.scopes, now_s)
        pairs = self._of(held.scopes, periods)
        for scope, counters in pairs:
            if refused := next(counters.refuses_request(scope, now_s), None):
                return _answer(refused, pairs, now_s)
        for _, counters in pairs:
            counters.running += 1
            counters.requests.add(now_s, 1)
        held.admitted = True
        return _answer((Reason.NONE, 0), pairs, now_s)

    async def charge(self, held: Held, periods: tuple[str, str], amounts: Amounts) -> Answer:
        """See `Store`."""
        now_s = int(self._now_s())
        pairs = self._of(held.scopes, periods)
        free_tokens = max((counters.grant(scope, amounts.tokens) for scope, counters in pairs), default=0)
        nanos = not_free(amounts.nanos, free_tokens, amounts.tokens)
        for scope, counters in pairs:
            if refused := next(counters.refuses_amounts(scope, amounts, nanos, now_s), None):
                return _answer(refused, pairs, now_s)
        for scope, counters in pairs:
            counters.tokens.add(now_s, amounts.tokens)
            counters.audio_ms.add(now_s, amounts.audio_ms)
            counters.hold(scope, amounts.audio_ms, amounts.tokens, nanos, free_tokens)
        held.audio_ms, held.tokens, held.nanos, held.free_tokens = amounts.audio_ms, amounts.tokens, nanos, free_tokens
        held.free_left = max((counters.free_left(scope) for scope, counters in pairs), default=0)
        held.charged_s = now_s
        return _answer((Reason.NONE, 0), pairs, now_s)

    async def settle(self, held: Held, periods: tuple[str, str], tokens: int, nanos: int) -> int:
        """See `Store`."""
        return self.settle_now(held, periods, tokens, nanos)

    def settle_now(self, held: Held, periods: tuple[str, str], tokens: int, nanos: int) -> int:
        """As `settle`, which never waits here."""
        if not held.admitted:
            return 0
        held.admitted = False
        now_s = int(self._now_s())
        pairs = self._of(held.scopes, periods)
        free_tokens = max(
            (
                min(held.free_left, tokens)
                if counters.free_used is None
                else free_of(scope, counters.free_used, tokens)
                for scope, counters in pairs
                if scope.free_tokens is not None
            ),
            default=0,
        )
        nanos = not_free(nanos, free_tokens, tokens)
        for scope, counters in pairs:
            counters.running -= 1
            counters.hold(scope, -held.audio_ms, -held.tokens, -held.nanos, -held.free_tokens)
            more = tokens - held.tokens
            counters.tokens.add(held.charged_s if more < 0 else now_s, more)
            if counters.sums is not None:
                counters.sums.add(tokens, nanos)
            if counters.free_used is not None and scope.free_tokens is not None:
                counters.free_used += free_tokens
        return free_tokens

    def adopt(self, held: Held) -> None:
        """Hold from now on what was taken elsewhere."""
        for scope, counters in self._of(held.scopes, ("", "")):
            counters.running += 1
            counters.hold(scope, held.audio_ms, held.tokens, held.nanos, held.free_tokens)

    async def seed(self, scope: Scope, periods: tuple[str, str], sums: Sums, free_tokens: int) -> None:
        """See `Store`."""
        [(_, counters)] = self._of([scope], periods)
        if counters.sums is None:
            counters.sums = _Spending(periods, sums)
        if counters.free_used is None:
            counters.free_used = free_tokens

    def _of(self, scopes: Sequence[Scope], periods: tuple[str, str]) -> list[tuple[Scope, _Counters]]:
        pairs = []
        for scope in scopes:
            if (counters := self._counters.get(scope.name)) is None:
                counters = self._counters[scope.name] = _Counters()
            if counters.sums:
                counters.sums.turn(periods)
            pairs.append((scope, counters))
        return pairs

    def _forget_idle(self, scopes: Sequence[Scope], now_s: int) -> None:
        """Before these are counted anew: forgotten later, one that was just made or seeded would be lost."""
        spared = {scope.name for scope in scopes}
        if len(self._counters) >= _SCOPES and not spared <= self._counters.keys():
            self._counters = {
                name: counters
                for name, counters in self._counters.items()
                if name in spared or not counters.is_idle(now_s)
            }


def _answer(refused: tuple[Reason, int], pairs: Sequence[tuple[Scope, _Counters]], now_s: int) -> Answer:
    return Answer(*refused, [counters.use(now_s) for _, counters in pairs])


class _Window:
    """What was taken in each of the seconds that count as the last minute."""

    def __init__(self) -> None:
        self._seconds: deque[list[int]] = deque()  # second, amount
        self._sum = 0

    def sum(self, now_s: int, *, seconds: int = WINDOW_S) -> int:
        """What was taken in so many seconds, up to now."""
        while self._seconds and self._seconds[0][0] <= now_s - WINDOW_S:
            self._sum -= self._seconds.popleft()[1]
        if seconds == WINDOW_S:
            return self._sum
        return sum(amount for second, amount in self._seconds if second > now_s - seconds)

    def add(self, at_s: int, amount: int) -> None:
        """Count it in that second, as long as that counts at all."""
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

    def room_in_s(self, amount: int, limit: int, now_s: int) -> int:
        """Seconds until there is room for so much."""
        left = self.sum(now_s)
        for second, taken in self._seconds:
            left -= taken
            if left + amount <= limit:
                return second + WINDOW_S - now_s
        return WINDOW_S


class _Spending:
    """What was billed in the current day and month."""

    def __init__(self, periods: tuple[str, str], sums: Sums) -> None:
        self._day, self._month = periods
        self.tokens_day, self.tokens_month = sums.tokens_per_day, sums.tokens_per_month
        self.nanos_day, self.nanos_month = sums.nanos_per_day, sums.nanos_per_month

    def turn(self, periods: tuple[str, str]) -> None:
        """Begin a new day, or a new month, if one has begun."""
        day, month = periods
        if day != self._day:
            self._day, self.tokens_day, self.nanos_day = day, 0, 0
        if month != self._month:
            self._month, self.tokens_month, self.nanos_month = month, 0, 0

    def add(self, tokens: int, nanos: int) -> None:
        self.tokens_day += tokens
        self.tokens_month += tokens
        self.nanos_day += nanos
        self.nanos_month += nanos


class _Counters:
    """Those of one scope."""

    def __init__(self) -> None:
        self.requests, self.tokens, self.audio_ms = _Window(), _Window(), _Window()
        self.running = 0
        self.sums: _Spending | None = None
        self.free_used: int | None = None
        self._held_audio_ms = self._held_tokens = self._held_nanos = self._held_free = 0

    def use(self, now_s: int) -> Use:
        return Use(self.requests.sum(now_s), self.tokens.sum(now_s), self.audio_ms.sum(now_s))

    def is_idle(self, now_s: int) -> bool:
        use = self.use(now_s)
        return not (self.running or use.requests or use.tokens or use.audio_ms)

    def hold(self, scope: Scope, audio_ms: int, tokens: int, nanos: int, free_tokens: int) -> None:
        self._held_audio_ms += audio_ms
        self._held_tokens += tokens
        self._held_nanos += nanos
        self._held_free += free_tokens if scope.free_tokens is not None else 0

    def free_left(self, scope: Scope) -> int:
        """Tokens of the free quota that no settled request has used."""
        return 0 if scope.free_tokens is None else max(0, scope.free_tokens - (self.free_used or 0))

    def grant(self, scope: Scope, tokens: int) -> int:
        """How many of the tokens are free. Of the last request of "free tier only" all are."""
        if scope.free_tokens is None or self.free_used is None:
            return 0
        left = max(0, scope.free_tokens - self.free_used - self._held_free)
        return tokens if left and scope.only_free else min(left, tokens)

    def refuses_request(self, scope: Scope, now_s: int) -> Iterator[tuple[Reason, int]]:
        """Why one more request is refused, and when to try again."""
        limits, requests = scope.limits, self.requests
        if limits.concurrent_requests is not None and self.running >= limits.concurrent_requests:
            yield Reason.CONCURRENT_REQUESTS, 1
        if (limit := limits.requests_per_minute) is not None:
            if requests.sum(now_s) + 1 > limit:
                yield Reason.REQUESTS_PER_MINUTE, requests.room_in_s(1, limit, now_s)
            if requests.sum(now_s, seconds=_BURST_S) + 1 > scope.burst:
                yield Reason.BURST, _BURST_S
        yield from self._refuses_spending(scope, 1, 0)

    def refuses_amounts(self, scope: Scope, amounts: Amounts, nanos: int, now_s: int) -> Iterator[tuple[Reason, int]]:
        """Why so much is refused, and when to try again."""
        limits = scope.limits
        if (limit := limits.tokens_per_minute) is not None and self.tokens.sum(now_s) + amounts.tokens > limit:
            yield Reason.TOKENS_PER_MINUTE, self.tokens.room_in_s(amounts.tokens, limit, now_s)
        if (limit := limits.audio_seconds_per_minute) is not None:
            limit_ms = 1000 * limit
            if self.audio_ms.sum(now_s) + amounts.audio_ms > limit_ms:
                yield Reason.AUDIO_SECONDS_PER_MINUTE, self.audio_ms.room_in_s(amounts.audio_ms, limit_ms, now_s)
        limit = limits.concurrent_audio_seconds
        if limit is not None and self._held_audio_ms + amounts.audio_ms > 1000 * limit:
            yield Reason.CONCURRENT_AUDIO_SECONDS, 1
        yield from self._refuses_spending(scope, amounts.tokens, nanos)

    def _refuses_spending(self, scope: Scope, tokens: int, nanos: int) -> Iterator[tuple[Reason, int]]:
        limits, sums = scope.limits, self.sums
        if scope.has_budget:
            if sums is None:
                yield Reason.UNSEEDED, 0
                return
            tokens, nanos = tokens + self._held_tokens, nanos + self._held_nanos
            for reason, spent, limit in (
                (Reason.TOKENS_PER_DAY, sums.tokens_day + tokens, limits.tokens_per_day),
                (Reason.TOKENS_PER_MONTH, sums.tokens_month + tokens, limits.tokens_per_month),
                (Reason.NANOS_PER_DAY, sums.nanos_day + nanos, limits.nanos_per_day),
                (Reason.NANOS_PER_MONTH, sums.nanos_month + nanos, limits.nanos_per_month),
            ):
                if spent > (math.inf if limit is None else limit):
                    yield reason, 0
        if scope.free_tokens is not None:
            if self.free_used is None:
                yield Reason.UNSEEDED, 0
            elif scope.only_free and self.free_used + self._held_free >= scope.free_tokens:
                yield Reason.FREE_TIER, 0
