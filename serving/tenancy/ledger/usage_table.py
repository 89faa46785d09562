"""The table `usage_records`, to which journal entries are written, and `usage_days`, from which sums are read.

Triggers of the database keep the sums equal to the rows (migrations/usage_triggers.py).
"""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any

import orjson
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from serving.tenancy.ledger.usage_record import COLUMNS, PROGRESS, now_ms
from serving.tenancy.limits.counter_store import Spent, Sums
from serving.tenancy.migrations.usage_triggers import NAMES
from serving.tenancy.schema import ledger_replicas, usage_days, usage_records
from serving.types import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable

    from serving.types import Caller

_USAGE = usage_records.c
_DAYS = usage_days.c
_REPLICAS = ledger_replicas.c
_NANOS = 10**9
_DAY_MS = 86_400_000

_NOW_MS: dict[str, sa.ColumnElement[int]] = {
    "sqlite": sa.literal_column("CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)", sa.BigInteger),
    "postgresql": sa.literal_column("CAST(extract(epoch FROM clock_timestamp()) * 1000 AS bigint)", sa.BigInteger),
}
"""The database's clock, in milliseconds since the epoch."""

_LOST = {"ending": Outcome.LOST.value, "billed": False, "free_tokens": 0, "amount_nanos": 0}


def write(database: sa.Engine, entries: Iterable[Any]) -> None:
    """Write the records of journal entries, in one transaction. Idempotent.

    A closed record stays as it is, unless another process had closed it as lost. Progress of open records is not
    written: it is in the journal of their process.
    """
    records = {entry["request_id"]: entry for entry in entries if "progress" not in entry}
    if not records:
        return
    # In one order everywhere, so that two writers cannot wait for each other.
    rows = [_columns(records[request_id]) for request_id in sorted(records)]
    _make_sums(database, rows)
    with database.begin() as connection:
        _write_records(connection, rows)


def write_progress(database: sa.Engine, entries: Iterable[Any]) -> None:
    """Write the last progress of records that are open, from the journal of a dead process."""
    progress: dict[str, dict[str, Any]] = {}
    for entry in entries:
        for values in entry.get("progress", ()):
            report = dict(zip(PROGRESS, values, strict=True))
            progress[report["request_id"]] = report | {"reported_at": entry["at"]}
    if not progress:
        return
    reports = [progress[request_id] for request_id in sorted(progress)]
    with database.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(_PROGRESS_OF_ALL, {"reports": orjson.dumps(reports).decode()})
        else:
            connection.execute(_PROGRESS, [{"of": report["request_id"], **report} for report in reports])


def put(connection: sa.Connection, row: dict[str, Any]) -> None:
    """Write a closed record within a transaction, as `write` does."""
    _write_records(connection, [_columns(row)])


def close_lost(database: sa.Engine, replica: str) -> int:
    """Close the records that a dead replica had open; return their number."""
    return _close(database, _USAGE.replica == replica)


def close_unreported(database: sa.Engine, *, after_s: float) -> int:
    """Close the open records that no process has reported on for `after_s`; return their number.

    A process reports for all its records at once. One of the version before reports for each record.
    """
    after_ms = round(1000 * after_s)
    living = sa.select(_REPLICAS.replica).where(_REPLICAS.reported_at >= _NOW_MS[database.dialect.name] - after_ms)
    return _close(database, (_USAGE.reported_at < now_ms() - after_ms) & _USAGE.replica.not_in(living))


def report_living(database: sa.Engine, replica: str) -> None:
    """Note that a process lives, by the database's clock: processes' clocks may differ by more than the patience."""
    values = {"replica": replica, "reported_at": _NOW_MS[database.dialect.name]}
    insert: Any = {"postgresql": postgresql.insert, "sqlite": sqlite.insert}[database.dialect.name](ledger_replicas)
    with database.begin() as connection:
        connection.execute(
            insert.values(values).on_conflict_do_update(
                index_elements=["replica"], set_={"reported_at": insert.excluded.reported_at}
            )
        )


def living(database: sa.Engine, *, after_s: float) -> set[str]:
    """Return the processes that have reported within `after_s`."""
    since = _NOW_MS[database.dialect.name] - round(1000 * after_s)
    with database.connect() as connection:
        return set(connection.scalars(sa.select(_REPLICAS.replica).where(_REPLICAS.reported_at >= since)))


def forget_dead(database: sa.Engine, *, after_s: float) -> None:
    """Delete the reports of processes that have not reported for `after_s`."""
    now = _NOW_MS[database.dialect.name]
    with database.begin() as connection:
        connection.execute(ledger_replicas.delete().where(_REPLICAS.reported_at < now - round(1000 * after_s)))


def spent(database: sa.Engine, caller: Caller, at_ms: int, currency: str) -> Spent:
    """Return what a tenant and its key were billed on that day and in that month (UTC), and the tenant's free tokens.

    A request belongs to the day on which it was admitted. Money is what was billed in `currency`: amounts of different
    currencies are never added.
    """
    day = dt.datetime.fromtimestamp(at_ms / 1000, dt.UTC).date()
    month = day.replace(day=1)
    today, first, following = map(days, (day, month, (month + dt.timedelta(days=32)).replace(day=1)))
    tokens = _DAYS.input_tokens + _DAYS.output_tokens
    of_currency = [sa.case((_DAYS.currency == currency, amount)) for amount in (_DAYS.amount_units, _DAYS.amount_nanos)]
    sums = [
        sa.func.coalesce(sa.func.sum(amount if whole else sa.case((_DAYS.day == today, amount))), 0)
        for whole in (False, True)
        for amount in (tokens, *of_currency)
    ]
    with database.connect() as connection:
        of_tenant, of_key = (
            connection.execute(sa.select(*sums).where(column == name, _DAYS.day >= first, _DAYS.day < following)).one()
            for column, name in ((_DAYS.tenant_id, caller.tenant_id), (_DAYS.key_id, caller.key_id))
        )
        free = sa.select(sa.func.coalesce(sa.func.sum(_DAYS.free_tokens), 0))
        free_tokens = connection.scalar(free.where(_DAYS.tenant_id == caller.tenant_id))
    return Spent(_sums(of_tenant), _sums(of_key), int(free_tokens or 0))


