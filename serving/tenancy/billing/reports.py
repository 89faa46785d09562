"""Usage reports and invoices: sums of the ledger, exact to the token and the nano-unit.

They are made from the sums by day that the database keeps (`usage_days`), not from the records.
"""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from serving.tenancy.billing.prices import NANOS, Price, money
from serving.tenancy.ledger.usage_table import days
from serving.tenancy.schema import usage_days

if TYPE_CHECKING:
    from collections.abc import Sequence

_DAYS = usage_days.c

GROUPS = {"day": _DAYS.day, "tenant": _DAYS.tenant_id, "key": _DAYS.key_id}
"""Groups of a usage report. Days are UTC, and a request belongs to the day on which it was admitted."""

_COUNTS = ("requests", "billed_requests", "open_requests", "audio_ms", "input_tokens", "output_tokens", "free_tokens")
_SUMS = [
    sa.func.coalesce(sa.func.sum(_DAYS[name]), 0).label(name) for name in (*_COUNTS, "amount_units", "amount_nanos")
]
"""Tokens and amounts are those billed; requests and audio are those of all admitted requests."""


def usage(
    database: sa.Engine,
    *,
    since: dt.date,
    until: dt.date,
    by: Sequence[str] = ("day", "tenant"),
    tenant: str | None = None,
    key: str | None = None,
) -> list[dict[str, Any]]:
    """Return the sums of the days from `since` to `until`, both included, by some of `GROUPS` and by currency."""
    groups = [GROUPS[name].label(name) for name in by]
    query = (
        sa.select(*groups, _DAYS.currency, *_SUMS)
        .where(_DAYS.day >= days(since), _DAYS.day <= days(until), _DAYS.requests != 0)
        .group_by(*groups, _DAYS.currency)
        .order_by(*groups, _DAYS.currency)
    )
    if tenant is not None:
        query = query.where(_DAYS.tenant_id == tenant)
    if key is not None:
        query = query.where(_DAYS.key_id == key)
    with database.connect() as connection:
        return [_usage_row(_with_amount(row)) for row in connection.execute(query).mappings()]


def invoice(database: sa.Engine, tenant: str, *, month: str) -> dict[str, Any]:
    """Return a tenant's invoice for a month (`2026-11`): a line for each key and price, and totals that are their sums.

    `list_amount` is the price of all tokens, `amount` the price of those that are not free. `open_requests` still run;
    they are in no line until they have ended. Raises `ValueError` if `month` is not a month.
    """
    first = dt.date.fromisoformat(f"{month}-01")
    following = (first + dt.timedelta(days=32)).replace(day=1)
    groups = (_DAYS.key_id, _DAYS.region, _DAYS.currency, _DAYS.input_price, _DAYS.output_price)
    query = (
        sa.select(*groups, *_SUMS)
        .where(_DAYS.tenant_id == tenant, _DAYS.day >= days(first), _DAYS.day < days(following), _DAYS.requests != 0)
        .group_by(*groups)
        .order_by(*groups)
    )
    with database.connect() as connection:
        rows = [_with_amount(row) for row in connection.execute(query).mappings()]
    lines: list[dict[str, Any]] = []
    totals: dict[str, dict[str, int]] = {}
    still_open = 0
    for row in rows:
        still_open += int(row.pop("open_requests"))
        row["list_nanos"] = _list_nanos(row)
        total = totals.setdefault(row["currency"], dict.fromkeys(_TOTALS, 0))
        for name in _TOTALS:
            total[name] += int(row[name])
        if row["billed_requests"]:
            lines.append(_formatted(row))
    return {
        "tenant": tenant,
        "month": month,
        "lines": lines,
        "totals": [_formatted({"currency": currency, **total}) for currency, total in sorted(totals.items())],
        "open_requests": still_open,
    }


_TOTALS = ("billed_requests", "input_tokens", "output_tokens", "free_tokens", "list_nanos", "amount_nanos")


def _with_amount(row: Any) -> dict[str, Any]:
    """Return a row with its amount in nano-units alone."""
    values = {**row}
    values["amount_nanos"] = int(values.pop("amount_units")) * NANOS + int(values["amount_nanos"])
    return values


def _list_nanos(row: dict[str, Any]) -> int:
    """Return the price of all tokens, at the row's prices per 1,000 tokens."""
    price = Price.of(row["currency"], Decimal(row["input_price"]), Decimal(row["output_price"]))
    return price.amount_nanos(int(row["input_tokens"]), int(row["output_tokens"]))


def _usage_row(row: dict[str, Any]) -> dict[str, Any]:
    usage = _formatted(row)
    if "day" in usage:
        usage["day"] = (dt.date(1970, 1, 1) + dt.timedelta(days=int(usage["day"]))).isoformat()
    return usage


def _formatted(row: dict[str, Any]) -> dict[str, Any]:
    """Return sums as integers (PostgreSQL's are decimals), audio in seconds, amounts in units of their currency."""
    formatted: dict[str, Any] = {}
    for name, value in row.items():
        if name == "audio_ms":
            formatted["audio_s"] = int(value) / 1000
        elif name.endswith("_nanos"):
            formatted[{"amount_nanos": "amount", "list_nanos": "list_amount"}[name]] = money(int(value))
        else:
            formatted[name] = value if isinstance(value, str) else int(value)
    return formatted
