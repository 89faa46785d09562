"""Prices: per 1,000 tokens, by region, from a date on. Whole nano-units per token, so that every amount is exact."""

from __future__ import annotations

import tomllib
from bisect import bisect_right
from dataclasses import dataclass
from datetime import UTC, datetime, time
from decimal import Decimal
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from serving.tenancy.schema import prices
from serving.types import Region

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

NANOS = 10**9
"""In a unit of money."""

_NANOS_PER_TOKEN = Decimal(NANOS // 1000)
"""Of a price of one unit per 1,000 tokens."""


@dataclass(frozen=True, slots=True)
class Price:
    """What a token costs, in nano-units of the currency."""

    currency: str
    input_nanos: int
    output_nanos: int

    @classmethod
    def of(cls, currency: str, input_price: Decimal, output_price: Decimal) -> Price:
        """From prices per 1,000 tokens. Raises `ValueError` if they have more than six decimals."""
        return cls(currency, _per_token(input_price), _per_token(output_price))

    @property
    def input_price(self) -> Decimal:
        """Of 1,000 input tokens."""
        return self.input_nanos / _NANOS_PER_TOKEN

    @property
    def output_price(self) -> Decimal:
        """Of 1,000 output tokens."""
        return self.output_nanos / _NANOS_PER_TOKEN

    def amount_nanos(self, input_tokens: int, output_tokens: int) -> int:
        """What so many tokens cost, exactly."""
        return input_tokens * self.input_nanos + output_tokens * self.output_nanos


class PriceList:
    """All prices, to look up by region and time."""

    def __init__(self, entries: Iterable[tuple[Region, int, Price]]) -> None:
        self._by_region: dict[Region, list[tuple[int, Price]]] = {}
        for region, valid_from, price in sorted(entries, key=lambda entry: entry[:2]):
            self._by_region.setdefault(region, []).append((valid_from, price))

    def at(self, region: Region, at_ms: int) -> Price:
        """The price then; before the first date, the first. Raises `LookupError` if the region has none at all."""
        entries = self._by_region.get(region)
        if not entries:
            raise LookupError(f"there is no price for the region {region}")
        index = bisect_right(entries, at_ms, key=lambda entry: entry[0])
        return entries[max(0, index - 1)][1]


def read(connection: sa.Connection) -> PriceList:
    """The prices in the database."""
    return PriceList(_entry(row) for row in connection.execute(sa.select(prices)).mappings())


def shipped() -> list[dict[str, Any]]:
    """The rows of the price list that comes with the package."""
    rows = []
    for entry in tomllib.loads((files("serving.tenancy.billing") / "prices.toml").read_text())["price"]:
        price = Price.of(entry["currency"], Decimal(entry["input"]), Decimal(entry["output"]))
        valid_from = datetime.combine(entry["valid_from"], time(), UTC)
        rows.append(row(Region(entry["region"]), int(valid_from.timestamp() * 1000), price))
    return rows


def row(region: Region, valid_from: int, price: Price) -> dict[str, Any]:
    """A price as the table has it."""
    return {
        "region": region.value,
        "valid_from": valid_from,
        "currency": price.currency,
        "input_nanos": price.input_nanos,
        "output_nanos": price.output_nanos,
    }


def seed(connection: sa.Connection) -> None:
    """Enter the shipped prices of regions that have none."""
    priced = set(connection.scalars(sa.select(prices.c.region).distinct()))
    if missing := [entry for entry in shipped() if entry["region"] not in priced]:
        connection.execute(prices.insert(), missing)


def money(nanos: int) -> str:
    """An amount in units of its currency, exact, with two decimals at least."""
    amount = Decimal(nanos) / NANOS
    return f"{amount:.2f}" if amount == round(amount, 2) else f"{amount.normalize():f}"


def _per_token(price: Decimal) -> int:
    if not price.is_finite() or price < 0:
        raise ValueError("a price must be a number from 0 on")
    nanos = price * _NANOS_PER_TOKEN
    if nanos != (whole := int(nanos)):
        raise ValueError(f"a price per 1,000 tokens has at most six decimals: {price}")
    return whole


def _entry(row: Mapping[Any, Any]) -> tuple[Region, int, Price]:
    price = Price(row["currency"], row["input_nanos"], row["output_nanos"])
    return Region(row["region"]), row["valid_from"], price
