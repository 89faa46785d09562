"""Check of the kept sums (`usage_days`) against all records, and their computation from all records.

Triggers keep them equal (migrations/usage_triggers.py). They can differ only where the triggers were switched off, such
as by `session_replication_role`, or where the table was changed by SQL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from serving.tenancy.migrations.usage_triggers import COLUMNS, FILL, NAMES, SUMS
from serving.tenancy.schema import usage_days

if TYPE_CHECKING:
    from collections.abc import Mapping

_VALUES = COLUMNS[len(NAMES) :]
_KEPT = f"SELECT {', '.join(COLUMNS)} FROM usage_days"  # noqa: S608
_OF_RECORDS = f"SELECT {', '.join([*NAMES, *(f'-({name})' for name in _VALUES)])} FROM records"  # noqa: S608
_DIFFERENCES = sa.text(
    f"WITH records ({', '.join(COLUMNS)}) AS ({SUMS}) "  # noqa: S608
    f"SELECT {', '.join([*NAMES, *(f'sum({name}) AS {name}' for name in _VALUES)])} "
    f"FROM ({_KEPT} UNION ALL {_OF_RECORDS}) AS both_sums GROUP BY {', '.join(NAMES)} "
    f"HAVING {' OR '.join(f'sum({name}) <> 0' for name in _VALUES)} ORDER BY {', '.join(NAMES)}"
)


def check(database: sa.Engine) -> dict[str, int]:
    """Return the number of kept sums, and of those that differ from the records."""
    with database.connect() as connection:
        if connection.dialect.name == "postgresql":
            connection = connection.execution_options(isolation_level="REPEATABLE READ")  # noqa: PLW2901
        with connection.begin():
            return _count(connection, differing="different")


def rebuild(connection: sa.Connection) -> dict[str, int]:
    """Compute the sums from all records, in this transaction; return their number and that of the corrected ones.

    Writers of records wait until the transaction ends. No request does: the journal holds what it adds meanwhile.
    """
    if connection.dialect.name == "postgresql":
        # In the order in which writers lock them.
        connection.exec_driver_sql("LOCK TABLE usage_days IN EXCLUSIVE MODE")
        connection.exec_driver_sql("LOCK TABLE usage_records IN SHARE ROW EXCLUSIVE MODE")
    counted = _count(connection, differing="corrected")
    connection.execute(usage_days.delete())
    connection.exec_driver_sql(FILL)
    return counted | {"sums": connection.scalar(sa.select(sa.func.count()).select_from(usage_days)) or 0}


def differences(connection: sa.Connection) -> list[Mapping[str, int | str]]:
    """Return the sums that differ from the records, as what is kept minus what the records have."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
    return [dict(row) for row in connection.execute(_DIFFERENCES).mappings()]


def _count(connection: sa.Connection, *, differing: str) -> dict[str, int]:
    found = differences(connection)
    kept = connection.scalar(sa.select(sa.func.count()).where(usage_days.c.requests != 0)) or 0
    return {"sums": kept, differing: len(found)}
