"""Usage reports and invoices: sums of the ledger, exact to the token and the nano-unit."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from serving.tenancy.billing.prices import Price, money
from serving.tenancy.schema import usage_records

if TYPE_CHECKING:
    from collections.abc import Sequence

_USAGE = usage_records.c
_DAY_MS = 24 * 3600 * 1000

GROUPS = {"day": _USAGE.opened_at // _DAY_MS, "tenant": _USAGE.tenant_id, "key": _USAGE.key_id}
"""Groups of a usage report. Days are UTC, and a request belongs to the day on which it was admitted."""


def _of_billed(column: Any) -> Any:
    return sa.func.coalesce(sa.func.sum(sa.case((_USAGE.billed, column), else_=0)), 0)


_SUMS = {
    "requests": sa.func.count(),
    "billed_requests": _of_billed(1),
    "open_requests": sa.func.coalesce(sa.func.sum(sa.case((_USAGE.ending.is_(None), 1), else_=0)), 0),
    "audio_ms": sa.func.coalesce(sa.func.sum(_USAGE.audio_ms), 0),
    "input_tokens": _of_billed(_USAGE.input_tokens),
    "output_tokens": _of_billed(_USAGE.output_tokens),
    "free_tokens": _of_billed(_USAGE.free_tokens),
    "amount_nanos": _of_billed(_USAGE.amount_nanos),
}
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
        sa.select(*groups, _USAGE.currency, *(sums.label(name) for name, sums in _SUMS.items()))
        .where(_USAGE.opened_at >= _ms(since), _USAGE.opened_at < _ms(until + dt.timedelta(days=1)))
        .group_by(*groups, _USAGE.currency)
        .order_by(*groups, _USAGE.currency)
    )
    if tenant is not None:
        query = query.where(_USAGE.tenant_id == tenant)
    if key is not None:
        query = query.where(_USAGE.key_id == key)
    with database.connect() as connection:
        return [_usage_row(row) for row in connection.execute(query).mappings()]


def invoice(database: sa.Engine, tenant: str, *, month: str) -> dict[str, Any]:
    """Return a tenant's invoice for a month (`2026-11`): a line for each key and price, and totals that are their sums.

    `list_amount` is the price of all tokens, `amount` the price of those that are not free. `open_requests` still run;
    they are in no line until they have ended. Raises `ValueError` if `month` is not a month.
    """
    first = dt.date.fromisoformat(f"{month}-01")
    following = (first + dt.timedelta(days=32)).replace(day=1)
    groups = (_USAGE.key_id, _USAGE.region, _USAGE.currency, _USAGE.input_price, _USAGE.output_price)
    query = (
        sa.select(*groups, *(sums.label(name) for name, sums in _SUMS.items()))
        .where(_USAGE.tenant_id == tenant, _USAGE.opened_at >= _ms(first), _USAGE.opened_at < _ms(following))
        .group_by(*groups)
        .order_by(*groups)
    )
    with database.connect() as connection:
        rows = [{**row} for row in connection.execute(query).mappings()]
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


def _list_nanos(row: dict[str, Any]) -> int:
    """Return the price of all tokens, at the row's prices per 1,000 tokens."""
    price = Price.of(row["currency"], Decimal(row["input_price"]), Decimal(row["output_price"]))
    return price.amount_nanos(int(row["input_tokens"]), int(row["output_tokens"]))


def _usage_row(row: Any) -> dict[str, Any]:
    usage = _formatted({**row})
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


def _ms(day: dt.date) -> int:
    return int(dt.datetime.combine(day, dt.time(), dt.UTC).timestamp() * 1000)
