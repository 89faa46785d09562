"""Databases of versions before, to be migrated by this one."""

from __future__ import annotations

import sqlite3
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

if TYPE_CHECKING:
    from collections.abc import Iterator

DUMP = Path(__file__).parent / "database_0001.sql"
"""A database of the version 0001, as SQLite dumps it: 2 tenants, 4 keys, 60 records of October and November 2026."""

_TABLES = ("plans", "prices", "store_state", "tenants", "keys", "usage_records")


def restore_sqlite(path: Path) -> None:
    """Make the kept database in a file."""
    with sqlite3.connect(path) as connection:
        connection.executescript(DUMP.read_text())
    connection.close()


def upgrade(database: sa.Engine, revision: str) -> None:
    """Migrate an empty database to a revision."""
    config = Config()
    config.set_main_option("script_location", str(files("serving.tenancy.migrations")))
    with database.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)


def copy(source: sa.Engine, target: sa.Engine) -> None:
    """Copy all rows of the kept database into another one, which has the tables of 0001 and their first rows."""
    tables = sa.MetaData()
    tables.reflect(target, only=_TABLES)
    with source.connect() as old, target.begin() as connection:
        for name in ("store_state", "plans"):
            connection.execute(tables.tables[name].delete())
        for name in _TABLES:
            rows = list(_rows(old, tables.tables[name]))
            connection.execute(tables.tables[name].insert(), rows)


def _rows(connection: sa.Connection, table: sa.Table) -> Iterator[dict[str, object]]:
    for row in connection.execute(sa.select(table)).mappings():
        yield dict(row)