def days(day: dt.date) -> int:
    """Return the number of a day: days since the epoch."""
    return (day - dt.date(1970, 1, 1)).days


def _sums(row: Iterable[Any]) -> Sums:
    day_tokens, day_units, day_nanos, tokens, units, nanos = map(int, row)
    return Sums(day_tokens, tokens, day_units * _NANOS + day_nanos, units * _NANOS + nanos)


def _close(database: sa.Engine, which: sa.ColumnElement[bool]) -> int:
    statement = usage_records.update().where(_USAGE.ending.is_(None), which).values(closed_at=now_ms(), **_LOST)
    with database.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("LOCK TABLE usage_days IN ROW SHARE MODE")  # before the records, as elsewhere
        return connection.execute(statement).rowcount


def _make_sums(database: sa.Engine, rows: list[dict[str, Any]]) -> None:
    """Make the rows of sums that these records need and that do not exist, in a transaction before theirs.

    Only rows that exist can be locked in one order for all writers.
    """
    if not rows or database.dialect.name != "postgresql":
        return
    groups = {(row["opened_at"] // _DAY_MS, *(row[name] for name in NAMES[1:])) for row in rows}
    parameters = {"groups": orjson.dumps([dict(zip(NAMES, group, strict=True)) for group in groups]).decode()}
    with database.begin() as connection:
        if connection.execute(_COUNT_SUMS, parameters).scalar_one() < len(groups):
            connection.execute(_MAKE_SUMS, parameters)


def _write_records(connection: sa.Connection, rows: list[dict[str, Any]]) -> None:
    """Insert or update rows."""
    if connection.dialect.name == "postgresql":
        # One statement, so that the sums are changed once; their rows are locked before, in one order for all writers.
        parameters = {"rows": orjson.dumps(rows).decode()}
        connection.execute(_LOCK_SUMS, parameters)
        connection.execute(_UPSERT, parameters)
    else:
        connection.execute(_upsert_of_sqlite(), rows)


def _upsert_of_sqlite() -> sa.Insert:
    insert = sqlite.insert(usage_records)
    return insert.on_conflict_do_update(
        index_elements=[_USAGE.request_id],
        set_={name: insert.excluded[name] for name in COLUMNS if name != "request_id"},
        where=_USAGE.ending.is_(None) | ((_USAGE.ending == Outcome.LOST.value) & insert.excluded.ending.is_not(None)),
    )


_ROWS = "json_populate_recordset(NULL::usage_records, CAST(:rows AS json))"

_UPSERT = sa.text(
    f"INSERT INTO usage_records ({', '.join(COLUMNS)}) SELECT {', '.join(COLUMNS)} FROM {_ROWS} "  # noqa: S608
    "ON CONFLICT (request_id) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in COLUMNS if name != "request_id")
    + " WHERE usage_records.ending IS NULL "
    f"OR (usage_records.ending = '{Outcome.LOST.value}' AND excluded.ending IS NOT NULL)"
)

_SUMS = ", ".join(column.name for column in usage_days.c if column.name not in NAMES)
_GROUPS = "json_populate_recordset(NULL::usage_days, CAST(:groups AS json))"

_COUNT_SUMS = sa.text(
    f"SELECT count(*) FROM usage_days JOIN {_GROUPS} AS needed USING ({', '.join(NAMES)})"  # noqa: S608
)

_MAKE_SUMS = sa.text(
    f"INSERT INTO usage_days ({', '.join(NAMES)}, {_SUMS}) "  # noqa: S608
    f"SELECT {', '.join(NAMES)}{', 0' * (len(usage_days.c) - len(NAMES))} FROM {_GROUPS} ORDER BY {', '.join(NAMES)} "
    "ON CONFLICT DO NOTHING"
)

_LOCK_SUMS = sa.text(
    f"SELECT 1 FROM usage_days JOIN (SELECT DISTINCT opened_at / {_DAY_MS} AS day, {', '.join(NAMES[1:])} "  # noqa: S608
    f"FROM {_ROWS}) AS written USING ({', '.join(NAMES)}) ORDER BY {', '.join(NAMES)} FOR UPDATE OF usage_days"
)


_PROGRESS = (
    usage_records.update()
    .where(_USAGE.request_id == sa.bindparam("of"), _USAGE.ending.is_(None))
    .values({name: sa.bindparam(name) for name in (*PROGRESS[1:], "reported_at")})
)

_PROGRESS_OF_ALL = sa.text(
    f"UPDATE usage_records SET {', '.join(f'{name} = report.{name}' for name in (*PROGRESS[1:], 'reported_at'))} "  # noqa: S608
    "FROM json_populate_recordset(NULL::usage_records, CAST(:reports AS json)) AS report "
    "WHERE usage_records.request_id = report.request_id AND usage_records.ending IS NULL"
)
"""One statement, so that the sums are changed once, in one order."""


def _columns(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in COLUMNS}
