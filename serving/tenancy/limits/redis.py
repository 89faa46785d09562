"""Counters of limits in Redis (or Valkey), for all replicas together.

Each step is one call of the script `redis.lua`; the steps of all requests that arrive during a round trip share the
next one. Reservations of a process count in Redis only as long as the process lives: it renews a key every few
seconds, and its reservations end with that key.

While Redis does not answer, this process counts in memory: limits then hold per process. When Redis is back, what is
reserved here now and what was billed meanwhile are sent to it.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import redis.asyncio
from redis.exceptions import RedisError

from serving.tenancy.limits.counter_store import Answer, Reason, Use, nanos_to_pay
from serving.tenancy.limits.memory import MemoryStore
from serving.tenancy.limits.redis_script import SCRIPT, Numbers, Reply, limit_values

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from serving.tenancy.limits.counter_store import Period, Reservation, Scope, Sums
    from serving.tenancy.limits.spending import Amounts

log = logging.getLogger(__name__)

_TIMEOUT_S = 2.0
"""Redis is considered lost when it has not answered for this time."""

_LIFE_S = 20
"""Reservations of a process end this time after it renewed its key last."""

_RENEW_EVERY_S = 5.0
_RETRY_S = 1.0
_BATCH = 128

_BILLED_S = 40 * 86_400
"""Life of the sums of what was billed; later, or if they are lost, they are read from the ledger again."""


@dataclass(frozen=True, slots=True)
class _Call:
    """A step on its way to Redis. The answer is `None` if Redis gave none."""

    arguments: Sequence[Any]
    on_reply: Callable[[Sequence[int]], Answer]
    on_lost: Callable[[], None]
    answer: asyncio.Future[Answer | None]


class RedisStore:
    """A `CounterStore` in Redis."""

    def __init__(self, url: str) -> None:
        self.fallbacks = 0
        self._redis = redis.asyncio.Redis.from_url(url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S)
        self._memory = MemoryStore()
        self._live: set[Reservation] = set()
        self._unsent: defaultdict[tuple[Scope, Period], list[int]] = defaultdict(lambda: [0, 0, 0])
        self._holder = ""
        self._script = ""
        self._up = False
        self._calls: list[_Call] = []
        self._sending: asyncio.Task[None] | None = None
        self._renewing: asyncio.Task[None] | None = None

    @property
    def degraded(self) -> bool:
        """True while limits hold per process, because Redis does not answer."""
        return not self._up

    async def start(self) -> None:
        await self._renew()
        self._renewing = asyncio.create_task(self._renew_forever())

    async def stop(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait((self._renewing,))
        while self._sending is not None and not self._sending.done():
            await asyncio.wait((self._sending,))
        if self._up:
            self._up = False
            with suppress(RedisError, OSError):  # the key expires in a few seconds
                await self._redis.delete(_holder_key(self._holder))
        await self._redis.aclose()

    async def admit(self, reservation: Reservation, smallest: Amounts) -> Answer:

        def on_reply(fields: Sequence[int]) -> Answer:
            answer = _answer(fields)
            if answer.reason is Reason.NONE:
                reservation.admitted = True
                self._live.add(reservation)
            return answer

        answer = await self._call("admit", reservation, smallest, on_reply)
        if answer is None:
            answer = await self._memory.admit(reservation, smallest)
            if reservation.admitted:
                self._live.add(reservation)
        return answer

    async def charge(self, reservation: Reservation, amounts: Amounts) -> Answer:

        def on_reply(fields: Sequence[int]) -> Answer:
            answer, reply = _answer(fields), Reply(*fields[: len(Reply._fields)])
            if answer.reason is Reason.NONE:
                reservation.reserve(amounts, answer.output_tokens)
                reservation.free_left, reservation.charged_s = reply.free_left, reply.now_s
            return answer

        answer = await self._call("charge", reservation, amounts, on_reply)
        return answer if answer is not None else await self._memory.charge(reservation, amounts)

    async def settle(self, reservation: Reservation, tokens: int, nanos: int) -> int:
        has_quota = any(scope.free_tokens is not None for scope in reservation.scopes)
        # If the counters do not answer: what was left of the quota when the audio was known.
        fallback = min(reservation.free_left, tokens) if has_quota else 0
        sent = self._settle(reservation, tokens, nanos, fallback)
        if isinstance(sent, int):
            return sent
        if not (has_quota and tokens):
            return 0
        settled = await sent
        return fallback if settled is None else settled.free_tokens

    def _settle(
        self, reservation: Reservation, tokens: int, nanos: int, fallback: int
    ) -> asyncio.Future[Answer | None] | int:
        """Send the settlement without waiting; if Redis is lost, settle here and return the free tokens."""
        if (pending := reservation.pending) and not pending.done():  # cancelled within a step: nothing is billed
            pending.add_done_callback(lambda _: self._settle(reservation, tokens, nanos, fallback))
            return 0
        if not reservation.admitted:
            return 0
        self._live.discard(reservation)

        def keep_unsent(free_tokens: int) -> None:
            for scope in reservation.scopes:
                for index, amount in enumerate((tokens, nanos_to_pay(nanos, free_tokens, tokens), free_tokens)):
                    self._unsent[scope, reservation.period][index] += amount

        if not self._up:
            free_tokens = self._memory.settle_now(reservation, tokens, nanos)
            keep_unsent(free_tokens)
            return free_tokens
        reservation.admitted = False
        return self._send(
            "settle",
            reservation.scopes,
            reservation.period,
            Numbers.of(reservation)._replace(tokens=tokens, nanos=nanos),
            on_lost=lambda: keep_unsent(fallback),
        )

    async def seed(self, scope: Scope, period: Period, sums: Sums, free_tokens: int) -> None:
        if not self._up:
            await self._memory.seed(scope, period, sums, free_tokens)
            return
        pipeline = self._redis.pipeline(transaction=True)
        for key, tokens, nanos in (
            (f"{_key(scope)}:d:{period.day}", sums.tokens_per_day, sums.nanos_per_day),
            (f"{_key(scope)}:m:{period.month}", sums.tokens_per_month, sums.nanos_per_month),
        ):
            pipeline.hsetnx(key, "t", str(tokens))
            pipeline.hsetnx(key, f"n:{period.currency}", str(nanos))
            pipeline.expire(key, _BILLED_S)
        pipeline.set(f"{_key(scope)}:free", free_tokens, nx=True, ex=_BILLED_S)
        try:
            await pipeline.execute()
        except (RedisError, OSError) as error:
            self._lose(error)
            await self._memory.seed(scope, period, sums, free_tokens)

    async def _call(
        self, step: str, reservation: Reservation, amounts: Amounts, on_reply: Callable[[Sequence[int]], Answer]
    ) -> Answer | None:
        """Take a step in Redis. Cancelled, it continues, and is `pending` in the reservation until it is done."""
        answer = None
        if self._up:
            numbers = Numbers(**asdict(amounts))
            reservation.pending = self._send(step, reservation.scopes, reservation.period, numbers, on_reply)
            answer = await asyncio.shield(reservation.pending)
        self.fallbacks += answer is None
        return answer

    def _send(  # noqa: PLR0917 - private
        self,
        step: str,
        scopes: Sequence[Scope],
        period: Period,
        numbers: Numbers,
        on_reply: Callable[[Sequence[int]], Answer] | None = None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> asyncio.Future[Answer | None]:
        arguments = [len(scopes), *map(_key, scopes), step, self._holder, *period, *numbers]
        for scope in scopes:
            arguments += limit_values(scope)
        call = _Call(arguments, on_reply or _answer, on_lost, asyncio.get_running_loop().create_future())
        self._calls.append(call)
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send_all())
        return call.answer

    async def _send_all(self) -> None:
        """Send all calls; those that arrive meanwhile share the next round trip."""
        while self._calls:
            calls, self._calls = self._calls[:_BATCH], self._calls[_BATCH:]
            replies: Sequence[Any] = [None] * len(calls)
            if self._up:
                pipeline = self._redis.pipeline(transaction=False)
                for call in calls:
                    pipeline.execute_command("EVALSHA", self._script, *call.arguments)
                try:
                    replies = await pipeline.execute(raise_on_error=False)
                except (RedisError, OSError) as error:
                    self._lose(error)
            for call, reply in zip(calls, replies, strict=True):
                if isinstance(reply, list):
                    call.answer.set_result(call.on_reply(reply))
                    continue
                if isinstance(reply, Exception):
                    self._lose(reply)
                call.on_lost()
                call.answer.set_result(None)

    async def _renew_forever(self) -> None:
        while True:
            await asyncio.sleep(_RENEW_EVERY_S if self._up else _RETRY_S)
            await self._renew()

    async def _renew(self) -> None:
        """Renew this process's key; if Redis was lost, connect, and send what is reserved here and what was billed."""
        try:
            if self._up and await self._redis.set(_holder_key(self._holder), 1, xx=True, ex=_LIFE_S):
                return
            if self._up:
                self._lose(RedisError("this process has been taken for dead"))
            old, holder = self._holder, uuid.uuid4().hex
            self._script = await self._redis.script_load(SCRIPT)
            await self._redis.set(_holder_key(holder), 1, ex=_LIFE_S)
            if old:
                await self._redis.delete(_holder_key(old))
        except (RedisError, OSError) as error:
            self._lose(error)
            return
        # From here on nothing waits, so that no step is taken between the two stores.
        log.info("Redis connected, limits hold for all replicas")
        self._holder, self._up = holder, True
        for reservation in self._live:
            self._send("adopt", reservation.scopes, reservation.period, Numbers.of(reservation))
        unsent, self._unsent = self._unsent, defaultdict(self._unsent.default_factory)
        for (scope, period), (tokens, nanos, free_tokens) in unsent.items():
            self._send("bill", [scope], period, Numbers(tokens=tokens, nanos=nanos, free_tokens=free_tokens))

    def _lose(self, error: Exception) -> None:
        if self._up or not self._holder:
            log.warning("Redis lost, limits hold per process", extra={"error": type(error).__name__})
        self._holder = self._holder or "none"
        if self._up:
            self._up = False
            self._memory = MemoryStore()
            for reservation in self._live:
                self._memory.adopt(reservation)


def _key(scope: Scope) -> str:
    return f"captioner:{scope.name}"


def _holder_key(holder: str) -> str:
    return f"captioner:holder:{holder}"


def _answer(fields: Sequence[int]) -> Answer:
    reply, sums = Reply(*fields[: len(Reply._fields)]), fields[len(Reply._fields) :]
    uses = [Use(*sums[index : index + len(Use._fields)]) for index in range(0, len(sums), len(Use._fields))]
    return Answer(Reason(reply.reason), reply.retry_after_s, uses, reply.free_tokens, reply.output_tokens)
