"""The table `usage_records`: journal entries are written to it, sums of what was billed are read from it."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from serving.tenancy.ledger.usage_record import COLUMNS, PROGRESS, now_ms
from serving.tenancy.limits.counter_store import Spent, Sums
from serving.tenancy.schema import usage_records
from serving.types import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable

    from serving.types import Caller

_USAGE = usage_records.c

_LOST = {"ending": Outcome.LOST.value, "billed": False, "free_tokens": 0, "amount_nanos": 0}


def write(database: sa.Engine, entries: Iterable[Any]) -> None:
    """Write journal entries, in one transaction. Idempotent.

    A closed record stays as it is, unless another process had closed it as lost.
    """
    records: dict[str, dict[str, Any]] = {}
    progress: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if "progress" in entry:
            for values in entry["progress"]:
                report = dict(zip(PROGRESS, values, strict=True))
                progress[report["request_id"]] = report | {"reported_at": entry["at"]}
        else:
            records[entry["request_id"]] = entry
            progress.pop(entry["request_id"], None)
    with database.begin() as connection:
        if records:
            # In one order everywhere, so that two writers cannot wait for each other.
            rows = [_columns(records[request_id]) for request_id in sorted(records)]
            connection.execute(_upsert(database), rows)
        if progress:
            reports = [{"of": request_id, **progress[request_id]} for request_id in sorted(progress)]
            connection.execute(_PROGRESS, reports)


def put(connection: sa.Connection, row: dict[str, Any]) -> None:
    """Write a closed record within a transaction, as `write` does."""
    connection.execute(_upsert(connection.engine), [_columns(row)])


def close_lost(database: sa.Engine, replica: str) -> int:
    """Close the records that a dead replica had open; return their number."""
    return _close(database, _USAGE.replica == replica)


def close_unreported(database: sa.Engine, *, before_ms: int) -> int:
    """Close the open records that no process has reported on since then; return their number."""
    return _close(database, _USAGE.reported_at < before_ms)


def spent(database: sa.Engine, caller: Caller, at_ms: int, currency: str) -> Spent:
    """Return what a tenant and its key were billed on that day and in that month (UTC), and the tenant's free tokens.

    A request belongs to the day on which it was admitted. Money is what was billed in `currency`: amounts of different
    currencies are never added.
    """
    day = dt.datetime.fromtimestamp(at_ms / 1000, dt.UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    month = day.replace(day=1)
    day_ms, month_ms = (round(1000 * since.timestamp()) for since in (day, month))
    next_day_ms = day_ms + 24 * 3600 * 1000
    next_month_ms = round(1000 * (month + dt.timedelta(days=32)).replace(day=1).timestamp())
    amounts = (_USAGE.input_tokens + _USAGE.output_tokens, sa.case((_USAGE.currency == currency, _USAGE.amount_nanos)))
    sums = [
        _sum(amount, since, until)
        for since, until in ((day_ms, next_day_ms), (month_ms, next_month_ms))
        for amount in amounts
    ]
    with database.connect() as connection:
        of_tenant, of_key = (
            connection.execute(
                sa.select(*sums).where(
                    column == name, _USAGE.billed, _USAGE.opened_at >= month_ms, _USAGE.opened_at < next_month_ms
                )
            ).one()
            for column, name in ((_USAGE.tenant_id, caller.tenant_id), (_USAGE.key_id, caller.key_id))
        )
        free = sa.select(sa.func.coalesce(sa.func.sum(_USAGE.free_tokens), 0))
        free_tokens = connection.scalar(free.where(_USAGE.tenant_id == caller.tenant_id, _USAGE.billed))
    return Spent(_sums(of_tenant), _sums(of_key), int(free_tokens or 0))


def _sum(amount: sa.ColumnElement[int], since_ms: int, until_ms: int) -> sa.ColumnElement[int]:
    within = (_USAGE.opened_at >= since_ms) & (_USAGE.opened_at < until_ms)
    return sa.func.coalesce(sa.func.sum(sa.case((within, amount), else_=0)), 0)


def _sums(row: Iterable[Any]) -> Sums:
    tokens_per_day, nanos_per_day, tokens_per_month, nanos_per_month = map(int, row)
    return Sums(tokens_per_day, tokens_per_month, nanos_per_day, nanos_per_month)


def _close(database: sa.Engine, which: sa.ColumnElement[bool]) -> int:
    statement = usage_records.update().where(_USAGE.ending.is_(None), which).values(closed_at=now_ms(), **_LOST)
    with database.begin() as connection:
        return connection.execute(statement).rowcount


def _upsert(database: sa.Engine) -> sa.Insert:
    insert: Any = {"postgresql": postgresql.insert, "sqlite": sqlite.insert}[database.dialect.name](usage_records)
    return insert.on_conflict_do_update(  # type: ignore[no-any-return]
        index_elements=[_USAGE.request_id],
        set_={name: insert.excluded[name] for name in COLUMNS if name != "request_id"},
        where=_USAGE.ending.is_(None) | ((_USAGE.ending == Outcome.LOST.value) & insert.excluded.ending.is_not(None)),
    )


_PROGRESS = (
    usage_records.update()
    .where(_USAGE.request_id == sa.bindparam("of"), _USAGE.ending.is_(None))
    .values({name: sa.bindparam(name) for name in (*PROGRESS[1:], "reported_at")})
)


def _columns(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in COLUMNS}
