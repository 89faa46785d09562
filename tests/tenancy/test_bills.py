"""Rules of bills: free quota by region, one period per request, one currency per sum, and headers that state them."""

from __future__ import annotations

import datetime as dt
import time
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from serving.errors import BudgetExhausted
from serving.tenancy import plans
from serving.tenancy.billing.prices import Price
from serving.tenancy.ledger import usage_table
from serving.tenancy.ledger.usage_record import UsageRecord
from serving.tenancy.limits.counter_store import Spent, Sums
from serving.tenancy.limits.memory import MemoryStore
from serving.tenancy.limits.redis import RedisStore
from serving.tenancy.limits.spending import Amounts
from serving.tenancy.schema import usage_records
from serving.types import Caller, CaptionRequest, FinishReason, FreeQuota, InlineAudio, Limits, Sampling, Usage
from tests.tenancy.limits_support import caller, charge, limiter
from tests.tenancy.random_bills import world
from tests.tenancy.test_usage_session import TENANT

if TYPE_CHECKING:
    from pathlib import Path

    from serving.tenancy.limits.counter_store import CounterStore

PLAN = {"free_tokens": 1_000_000, "free_days": 90}
DAY_MS = 86_400_000
NEW_YEAR_MS = 1_798_761_600_000  # 2027-01-01, 00:00 UTC


@pytest.fixture(params=["memory", "redis"])
def store(request: pytest.FixtureRequest) -> CounterStore:
    """An empty store of each kind."""
    return MemoryStore() if request.param == "memory" else RedisStore(request.getfixturevalue("redis_server").url)


@pytest.mark.parametrize(
    ("region", "own", "tokens"),
    [("beijing", None, 1_000_000), ("singapore", None, None), ("singapore", 500, 500), ("beijing", 0, None)],
)
def test_the_free_quota_of_a_plan_depends_on_the_region(region: str, own: int | None, tokens: int | None) -> None:
    """The manual has a free quota in Beijing and none in Singapore; a tenant's own one counts in every region."""
    tenant = TENANT | {"region": region, "free_tokens": own, "free_days": None, "activated_at": 0}
    quota = plans.free_quota(PLAN, tenant)
    assert quota == (None if tokens is None else FreeQuota(tokens, 90 * 86_400.0))


def test_free_tier_only_in_a_region_without_free_quota() -> None:
    """A tenant that may use free tokens alone is refused where it has none."""
    tenant = TENANT | {"region": "singapore", "free_tokens": None, "free_days": None, "free_only": True}
    assert plans.free_quota(PLAN, tenant) == FreeQuota(0, 90 * 86_400.0, only=True)


async def test_a_caption_over_midnight_counts_in_the_period_of_its_admission(store: CounterStore) -> None:
    """Its tokens count on the old day and in the old month, also once requests of the new ones have been admitted."""
    async with limiter(store) as limits:
        who = caller(Limits(tokens_per_day=1000, tokens_per_month=1500))
        old = await limits.admit(who, at_ms=NEW_YEAR_MS - 1)
        await charge(limits, old, tokens=900)
        await limits.settle(await limits.admit(who, at_ms=NEW_YEAR_MS), tokens=0, nanos=0)
        assert await limits.settle(old, tokens=900, nanos=0) == 0
        new = await limits.admit(who, at_ms=NEW_YEAR_MS)
        assert new.headers["x-ratelimit-remaining-tokens-day"] == "1000"
        assert new.headers["x-ratelimit-remaining-tokens-month"] == "1500"
        await charge(limits, new, tokens=1000)
        await limits.settle(new, tokens=1000, nanos=0)
        late = await limits.admit(who, at_ms=NEW_YEAR_MS - 1)
        assert late.headers["x-ratelimit-remaining-tokens-day"] == "100"
        assert late.headers["x-ratelimit-remaining-tokens-month"] == "600"


async def test_a_price_that_changes_during_a_caption_holds_for_later_ones(
    store: CounterStore, database: sa.Engine, tmp_path: Path
) -> None:
    """Record and money budget have the price of the admission, even in another currency; the next caption has the new.

    A caption of 1 s and 24 tokens costs 21 x 15,800 + 24 x 12,700 = 636,600 nano-units, then 21 x 3,000 + 24 x 1,000.
    """
    old, new = Price("CNY", 15_800, 12_700), Price("USD", 3000, 1000)
    current = [old]
    who = caller(Limits(nanos_per_day=1_000_000))
    async with world(tmp_path, database, store, seed=1) as made:
        made.sessions.prices = lambda *_: current[-1]

        async def caption(*, changes: bool) -> str:
            record = made.metrics.begin(f"changes {changes}", "openai")
            async with made.sessions.session(who, record) as session:
                await session.admit()
                session.open(CaptionRequest(record.request_id, "m", InlineAudio(""), Sampling(max_tokens=24)))
                record.samples, record.usage = 16_000, Usage(13)
                await session.charge()
                if changes:
                    current.append(new)
                session.start()
                record.add_output("", 24, FinishReason.STOP, uncounted_tokens=0)
            following = await made.sessions.limiter.admit(who, at_ms=made.now_ms, currency=session._price.currency)
            await made.sessions.limiter.settle(following, tokens=0, nanos=0)
            return following.headers["x-ratelimit-remaining-money-day"]

        assert await caption(changes=True) == "0.0003634"
        assert await caption(changes=False) == "0.000913"
    with database.connect() as connection:
        rows = connection.execute(sa.select(usage_records).order_by(usage_records.c.amount_nanos.desc())).all()
    assert [(row.currency, row.input_price, row.output_price, row.amount_nanos) for row in rows] == [
        ("CNY", "0.0158", "0.0127", 636_600),
        ("USD", "0.003", "0.001", 87_000),
    ]


