"""Comparisons of records, usage reports, invoices, metrics and budgets after random requests, to the nano-unit.

    python -m tests.tenancy.bill_checks --requests 100000

makes that many requests over SQLite with counters in memory, or over the stores that `--database-url` and `--redis-url`
name, which must be empty, and prints what was compared. The tests do the same with fewer.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import itertools
import json
import logging
import tempfile
import time
from collections import Counter, defaultdict
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from serving.errors import RateLimited
from serving.tenancy import database as databases
from serving.tenancy.billing import reports
from serving.tenancy.limits.memory import MemoryStore
from serving.tenancy.limits.redis import RedisStore
from serving.tenancy.schema import usage_records
from tests.tenancy.random_bills import DAYS, TENANTS, Expected, World, amount, world

if TYPE_CHECKING:
    from collections.abc import Callable

    from serving.tenancy.limits.counter_store import CounterStore

Rows = list[tuple[Expected, Any]]
"""Each request: what is expected, and its record in the ledger."""

SUMS = ("requests", "billed_requests", "input_tokens", "output_tokens", "free_tokens", "amount")
FIRST, LAST = dt.date(2096, 1, 20), dt.date(2096, 1, 20) + dt.timedelta(days=DAYS)
MONTHS = ("2095-12", "2096-01", "2096-02", "2096-03", "2096-04")


def records(made: World, database: sa.Engine) -> Rows:
    """Check every record of the ledger, and the free tokens of each tenant; return them."""
    with database.connect() as connection:
        rows = {row.request_id: row for row in connection.execute(sa.select(usage_records))}
    assert rows.keys() == made.expected.keys()
    free: Counter[str] = Counter()
    billed: Counter[str] = Counter()
    for request_id, expected in made.expected.items():
        row = rows[request_id]
        found = (row.tenant_id, row.key_id, row.opened_at, row.ending, row.input_tokens, row.output_tokens, row.billed)
        assert found == (
            expected.tenant,
            expected.key,
            expected.opened_at,
            expected.ending,
            expected.input_tokens,
            expected.output_tokens,
            expected.billed,
        ), request_id
        assert (row.currency, Fraction(row.input_price), Fraction(row.output_price)) == (
            expected.price[0],
            Fraction(expected.price[1]),
            Fraction(expected.price[2]),
        )
        assert row.amount_nanos == expected.amount_nanos(row.free_tokens), request_id
        assert 0 <= row.free_tokens <= row.input_tokens + row.output_tokens
        if expected.billed:
            free[row.tenant_id] += row.free_tokens
            billed[row.tenant_id] += row.input_tokens + row.output_tokens
        else:
            assert row.free_tokens == 0
    for tenant, tokens in billed.items():
        _, quota = TENANTS[tenant.partition("-")[2]]
        used = 0 if quota is None else tokens if quota.only else min(tokens, quota.tokens)
        assert free[tenant] == used, tenant
    return [(expected, rows[request_id]) for request_id, expected in made.expected.items()]


def _sums(rows: Rows) -> dict[str, int]:
    billed = [row for row in rows if row[0].billed]
    return {
        "requests": len(rows),
        "billed_requests": len(billed),
        "input_tokens": sum(expected.input_tokens for expected, _ in billed),
        "output_tokens": sum(expected.output_tokens for expected, _ in billed),
        "free_tokens": sum(row.free_tokens for _, row in billed),
        "amount": sum(expected.amount_nanos(row.free_tokens) for expected, row in billed),
    }


def _grouped(rows: Rows, by: Callable[[Expected], tuple[str, ...]]) -> dict[tuple[str, ...], dict[str, int]]:
    groups: defaultdict[tuple[str, ...], Rows] = defaultdict(list)
    for row in rows:
        groups[by(row[0])].append(row)
    return {key: _sums(group) for key, group in groups.items()}


def _group(*by: str) -> Callable[[Expected], tuple[str, ...]]:
    return lambda each: (*(getattr(each, name) for name in by), each.price[0])


def usage(rows: Rows, database: sa.Engine) -> int:
    """Check usage reports by every set of groups, for all tenants, one tenant and one key; return their number."""
    some, checked = rows[len(rows) // 2][0], 0
    choices: tuple[dict[str, Any], ...] = (
        {},
        {"tenant": some.tenant},
        {"key": some.key},
        {"since": dt.date(2096, 2, 29), "until": dt.date(2096, 2, 29)},
    )
    for size, chosen in itertools.product(range(4), choices):
        for by in itertools.permutations(("day", "tenant", "key"), size):
            period = {"since": FIRST, "until": LAST} | chosen
            report = reports.usage(database, by=by, **period)
            wanted = [
                row
                for row in rows
                if period["since"].isoformat() <= row[0].day <= period["until"].isoformat()
                and row[0].tenant == chosen.get("tenant", row[0].tenant)
                and row[0].key == chosen.get("key", row[0].key)
            ]
            expected = _grouped(wanted, _group(*by))
            found = {
                (*(str(line[name]) for name in by), str(line["currency"])): {
                    name: amount(line[name]) if name == "amount" else line[name] for name in SUMS
                }
                for line in report
            }
            assert found == expected, (by, chosen)
            assert len(report) == len(found)
            checked += 1
    return checked


def invoices(rows: Rows, database: sa.Engine) -> int:
    """Check every tenant's invoice of every month, and that they are all that was billed; return their number."""
    billed = [row for row in rows if row[0].billed]
    total, made = 0, 0
    for tenant, month in itertools.product(sorted({row[0].tenant for row in rows}), MONTHS):
        wanted = [row for row in billed if row[0].tenant == tenant and row[0].day.startswith(month)]
        invoice = reports.invoice(database, tenant, month=month)
        assert invoice["open_requests"] == 0
        lines = {
            (line["key_id"], line["currency"], Fraction(line["input_price"]), Fraction(line["output_price"])): line
            for line in invoice["lines"]
        }
        assert len(lines) == len(invoice["lines"])
        _check_lines(
            lines, wanted, lambda each: (each.key, each.price[0], Fraction(each.price[1]), Fraction(each.price[2]))
        )
        totals = {(line["currency"],): line for line in invoice["totals"] if line["billed_requests"]}
        _check_lines(totals, wanted, lambda each: (each.price[0],))
        total += sum(amount(line["amount"]) for line in invoice["totals"])
        made += 1
    assert total == sum(expected.amount_nanos(row.free_tokens) for expected, row in billed)
    return made


