"""Limits counted in Redis (or Valkey), for all replicas together.

Each step is one script (`limits.lua`); the steps of all requests that come while a round trip is under way share the
next one. What a process holds is Redis's to count only as long as the process lives: it says so every few seconds, and
what it held ends with it.

While Redis does not answer, this process counts by itself: limits then hold per process. When Redis is back, it is told
what is held here now, and what was billed meanwhile.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import uuid
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import redis.asyncio
from redis.exceptions import RedisError

from serving.tenancy.limits.limiter import Answer, Held, Reason, Use, not_free
from serving.tenancy.limits.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from serving.tenancy.limits.limiter import Amounts, Scope, Sums

log = logging.getLogger(__name__)

_SCRIPT = Path(__file__).with_name("redis.lua").read_text()

_TIMEOUT_S = 2.0
"""Redis that has not answered for so long is taken for gone."""

_LIFE_S = 20
"""What a process holds ends so long after it has said last that it lives."""

_SAY_EVERY_S = 5.0
_RETRY_S = 1.0
_BATCH = 128

_BILLED_S = 40 * 86_400
"""What was billed is remembered so long; after that, or if it is lost, it is read from the ledger again."""


@dataclass(frozen=True, slots=True)
class _Call:
    """One step on its way to Redis. Its answer is `None` if Redis gave none."""

    held: Held
    arguments: Sequence[Any]
    take: Callable[[Sequence[int]], Answer | None]
    lost: Callable[[], None]
    answer: asyncio.Future[Answer | None]


class RedisStore:
    """A `Store` in Redis. `fallbacks` counts the steps that were taken without it."""

    def __init__(self, url: str) -> None:
        self.fallbacks = 0
        self._redis = redis.asyncio.Redis.from_url(url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S)
        self._memory = MemoryStore()
        self._live: set[Held] = set()
        self._owed: defaultdict[tuple[Scope, tuple[str, str]], list[int]] = defaultdict(lambda: [0, 0, 0])
        self._holder = ""
        self._script = ""
        self._up = False
        self._calls: list[_Call] = []
        self._sending: asyncio.Task[None] | None = None
        self._living: asyncio.Task[None] | None = None

    @property
    def degraded(self) -> bool:
        """Whether limits hold per process now, since Redis does not answer."""
        return not self._up

    async def start(self) -> None:
        """See `Store`."""
        await self._say()
        self._living = asyncio.create_task(self._live_on())

    async def stop(self) -> None:
        """See `Store`."""
        if self._living is not None:
            self._living.cancel()
            await asyncio.wait((self._living,))
        while self._sending is not None and not self._sending.done():
            await asyncio.wait((self._sending,))
        if self._up:
            self._up = False
            with suppress(RedisError, OSError):  # it learns in a few seconds
                await self._redis.delete(_holder_key(self._holder))
        await self._redis.aclose()

    async def admit(self, held: Held, periods: tuple[str, str]) -> Answer:
        """See `Store`."""

        def take(told: Sequence[int]) -> Answer:
            if told[0] == Reason.NONE:
                held.admitted = True
                self._live.add(held)
            return _answer(told)

        answer = await self._ask("admit", held, periods, [0, 0, 0, 0], take)
        if answer is None:
            answer = await self._memory.admit(held, periods)
            if held.admitted:
                self._live.add(held)
        return answer

    async def charge(self, held: Held, periods: tuple[str, str], amounts: Amounts) -> Answer:
        """See `Store`."""

        def take(told: Sequence[int]) -> Answer:
            reason, _, free_tokens, free_left, now_s, *_ = told
            if reason == Reason.NONE:
                held.audio_ms, held.tokens, held.charged_s = amounts.audio_ms, amounts.tokens, now_s
                held.nanos, held.free_tokens = not_free(amounts.nanos, free_tokens, amounts.tokens), free_tokens
                held.free_left = free_left
            return _answer(told)

        given = [amounts.audio_ms, amounts.tokens, amounts.nanos, 0]
        answer = await self._ask("charge", held, periods, given, take)
        return answer if answer is not None else await self._memory.charge(held, periods, amounts)

    async def settle(self, held: Held, periods: tuple[str, str], tokens: int, nanos: int) -> int:
        """See `Store`."""
        has_quota = any(scope.free_tokens is not None for scope in held.scopes)
        # Where the counters do not answer: what was left of the quota when the audio was known.
        kept = min(held.free_left, tokens) if has_quota else 0
        sent = self._settle(held, periods, tokens, nanos, kept)
        if isinstance(sent, int):
            return sent
        if not (has_quota and tokens):
            return 0
        settled = await sent
        return kept if settled is None else settled.free_tokens

    def _settle(
        self, held: Held, periods: tuple[str, str], tokens: int, nanos: int, kept: int
    ) -> asyncio.Future[Answer | None] | int:
        """Send the settling without waiting; if Redis is away, settle here and return the free tokens."""
        if held.pending is not None and not held.pending.done():  # cut within a step: nothing is billed
            held.pending.add_done_callback(lambda _: self._settle(held, periods, tokens, nanos, kept))
            return 0
        if not held.admitted:
            return 0
        self._live.discard(held)

        def owe(free_tokens: int) -> None:
            for scope in held.scopes:
                for index, amount in enumerate((tokens, not_free(nanos, free_tokens, tokens), free_tokens)):
                    self._owed[scope, periods][index] += amount

        if not self._up:
            free_tokens = self._memory.settle_now(held, periods, tokens, nanos)
            owe(free_tokens)
            return free_tokens
        held.admitted = False
        return self._send(
            "settle",
            held,
            periods,
            [held.audio_ms, tokens, nanos, held.free_tokens],
            take=lambda told: Answer(free_tokens=told[2]),
            lost=lambda: owe(kept),
        )

    async def seed(self, scope: Scope, periods: tuple[str, str], sums: Sums, free_tokens: int) -> None:
        """See `Store`."""
        if not self._up:
            await self._memory.seed(scope, periods, sums, free_tokens)
            return
        day, month = periods
        pipeline = self._redis.pipeline(transaction=True)
        for key, tokens, nanos in (
            (f"{_key(scope)}:d:{day}", sums.tokens_per_day, sums.nanos_per_day),
            (f"{_key(scope)}:m:{month}", sums.tokens_per_month, sums.nanos_per_month),
        ):
            pipeline.hsetnx(key, "t", str(tokens))
            pipeline.hsetnx(key, "n", str(nanos))
            pipeline.expire(key, _BILLED_S)
        pipeline.set(f"{_key(scope)}:free", free_tokens, nx=True, ex=_BILLED_S)
        try:
            await pipeline.execute()
        except (RedisError, OSError) as error:
            self._lose(error)
            await self._memory.seed(scope, periods, sums, free_tokens)

    async def _ask(
        self,
        step: str,
        held: Held,
        periods: tuple[str, str],
        amounts: Sequence[int],
        take: Callable[[Sequence[int]], Answer | None],
    ) -> Answer | None:
        """Take a step in Redis. Cancelled, it goes on, and is `pending` in `held` until it has ended."""
        answer = None
        if self._up:
            held.pending = self._send(step, held, periods, amounts, take)
            answer = await asyncio.shield(held.pending)
        self.fallbacks += answer is None
        return answer

    def _send(  # noqa: PLR0917 - two callers
        self,
        step: str,
        held: Held,
        periods: tuple[str, str],
        amounts: Sequence[int],
        take: Callable[[Sequence[int]], Answer | None] = lambda _: None,
        lost: Callable[[], None] = lambda: None,
    ) -> asyncio.Future[Answer | None]:
        keys = [_key(scope) for scope in held.scopes]
        arguments = [len(keys), *keys, step, self._holder, *periods, *amounts, held.charged_s]
        for scope in held.scopes:
            arguments += _values(scope)
        arguments += held.tokens, held.nanos, held.free_left
        call = _Call(held, arguments, take, lost, asyncio.get_running_loop().create_future())
        self._calls.append(call)
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send_all())
        return call.answer

    async def _send_all(self) -> None:
        """Send what is to be sent; what comes meanwhile goes together in the next round trip."""
        while self._calls:
            calls, self._calls = self._calls[:_BATCH], self._calls[_BATCH:]
            told: Sequence[Any] = [None] * len(calls)
            if self._up:
                pipeline = self._redis.pipeline(transaction=False)
                for call in calls:
                    pipeline.execute_command("EVALSHA", self._script, *call.arguments)
                try:
                    told = await pipeline.execute(raise_on_error=False)
                except (RedisError, OSError) as error:
                    self._lose(error)
            for call, answer in zip(calls, told, strict=True):
                if isinstance(answer, list):
                    call.answer.set_result(call.take(answer))
                    continue
                if isinstance(answer, Exception):
                    self._lose(answer)
                call.lost()
                call.answer.set_result(None)

    async def _live_on(self) -> None:
        while True:
            await asyncio.sleep(_SAY_EVERY_S if self._up else _RETRY_S)
            await self._say()

    async def _say(self) -> None:
        """Tell Redis that this process lives; if it was lost, also what is held here and was billed meanwhile."""
        try:
            if self._up and await self._redis.set(_holder_key(self._holder), 1, xx=True, ex=_LIFE_S):
                return
            if self._up:
                self._lose(RedisError("this process has been taken for dead"))
            old, holder = self._holder, uuid.uuid4().hex
            self._script = await self._redis.script_load(_SCRIPT)
            await self._redis.set(_holder_key(holder), 1, ex=_LIFE_S)
            if old:
                await self._redis.delete(_holder_key(old))
        except (RedisError, OSError) as error:
            self._lose(error)
            return
        # From here on nothing waits, so that nothing comes or ends unseen between here and there.
        log.info("limits are counted in Redis")
        self._holder, self._up = holder, True
        for held in self._live:
            amounts = [held.audio_ms, held.tokens, held.nanos, held.free_tokens]
            self._send("adopt", held, _NO_PERIODS, amounts)
        owed, self._owed = self._owed, defaultdict(self._owed.default_factory)
        for (scope, periods), (tokens, nanos, free_tokens) in owed.items():
            self._send("bill", Held([scope]), periods, [0, tokens, nanos, free_tokens])

    def _lose(self, error: Exception) -> None:
        if self._up or not self._holder:
            log.warning("Redis does not answer: limits hold per process", extra={"error": type(error).__name__})
        self._holder = self._holder or "none"
        if self._up:
            self._up = False
            self._memory = MemoryStore()
            for held in self._live:
                self._memory.adopt(held)


_NO_PERIODS = ("", "")


def _key(scope: Scope) -> str:
    return f"captioner:{scope.name}"


def _holder_key(holder: str) -> str:
    return f"captioner:holder:{holder}"


@functools.lru_cache(4096)
def _values(scope: Scope) -> Sequence[int]:
    """The limits as the script reads them."""
    limits = scope.limits
    audio_s, concurrent_s = limits.audio_seconds_per_minute, limits.concurrent_audio_seconds
    values = (
        limits.requests_per_minute,
        scope.burst,
        limits.concurrent_requests,
        limits.tokens_per_minute,
        None if audio_s is None else 1000 * audio_s,
        None if concurrent_s is None else 1000 * concurrent_s,
        limits.tokens_per_day,
        limits.tokens_per_month,
        limits.nanos_per_day,
        limits.nanos_per_month,
        scope.free_tokens,
    )
    return [*(-1 if value is None else value for value in values), int(scope.only_free), int(scope.has_budget)]


def _answer(told: Sequence[int]) -> Answer:
    reason, retry_after_s, _, _, _, *sums = told
    uses = [Use(*sums[index : index + 3]) for index in range(0, len(sums), 3)]
    return Answer(Reason(reason), retry_after_s, uses)
