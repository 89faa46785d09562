"""Migrations: they make the tables of `schema.py`, once, also if several processes start together."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from serving.config import Settings
from serving.tenancy import database as databases
from serving.tenancy.admin.service import Administration
from serving.tenancy.billing import reports, sums
from serving.tenancy.key_hashing import Pepper
from serving.tenancy.keys import Keyring
from serving.tenancy.migrations import access_triggers
from serving.tenancy.schema import metadata, plans, store_state, tenants
from tests.tenancy.old_database import copy, restore_sqlite, upgrade

if TYPE_CHECKING:
    from pathlib import Path


def test_migrations_make_the_tables_of_the_schema(database: sa.Engine) -> None:
    """The migrated database has exactly the tables, columns, types and indices that the code expects."""
    with database.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "target_metadata": metadata})
        assert compare_metadata(context, metadata) == []


def test_migrations_make_the_triggers_of_the_schema(database: sa.Engine) -> None:
    """Tables made without migrations have the same triggers, and each change of each column of a row counts."""
    query = {
        "sqlite": "SELECT name, sql FROM sqlite_master WHERE type = 'trigger' ORDER BY name",
        "postgresql": "SELECT tgname || tgrelid::regclass, pg_get_triggerdef(oid) || pg_get_functiondef(tgfoid) "
        "FROM pg_trigger WHERE NOT tgisinternal ORDER BY 1",
    }[database.dialect.name]
    with database.begin() as connection:
        migrated = connection.exec_driver_sql(query).all()
        metadata.drop_all(connection)
        if database.dialect.name == "postgresql":
            for name in ("access_changes", "access_removes", "access_numbers", "usage_days_follow"):
                connection.exec_driver_sql(f"DROP FUNCTION {name}")
        metadata.create_all(connection)
        assert connection.exec_driver_sql(query).all() == migrated
    assert len(migrated) == {"sqlite": 19, "postgresql": 20}[database.dialect.name]
    for table, columns in access_triggers.COLUMNS.items():
        assert {*columns, "revision"} == set(metadata.tables[table].c.keys())


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


KEPT = [
    ("acme", "2026-10", "CNY", 4541, 0, "0.104882"),
    ("acme", "2026-10", "USD", 1784, 952, "1.347116581"),
    ("acme", "2026-11", "CNY", 1945, 0, "0.0274977"),
    ("acme", "2026-11", "USD", 1598, 238, "2.143404256"),
    ("umbrella", "2026-10", "CNY", 5428, 842, "0.065647532"),
    ("umbrella", "2026-10", "USD", 557, 0, "0.80"),
    ("umbrella", "2026-11", "CNY", 3406, 715, "0.054380544"),
    ("umbrella", "2026-11", "USD", 2278, 796, "2.365067389"),
]
"""Tenant, month, currency, tokens, free tokens and amount of the kept database, added up by SQLite when it was made."""


def test_a_database_of_the_first_version_is_migrated(database_url: str, tmp_path: Path) -> None:
    """The sums are filled from the records that exist; invoices, keys and open requests are as before."""
    restore_sqlite(tmp_path / "old.db")
    database = databases.connect(database_url)
    if database.dialect.name == "sqlite":
        database.dispose()
        database = databases.connect(f"sqlite:///{tmp_path / 'old.db'}")
    else:
        old = databases.connect(f"sqlite:///{tmp_path / 'old.db'}")
        upgrade(database, "0001")
        copy(old, database)
        old.dispose()
    databases.migrate(database)
    found = []
    for tenant in ("acme", "umbrella"):
        for month in ("2026-10", "2026-11"):
            bill = reports.invoice(database, tenant, month=month)
            found += [
                (
                    tenant,
                    month,
                    each["currency"],
                    each["input_tokens"] + each["output_tokens"],
                    each["free_tokens"],
                    each["amount"],
                )
                for each in bill["totals"]
            ]
    assert found == KEPT
    assert sums.check(database) == {"sums": 58, "different": 0}
    settings = Settings(engine="fake", data_dir=tmp_path, region="beijing")
    keys = Keyring(settings, database)
    keys.refresh()
    assert sorted(keys._snapshot.by_id) == ["key-0", "key-1", "key-2"]
    admin = Administration(database, Pepper.of(settings), "test")
    admin.revoke_key("key-0")
    keys.refresh()
    assert sorted(keys._snapshot.by_id) == ["key-1", "key-2"]
    assert keys.rows_read == 3 + 2 + 2 + 2 + 1  # keys, tenants, plans, prices; the revoked key
    database.dispose()
