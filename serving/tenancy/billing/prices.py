"""Prices per 1,000 tokens, by region and date. A token costs whole nano-units, so that every amount is exact."""

from __future__ import annotations

import functools
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
"""Nano-units in a unit of money."""

_NANOS_PER_TOKEN = Decimal(NANOS // 1000)
"""Nano-units per token, at a price of one unit per 1,000 tokens."""


@dataclass(frozen=True, slots=True)
class Price:
    """The price of a token, in nano-units of the currency."""

    currency: str
    input_nanos: int
    output_nanos: int

    @classmethod
    def of(cls, currency: str, input_price: Decimal, output_price: Decimal) -> Price:
        """Convert prices per 1,000 tokens. Raises `ValueError` if they have more than six decimals."""
        return cls(currency, _per_token(input_price), _per_token(output_price))

    def at_percent(self, percent: int) -> Price:
        """Return that part of the price; a token costs whole nano-units, rounded down."""
        return Price(self.currency, self.input_nanos * percent // 100, self.output_nanos * percent // 100)

    @property
    def input_price(self) -> Decimal:
        """Price of 1,000 input tokens, in units of the currency."""
        return self.input_nanos / _NANOS_PER_TOKEN

    @property
    def output_price(self) -> Decimal:
        """Price of 1,000 output tokens, in units of the currency."""
        return self.output_nanos / _NANOS_PER_TOKEN

    def amount_nanos(self, input_tokens: int, output_tokens: int) -> int:
        """Return the exact price of these tokens."""
        return input_tokens * self.input_nanos + output_tokens * self.output_nanos


class PriceList:
    """All prices, found by region and time."""

    def __init__(self, entries: Iterable[tuple[Region, int, Price]]) -> None:
        self._by_region: dict[Region, list[tuple[int, Price]]] = {}
        for region, valid_from, price in sorted(entries, key=lambda entry: entry[:2]):
            self._by_region.setdefault(region, []).append((valid_from, price))

    def at(self, region: Region, at_ms: int) -> Price:
        """Return the price at that time; before the first date, the first price. Raises `LookupError`."""
        entries = self._by_region.get(region)
        if not entries:
            raise LookupError(f"there is no price for the region {region}: set one with `captioner prices set`")
        index = bisect_right(entries, at_ms, key=lambda entry: entry[0])
        return entries[max(0, index - 1)][1]


def price_list(rows: Iterable[Mapping[Any, Any]]) -> PriceList:
    """Return the prices of rows of the database."""
    return PriceList(_entry(row) for row in rows)


@functools.cache
def _shipped() -> dict[str, Any]:
    return tomllib.loads((files("serving.tenancy.billing") / "prices.toml").read_text())


def has_free_quota(region: Region) -> bool:
    """Return whether a plan's free tokens apply to tenants of the region."""
    free_quota: bool = _shipped()["region"][region]["free_quota"]
    return free_quota


def shipped() -> list[dict[str, Any]]:
    """Return the rows of the price list that is part of the package."""
    rows = []
    for entry in _shipped()["price"]:
        price = Price.of(entry["currency"], Decimal(entry["input"]), Decimal(entry["output"]))
        valid_from = datetime.combine(entry["valid_from"], time(), UTC)
        rows.append(row(Region(entry["region"]), int(valid_from.timestamp() * 1000), price))
    return rows


def row(region: Region, valid_from: int, price: Price) -> dict[str, Any]:
    """Return a price as a row of the table."""
    return {
        "region": region.value,
        "valid_from": valid_from,
        "currency": price.currency,
        "input_nanos": price.input_nanos,
        "output_nanos": price.output_nanos,
    }


def seed(connection: sa.Connection) -> None:
    """Insert the shipped prices of regions that have none."""
    priced = set(connection.scalars(sa.select(prices.c.region).distinct()))
    if missing := [entry for entry in shipped() if entry["region"] not in priced]:
        connection.execute(prices.insert(), missing)


def money(nanos: int) -> str:
    """Format an amount in units of its currency, exactly, with at least two decimals."""
    amount = Decimal(nanos) / NANOS
    return f"{amount:.2f}" if amount == round(amount, 2) else f"{amount.normalize():f}"


def _per_token(price: Decimal) -> int:
    if not price.is_finite() or price < 0:
        raise ValueError(f"a price must be a number of at least 0: {price}")
    nanos = price * _NANOS_PER_TOKEN
    if nanos != int(nanos):
        raise ValueError(f"a price per 1,000 tokens has at most six decimals: {price}")
    return int(nanos)


def _entry(row: Mapping[Any, Any]) -> tuple[Region, int, Price]:
    price = Price(row["currency"], row["input_nanos"], row["output_nanos"])
    return Region(row["region"]), row["valid_from"], price
