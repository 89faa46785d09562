"""Times of budgets, invoices and reports with ten million records in PostgreSQL: `python -m tests.tenancy.usage_scale`.

The database is made as version 0001, filled, and migrated by this version. `--old` stops before the migration and
prints the address, so that another version can be measured over the same records.
"""

from __future__ import annotations

import datetime as dt
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.servers import Postgres
from serving.tenancy import database as databases
from serving.tenancy.billing import reports, sums
from serving.tenancy.ledger import usage_table
from serving.types import Caller
from tests.tenancy.old_database import upgrade

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS, TENANTS, KEYS = 10_000_000, 100, 1000
FIRST_MS = 1_796_083_200_000  # 2026-12-01, 00:00 UTC

_FILL = f"""
    INSERT INTO usage_records
    SELECT 'request-' || n, 'tenant-' || mod(mod(n, {KEYS}), {TENANTS}), 'key-' || mod(n, {KEYS}), 'beijing', 'openai',
        'm', false, 'url', 'r', {FIRST_MS} + n::bigint * 267, {FIRST_MS} + n::bigint * 267, NULL, NULL,
        {FIRST_MS} + n::bigint * 267, 10000, 133, mod(n, 500), 0, 0, 'finished', 'stop', true, 0, 'CNY', '0.0158',
        '0.0127', 133 * 15800 + mod(n, 500) * 12700
    FROM generate_series(1, {ROWS}) AS n
"""  # noqa: S608


def measure(name: str, run: Callable[[], Any], times: int = 5) -> None:
    """Print the shortest and the longest time of some calls."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        took.append(time.perf_counter() - began)
    print(f"{name}: {min(took):.4f} to {max(took):.4f} s", flush=True)  # noqa: T201


def queries(database: Any) -> None:
    """Measure what reads sums."""
    at_ms = FIRST_MS + 20 * 86_400_000
    measure("budget check", lambda: usage_table.spent(database, Caller("tenant-7", "key-7"), at_ms, "CNY"))
    measure("invoice", lambda: reports.invoice(database, "tenant-7", month="2026-12"))
    month = (dt.date(2026, 12, 1), dt.date(2026, 12, 31))
    for by in (("day", "tenant"), ("tenant",), ("key",)):
        run = partial(reports.usage, database, since=month[0], until=month[1], by=by)
        measure(f"usage --by {','.join(by)}", run, 3)


def main() -> None:
    """Make the records and measure."""
    with Postgres() as server:
        database = databases.connect(server.url)
        upgrade(database, "0001")
        with database.begin() as connection:
            connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
            connection.exec_driver_sql(_FILL)
        with database.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("SET statement_timeout = 0")
            connection.exec_driver_sql("VACUUM ANALYZE usage_records")
        if "--old" in sys.argv:
            print(server.url, flush=True)  # noqa: T201
            sys.stdin.readline()
        measure("migration", lambda: databases.migrate(database), 1)
        with database.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("VACUUM ANALYZE usage_days")
        queries(database)
        measure("sums check", lambda: sums.check(database), 1)
        database.dispose()


if __name__ == "__main__":
    main()
