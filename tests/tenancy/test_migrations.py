"""Migrations: they make the tables of `schema.py`, once, also if several processes start together."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from serving.tenancy import database as databases
from serving.tenancy.schema import metadata, plans, store_state, tenants


def test_migrations_make_the_tables_of_the_schema(database: sa.Engine) -> None:
    """The migrated database has exactly the tables, columns, types and indices that the code expects."""
    with database.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "target_metadata": metadata})
        assert compare_metadata(context, metadata) == []


def test_migrating_again_changes_nothing(database: sa.Engine) -> None:
    """A second migration keeps all rows, also those changed since the first."""
    with database.begin() as connection:
        connection.execute(plans.delete().where(plans.c.name == "unlimited"))
    databases.migrate(database)
    with database.connect() as connection:
        assert connection.scalars(sa.select(plans.c.name)).all() == ["standard"]


def test_several_processes_may_migrate_at_once(database_url: str) -> None:
    """Replicas that start together on an empty database all succeed, and the first rows exist once."""
    script = "import sys; from serving.tenancy.database import connect, migrate; migrate(connect(sys.argv[1]))"
    racing = [subprocess.Popen([sys.executable, "-c", script, database_url]) for _ in range(3)]
    assert [process.wait(120) for process in racing] == [0, 0, 0]
    database = databases.connect(database_url)
    with database.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(store_state)) == 1
    database.dispose()


def test_a_database_of_a_later_version_is_refused(database: sa.Engine) -> None:
    """An older release refuses the tables of a later one."""
    with database.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(databases.UnusableDatabase, match="9999"):
        databases.migrate(database)


def test_a_key_belongs_to_a_tenant_and_a_tenant_to_a_plan(database: sa.Engine) -> None:
    """The database enforces references."""
    row: dict[str, Any] = {"id": "a", "name": "a", "region": "beijing", "state": "active", "plan": "none", "limits": {}}
    row |= {"free_only": False, "log_content": False, "created_at": 0, "activated_at": 0}
    with pytest.raises(sa.exc.IntegrityError), database.begin() as connection:
        connection.execute(tenants.insert().values(row))