def _check_lines(lines: dict[Any, Any], wanted: Rows, by: Callable[[Expected], Any]) -> None:
    expected = _grouped(wanted, by)
    assert lines.keys() == expected.keys()
    for key, line in lines.items():
        for name in SUMS[1:]:
            assert (amount(line[name]) if name == "amount" else line[name]) == expected[key][name], (key, name)
        assert amount(line["list_amount"]) == sum(row[0].list_nanos for row in wanted if by(row[0]) == key)


def metrics(made: World, rows: Rows, named: int) -> int:
    """Check the counters of tenants, of which `named` have a label of their own; return the number of series."""
    tenants = {tenant for name, tenant, *_ in made.series() if name.startswith("captioner_tenant_requests")}
    expected: defaultdict[tuple[str, ...], Fraction] = defaultdict(Fraction)

    def count(value: int | Fraction, *series: str) -> None:
        expected[series] += value

    def label(tenant: str) -> str:
        return tenant if tenant in tenants else "other"

    for (tenant, outcome), number in made.outcomes.items():
        count(number, "captioner_tenant_requests_total", label(tenant), outcome)
    for each, row in rows:
        if each.billed:
            cost = Fraction(each.amount_nanos(row.free_tokens), 10**9)
            count(cost, "captioner_tenant_cost_total", label(each.tenant), each.price[0])
            for kind, tokens in (("audio", each.audio_tokens), ("text", 8), ("output", each.output_tokens)):
                count(tokens, "captioner_tenant_tokens_total", label(each.tenant), kind)
                count(tokens, "captioner_tokens_total", "", kind)
    names = {series[0] for series in expected}
    found = {series: value for series, value in made.series().items() if series[0] in names}
    assert found == {series: value for series, value in expected.items() if value}
    assert len(tenants - {"other"}) == min(named, 2 * len(TENANTS))
    return len(found)


