"""Prices, amounts and billed tokens, as literals from the manual or worked out by hand."""

from __future__ import annotations

from decimal import Decimal

import pytest
import sqlalchemy as sa

from serving.tenancy import schema
from serving.tenancy.billing import prices
from serving.tenancy.billing.prices import Price, PriceList
from serving.tenancy.limits.counter_store import nanos_to_pay
from serving.types import Region, Usage, billed_audio_tokens

OLD, NEW = Price("CNY", 15_800, 12_700), Price("CNY", 20_000, 30_000)
OTHER = Price("USD", 1, 2)


@pytest.mark.parametrize(
    ("samples", "tokens"),
    [
        (0, 13),
        (1, 13),
        (16_000, 13),
        (16_001, 13),
        (17_000, 14),
        (32_000, 25),
        (32_001, 26),
        (32_323, 26),
        (48_000, 38),
    ],
)
def test_audio_tokens_are_rounded_up(samples: int, tokens: int) -> None:
    """A second is 12.5 tokens, a fraction of a token counts as one, and the shortest clip as a second."""
    assert billed_audio_tokens(samples) == tokens


def test_input_is_audio_and_scaffold() -> None:
    """The scaffold is 8 text tokens; the total adds what was written."""
    usage = Usage(13, 24)
    assert (usage.text_tokens, usage.input_tokens, usage.total_tokens) == (8, 21, 45)


@pytest.mark.parametrize(
    ("at_ms", "price"), [(0, OLD), (999, OLD), (1000, OLD), (1999, OLD), (2000, NEW), (2001, NEW), (10**15, NEW)]
)
def test_a_price_is_valid_from_its_millisecond(at_ms: int, price: Price) -> None:
    """The latest price that is valid applies; before the first date, the first one. Each region has its own."""
    listed = PriceList([(Region.BEIJING, 2000, NEW), (Region.SINGAPORE, 1500, OTHER), (Region.BEIJING, 1000, OLD)])
    assert listed.at(Region.BEIJING, at_ms) == price
    assert listed.at(Region.SINGAPORE, at_ms) == OTHER


def test_a_region_without_a_price_is_an_error() -> None:
    """The message names the region and the remedy."""
    message = "there is no price for the region singapore: set one with `captioner prices set`"
    with pytest.raises(LookupError, match=f"^{message}$"):
        PriceList([(Region.BEIJING, 0, OLD)]).at(Region.SINGAPORE, 0)


def test_prices_per_token_are_exact() -> None:
    """0.0158 for 1,000 tokens is 15,800 nanos a token, and the reverse; an amount is the sum of both products."""
    price = Price.of("CNY", Decimal("0.0158"), Decimal("0.012701"))
    assert price == Price("CNY", 15_800, 12_701)
    assert (price.input_price, price.output_price) == (Decimal("0.0158"), Decimal("0.012701"))
    assert price.amount_nanos(21, 24) == 636_624
    assert Price.of("CNY", Decimal(0), Decimal(3)) == Price("CNY", 0, 3_000_000)


@pytest.mark.parametrize(
    ("price", "message"),
    [
        ("-0.000001", "a price must be a number of at least 0: -0.000001"),
        ("NaN", "a price must be a number of at least 0: NaN"),
        ("Infinity", "a price must be a number of at least 0: Infinity"),
        ("0.0000001", "a price per 1,000 tokens has at most six decimals: 1E-7"),
    ],
)
def test_prices_that_are_none_are_refused(price: str, message: str) -> None:
    """The rule holds for the prices of input and of output."""
    for pair in ((Decimal(price), Decimal(1)), (Decimal(1), Decimal(price))):
        with pytest.raises(ValueError, match=f"^{message}$"):
            Price.of("CNY", *pair)


@pytest.mark.parametrize(
    ("nanos", "text"),
    [
        (0, "0.00"),
        (1, "0.000000001"),
        (10_000_000, "0.01"),
        (12_000_000, "0.012"),
        (1_000_000_000, "1.00"),
        (100_000_000_000, "100.00"),
        (100_000_000_010, "100.00000001"),
        (1_234_567_890, "1.23456789"),
    ],
)
def test_money_is_exact(nanos: int, text: str) -> None:
    """An amount has at least two decimals, and as many as it needs."""
    assert prices.money(nanos) == text


@pytest.mark.parametrize(
    ("nanos", "free", "tokens", "pay"),
    [(100, 1, 3, 67), (100, 0, 3, 100), (100, 3, 3, 0), (99, 1, 3, 66), (0, 1, 2, 0)],
)
def test_what_is_not_free_is_rounded_up(nanos: int, free: int, tokens: int, pay: int) -> None:
    """Two of three tokens for 100 nanos cost 66.7: 67 are paid."""
    assert nanos_to_pay(nanos, free, tokens) == pay


def test_the_shipped_prices_are_the_manuals() -> None:
    """Yuan for 1,000 tokens: 0.0158 and 0.0127 in Beijing, 0.027962 and 0.022458 in Singapore; free in Beijing only."""
    new_year = 1_735_689_600_000  # 2025-01-01, 00:00 UTC
    names = ("region", "valid_from", "currency", "input_nanos", "output_nanos")
    assert [tuple(row[name] for name in names) for row in prices.shipped()] == [
        ("beijing", new_year, "CNY", 15_800, 12_700),
        ("singapore", new_year, "CNY", 27_962, 22_458),
    ]
    assert (prices.has_free_quota(Region.BEIJING), prices.has_free_quota(Region.SINGAPORE)) == (True, False)


def test_shipped_prices_fill_regions_that_have_none() -> None:
    """A region that has a price keeps it alone; a second start adds nothing. What is read is what was written."""
    database = sa.create_engine("sqlite://")
    schema.metadata.create_all(database)
    own = prices.row(Region.BEIJING, 5, Price("USD", 7, 8))
    assert own == {
        "region": "beijing",
        "valid_from": 5,
        "currency": "USD",
        "input_nanos": 7,
        "output_nanos": 8,
    }
    with database.begin() as connection:
        connection.execute(schema.prices.insert(), own)
        for _ in range(2):
            prices.seed(connection)
        listed = prices.price_list(connection.execute(sa.select(schema.prices)).mappings())
        assert connection.scalar(sa.select(sa.func.count()).select_from(schema.prices)) == 2
    database.dispose()
    assert listed.at(Region.BEIJING, 10**15) == Price("USD", 7, 8)
    assert listed.at(Region.SINGAPORE, 10**15) == Price("CNY", 27_962, 22_458)