async def test_the_sum_of_a_month_is_kept_to_its_end(store: CounterStore) -> None:
    """A month's budget counts the captions of all its days, without the ledger's help, where the last may be missing.

    The ledger of this test has nothing, so a sum that is dropped on the way is read again as 0.
    """
    async with limiter(store) as limits:
        who = caller(Limits(tokens_per_month=1000))
        for day in range(31):
            reservation = await limits.admit(who, at_ms=NEW_YEAR_MS + day * DAY_MS)
            await charge(limits, reservation, tokens=10)
            await limits.settle(reservation, tokens=10, nanos=0)
        last = await limits.admit(who, at_ms=NEW_YEAR_MS + 31 * DAY_MS - 1)
        assert last.headers["x-ratelimit-remaining-tokens-month"] == "690"
        following = await limits.admit(who, at_ms=NEW_YEAR_MS + 31 * DAY_MS)
        assert following.headers["x-ratelimit-remaining-tokens-month"] == "1000"


async def test_money_budgets_do_not_add_currencies(store: CounterStore) -> None:
    """A bill in yuan leaves the whole budget in dollars, and the reverse."""
    async with limiter(store) as limits:
        who = caller(Limits(nanos_per_day=1000))
        yuan = await limits.admit(who, currency="CNY")
        await charge(limits, yuan, nanos=900)
        dollars = await limits.admit(who, currency="USD")
        await charge(limits, dollars, nanos=1000)
        await limits.settle(yuan, tokens=1, nanos=900)
        await limits.settle(dollars, tokens=1, nanos=700)
        for currency, left in (("CNY", "0.0000001"), ("USD", "0.0000003")):
            reservation = await limits.admit(who, currency=currency)
            assert reservation.headers["x-ratelimit-remaining-money-day"] == left
            with pytest.raises(BudgetExhausted):
                await charge(limits, reservation, nanos=301)
            await limits.settle(reservation, tokens=0, nanos=0)


def test_the_ledger_sums_one_currency_within_one_period(database: sa.Engine) -> None:
    """Counters are seeded with the money of the request's currency, and with nothing after its day or month."""
    for number, (currency, opened_at) in enumerate(
        [
            ("CNY", NEW_YEAR_MS - 1),
            ("CNY", NEW_YEAR_MS - DAY_MS - 1),
            ("USD", NEW_YEAR_MS - 1),
            ("CNY", NEW_YEAR_MS),
            ("CNY", NEW_YEAR_MS + DAY_MS),
        ]
    ):
        record = UsageRecord(
            f"r{number}",
            stream=False,
            currency=currency,
            input_price="1",
            output_price="1",
            opened_at=opened_at,
            billed=True,
            ending="finished",
            tenant_id="acme",
            key_id="k1",
            region="beijing",
            dialect="openai",
            model="m",
            audio_form="url",
            replica="p",
        )
        record.input_tokens = record.amount_nanos = 10**number
        usage_table.write(database, [record.row()])
    sums = [
        usage_table.spent(database, Caller("acme", "k1"), at_ms, "CNY").tenant
        for at_ms in (NEW_YEAR_MS - 5, NEW_YEAR_MS)
    ]
    assert sums == [Sums(101, 111, 1, 11), Sums(1000, 11_000, 1000, 11_000)]


async def test_headers_state_what_is_left_of_every_limit(store: CounterStore) -> None:
    """Budgets and the free quota count what was billed, all other limits also the request itself."""
    spent = Spent(Sums(100, 200, 300_000_000, 400_000_000), free_tokens=700)
    async with limiter(store, spent) as limits:
        chosen = Limits(
            requests_per_minute=10,
            concurrent_requests=5,
            concurrent_audio_seconds=60,
            tokens_per_day=1000,
            tokens_per_month=10_000,
            nanos_per_day=10**9,
            nanos_per_month=2 * 10**9,
        )
        who = caller(chosen, Limits(concurrent_requests=9), FreeQuota(1000, time.time() + 1000))
        reservation = await limits.admit(who, currency="CNY")
        await limits.charge(reservation, Amounts(20_000, 21, 10, 10))
    headers: dict[str, Any] = {name.removeprefix("x-ratelimit-"): value for name, value in reservation.headers.items()}
    now = dt.datetime.now(dt.UTC)
    day_s = 86_400 - (now.hour * 3600 + now.minute * 60 + now.second)
    assert abs(int(headers.pop("reset-tokens-day").removesuffix("s")) - day_s) <= 5
    assert abs(int(headers.pop("reset-money-day").removesuffix("s")) - day_s) <= 5
    assert day_s - 5 <= int(headers.pop("reset-tokens-month").removesuffix("s")) <= 31 * 86_400
    assert day_s - 5 <= int(headers.pop("reset-money-month").removesuffix("s")) <= 31 * 86_400
    assert headers == {
        "limit-requests": "10",
        "remaining-requests": "9",
        "reset-requests": "61s",
        "limit-concurrent-requests": "5",
        "remaining-concurrent-requests": "4",
        "limit-concurrent-audio-seconds": "60",
        "remaining-concurrent-audio-seconds": "40",
        "limit-tokens-day": "1000",
        "remaining-tokens-day": "900",
        "limit-tokens-month": "10000",
        "remaining-tokens-month": "9800",
        "limit-money-day": "1.00",
        "remaining-money-day": "0.70",
        "limit-money-month": "2.00",
        "remaining-money-month": "1.60",
        "limit-free-tokens": "1000",
        "remaining-free-tokens": "300",
    }