async def budgets(made: World, rows: Rows) -> int:
    """Check what is left of budgets on the last day, by the headers of one more request; return their number."""
    checked = 0
    last = dt.datetime.fromtimestamp(made.now_ms / 1000, dt.UTC).date().isoformat()
    for caller in made.callers():
        if not caller.tenant_limits.tokens_per_day:
            continue
        currency = made.sessions.prices(caller.region, made.now_ms).currency
        try:
            reservation = await made.sessions.limiter.admit(caller, at_ms=made.now_ms, currency=currency)
        except RateLimited as refused:  # an exhausted budget
            headers = refused.headers
        else:
            headers = reservation.headers
            await made.sessions.limiter.settle(reservation, tokens=0, nanos=0)
        for unit, period in itertools.product(("tokens", "money"), ("day", "month")):
            limit = f"{'nanos' if unit == 'money' else 'tokens'}_per_{period}"
            lefts = []
            for limits, name in ((caller.tenant_limits, caller.tenant_id), (caller.key_limits, caller.key_id)):
                if (most := getattr(limits, limit)) is not None:
                    of = [
                        row
                        for row in rows
                        if name in {row[0].tenant, row[0].key}
                        and row[0].day.startswith(last if period == "day" else last[:7])
                    ]
                    sums = _sums([row for row in of if unit == "tokens" or row[0].price[0] == currency])
                    used = sums["amount"] if unit == "money" else sums["input_tokens"] + sums["output_tokens"]
                    assert used <= most, (caller.key_id, limit)
                    lefts.append(most - used)
            if lefts:
                text = headers[f"x-ratelimit-remaining-{unit}-{period}"]
                assert (amount(text) if unit == "money" else int(text)) == min(lefts), (caller.key_id, limit)
                checked += 1
    return checked


async def compare(
    directory: Path, database: sa.Engine, store: CounterStore, requests: int, *, seed: int, named: int = 100
) -> dict[str, Any]:
    """Make requests and compare everything; return what was compared."""
    async with world(directory, database, store, seed=seed, named_tenants=named) as made:
        await made.run(requests)
        while made.sessions.ledger.pending:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.05)
        rows = records(made, database)
        closed = Counter(row.ending for _, row in rows)
        assert made.sessions.ledger.closed == made.sessions.ledger.closed | closed
        assert sum(made.sessions.ledger.closed.values()) == len(rows)
        return {
            "requests": requests,
            "records": len(rows),
            "endings": dict(sorted(closed.items())),
            "billed": sum(row.billed for _, row in rows),
            "free_in_part": sum(0 < row.free_tokens < row.input_tokens + row.output_tokens for _, row in rows),
            "usage_reports": usage(rows, database),
            "invoices": invoices(rows, database),
            "series": metrics(made, rows, named),
            "budgets": await budgets(made, rows),
        }


def main() -> None:
    """Compare as many requests as asked for, and print as JSON what was compared."""
    parser = argparse.ArgumentParser(prog="python -m tests.tenancy.bill_checks", description="Compare random bills")
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--database-url", help="Empty database. Default: SQLite")
    parser.add_argument("--redis-url", help="Empty Redis. Default: counters in memory")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="random-bills-") as directory:
        database = databases.connect(options.database_url or f"sqlite:///{directory}/bills.db")
        databases.migrate(database)
        store = RedisStore(options.redis_url) if options.redis_url else MemoryStore()
        began = time.monotonic()
        result = asyncio.run(compare(Path(directory), database, store, options.requests, seed=options.seed))
        database.dispose()
    print(json.dumps(result | {"seconds": round(time.monotonic() - began, 1)}, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
