"""Random requests through limits, ledger, metrics and bills, and what each must cost, calculated separately.

The service's parts are the real ones; the clock, the audio's lengths, the engine's output and the endings are random.
What is expected is computed here, from the rule of `serving/tenancy/BILLS.md`: nothing is taken from the code under
test but the free tokens of each record, of which the sums are checked.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import itertools
import random
from collections import Counter
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from math import ceil
from typing import TYPE_CHECKING, Any
from unittest import mock

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from serving import errors
from serving.observability.metrics import Metrics
from serving.tenancy import usage_session
from serving.tenancy.billing.prices import Price, PriceList
from serving.tenancy.ledger.ledger import Ledger
from serving.tenancy.limits.limiter import Limiter
from serving.tenancy.usage_session import UsageSession, UsageSessions
from serving.types import (
    Caller,
    CaptionRequest,
    FinishReason,
    FreeQuota,
    InlineAudio,
    Limits,
    Region,
    Sampling,
    Usage,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import sqlalchemy as sa

    from serving.observability.request_record import RequestRecord
    from serving.tenancy.limits.counter_store import CounterStore

START_MS = int(dt.datetime(2096, 1, 20, tzinfo=dt.UTC).timestamp()) * 1000
DAY_MS = 86_400_000
DAYS = 60
"""Days over which the requests are spread: from January over a leap day into March."""

PRICES = {
    Region.BEIJING: [(0, "CNY", "0.0158", "0.0127"), (11, "CNY", "0.02", "0.03"), (41, "CNY", "0.000007", "1.5")],
    Region.SINGAPORE: [(0, "CNY", "0.0272", "0.0218"), (25, "USD", "0.003813", "0.002999"), (40, "USD", "0", "0.004")],
}
"""Prices of 1,000 tokens, from a day after the start on."""

NEVER_S = 1e11
TENANTS = {
    "plain": (Limits(), None),
    "budgets": (
        Limits(tokens_per_day=9000, tokens_per_month=60_000, nanos_per_day=10**9, nanos_per_month=10**10),
        None,
    ),
    "free": (Limits(), FreeQuota(4000, NEVER_S)),
    "free-alone": (Limits(), FreeQuota(3000, NEVER_S, only=True)),
    "all": (
        Limits(tokens_per_day=20_000, nanos_per_month=10**11, tokens_per_minute=10**6),
        FreeQuota(2000, NEVER_S),
    ),
}
"""Tenants of each region, of each kind: limits and free quota."""

ENDINGS = ("finished", "length", "partial", "retried", "left", "left_queued", "unreadable", "full", "lost", "stopped")
WEIGHTS = (40, 8, 5, 5, 12, 5, 5, 5, 10, 5)


@dataclass
class Expected:
    """Record that one admitted request must leave."""

    tenant: str
    key: str
    opened_at: int
    price: tuple[str, str, str]
    """Currency, and the prices of 1,000 input and output tokens."""
    ending: str = "rejected"
    audio_tokens: int = 0
    output_tokens: int = 0
    billed: bool = False

    @property
    def input_tokens(self) -> int:
        """Audio and scaffold."""
        return self.audio_tokens + 8 if self.audio_tokens else 0

    @property
    def day(self) -> str:
        """The day (UTC) of the admission."""
        return dt.datetime.fromtimestamp(self.opened_at / 1000, dt.UTC).date().isoformat()

    @property
    def list_nanos(self) -> Fraction:
        """The price of all tokens."""
        _, of_input, of_output = self.price
        units = self.input_tokens * Fraction(of_input) + self.output_tokens * Fraction(of_output)
        return units * 10**6 if self.billed else Fraction(0)

    def amount_nanos(self, free_tokens: int) -> int:
        """Return the price of the tokens that are not free, rounded up."""
        tokens = self.input_tokens + self.output_tokens
        return ceil(self.list_nanos * (tokens - free_tokens) / tokens) if tokens else 0


@dataclass
class World:
    """The parts of the service, the clock, and what is expected of the requests that were made."""

    sessions: UsageSessions
    metrics: Metrics
    chance: random.Random
    now_ms: int = START_MS
    expected: dict[str, Expected] = field(default_factory=dict)
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Requests by tenant and outcome, those without a record included."""

    def callers(self) -> list[Caller]:
        """Return every key of every tenant; the second key of a tenant has another budget."""
        return [
            Caller(
                f"{region}-{kind}",
                f"key-{region}-{kind}-{number}",
                region,
                tenant_limits=limits,
                key_limits=Limits(tokens_per_day=3000) if number == 2 else Limits(),
                free_quota=quota,
            )
            for region, (kind, (limits, quota)), number in itertools.product(PRICES, TENANTS.items(), (1, 2))
        ]

    async def request(self, number: int, caller: Caller) -> None:
        """Make one request that ends in a random way."""
        chance = self.chance
        record = self.metrics.begin(f"r{number}", chance.choice(("openai", "dashscope")))
        record.caller, record.stream = caller.tenant_id, chance.random() < 0.5
        error: BaseException | None = None
        try:
            async with self.sessions.session(caller, record) as session:
                await self._caption(session, record, chance.choices(ENDINGS, WEIGHTS)[0])
        except (errors.CaptionerError, asyncio.CancelledError) as raised:
            error = raised
        self.metrics.finish(record, error)
        expected = self.expected.get(record.request_id)
        self.outcomes[caller.tenant_id, expected.ending if expected else "rejected"] += 1

    async def _caption(self, session: UsageSession, record: RequestRecord, ending: str) -> None:
        chance, at_ms = self.chance, self.now_ms
        await session.admit()
        await self._pass_time()
        sampling = Sampling(max_tokens=chance.choice((1, 30, 2048)), stop=("x",) if chance.random() < 0.2 else ())
        session.open(CaptionRequest(record.request_id, "m", InlineAudio(""), sampling))
        caller = session.caller
        expected = self.expected[record.request_id] = Expected(
            caller.tenant_id, caller.key_id, at_ms, _price(caller.region, at_ms)
        )
        await self._pass_time()
        if ending == "unreadable":
            raise errors.AudioUnreadable
        samples = chance.choice((1, 16_000, 96_640, chance.randrange(1, 40 * 16_000)))
        record.samples = samples
        expected.audio_tokens = max(13, ceil(Fraction(25, 2) * Fraction(samples, 16_000)))
        record.usage = Usage(expected.audio_tokens)
        allowed = await session.charge()
        assert allowed is not None
        await self._pass_time()
        if ending == "left_queued":
            expected.ending = "disconnected"
            raise errors.Disconnected
        if ending == "full":
            expected.ending = "failed"
            raise errors.Overloaded(reason="engine_queue")
        session.start()
        if ending == "retried":
            record.add_output("lost", 7, None, uncounted_tokens=0)
            record.discard_output()
        tokens = min(allowed, sampling.max_tokens, chance.choice((0, 1, 24, chance.randrange(400))))
        for _ in range(chance.randrange(1, 4)):
            piece = chance.randint(0, tokens - expected.output_tokens)
            self._write(record, expected, piece)
            await self._pass_time()
        match ending:
            case "left":
                expected.billed, expected.ending = True, "disconnected"
                raise errors.Disconnected
            case "lost":
                expected.ending = "failed_midstream"
                raise errors.EngineFailed
            case "stopped":
                expected.ending = "cancelled"
                raise asyncio.CancelledError
        self._write(record, expected, tokens - expected.output_tokens)
        record.finish_reason = FinishReason.LENGTH if ending in {"length", "partial"} else FinishReason.STOP
        record.partial = ending == "partial"
        expected.billed, expected.ending = True, "partial" if record.partial else "finished"
        await session.settle(None)  # before the last byte; a client that leaves now has paid
        if chance.random() < 0.1:
            raise errors.Disconnected

    def _write(self, record: RequestRecord, expected: Expected, tokens: int) -> None:
        record.first_token = record.first_token or record.started
        record.add_output("", tokens, None, uncounted_tokens=self.chance.randrange(3))
        expected.output_tokens += tokens

    async def _pass_time(self) -> None:
        for _ in range(self.chance.randrange(4)):
            await asyncio.sleep(0)

    async def run(self, requests: int, *, concurrency: int = 24) -> None:
        """Make the requests, `concurrency` at a time, while the clock goes on."""
        callers, numbers = self.callers(), iter(range(requests))
        first = len(self.expected)

        async def client() -> None:
            for number in numbers:
                self.now_ms = START_MS + DAYS * DAY_MS * number // requests
                await self.request(first + number, self.chance.choice(callers))
                if self.sessions.ledger.pending > 5000:
                    await asyncio.sleep(0.1)

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(client())

    def series(self) -> dict[tuple[str, ...], Fraction]:
        """Return the counters of tenants and of tokens as a scrape reads them: name, tenant, other label, and value."""
        return {
            (
                sample.name,
                sample.labels.get("tenant", ""),
                *(value for name, value in sample.labels.items() if name != "tenant"),
            ): Fraction(Decimal(repr(sample.value)))
            for family in text_string_to_metric_families(generate_latest(self.metrics.registry).decode())
            for sample in family.samples
            if sample.name.startswith(("captioner_tenant_", "captioner_tokens")) and sample.value
        }


def _price(region: Region, at_ms: int) -> tuple[str, str, str]:
    [*_, (_, *price)] = [entry for entry in PRICES[region] if START_MS + entry[0] * DAY_MS <= at_ms]
    currency, of_input, of_output = price
    return currency, of_input, of_output


@contextlib.asynccontextmanager
async def world(
    directory: Path, database: sa.Engine, store: CounterStore, *, seed: int, named_tenants: int = 100
) -> AsyncIterator[World]:
    """Yield a world over an empty database with tables and an empty store."""
    prices = PriceList(
        (region, START_MS + day * DAY_MS, Price.of(currency, Decimal(of_input), Decimal(of_output)))
        for region, entries in PRICES.items()
        for day, currency, of_input, of_output in entries
    )
    ledger = Ledger(database, directory, max_journal_bytes=1 << 32)
    limiter = Limiter(store, ledger.spent)
    sessions = UsageSessions(limiter, ledger, prices.at)
    made = World(sessions, Metrics(tenants=named_tenants), random.Random(seed))
    with mock.patch.object(usage_session, "now_ms", side_effect=lambda: made.now_ms):
        await ledger.start()
        await limiter.start()
        try:
            yield made
        finally:
            await sessions.stop()
            await limiter.stop()
            await ledger.stop()


def amount(text: Any) -> int:
    """Return a printed amount of money in nano-units."""
    nanos = Decimal(text) * 10**9
    assert nanos == int(nanos)
    return int(nanos)
