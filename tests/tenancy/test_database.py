"""The database: addresses, SQLite's set-up, transactions and outages."""

from __future__ import annotations

import stat
import threading
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from serving.config import Settings
from serving.tenancy import database as databases
from serving.tenancy.schema import audit_log, store_state

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.servers import Postgres


def test_default_is_a_private_file_in_the_data_directory(tmp_path: Path) -> None:
    """Without an address the database is SQLite, in a file and a directory that only their owner can read."""
    settings = Settings(data_dir=tmp_path / "state")
    database = databases.open_database(settings)
    databases.migrate(database)
    files = [*(tmp_path / "state").glob("captioner.db*")]
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    database.dispose()


@pytest.mark.parametrize(
    "address", ["mysql://root:hunter2@db/x", "hunter2", "sqlite://", "sqlite:///:memory:", "redis://:hunter2@db"]
)
def test_an_unusable_address_is_refused_and_not_repeated(address: str) -> None:
    """The message states what is supported, and does not repeat the address, which may contain a password."""
    with pytest.raises(databases.UnusableDatabase, match=r"postgresql|SQLite") as refused:
        databases.open_database(Settings(database_url=SecretStr(address)))
    assert "hunter2" not in str(refused.value)


def revision(database: sa.Engine) -> int:
    """Return the number of the last change, which a migrated database begins with."""
    with database.connect() as connection:
        return int(connection.scalar(sa.select(store_state.c.revision)) or 0)


def test_a_failed_transaction_leaves_nothing(database: sa.Engine) -> None:
    """A transaction that fails is rolled back, on SQLite too."""
    before = revision(database)

    def fail() -> None:
        with database.begin() as connection:
            connection.execute(store_state.update().values(revision=77))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert revision(database) == before


def test_writers_wait_for_each_other_and_readers_do_not_wait(database: sa.Engine) -> None:
    """Transactions that begin with a write run one after the other; none fails, and a reader sees the state before."""
    writers, times, before = 4, 10, revision(database)

    def write(name: str) -> None:
        for _ in range(times):
            with database.begin() as connection:
                connection.execute(store_state.update().values(revision=store_state.c.revision + 1))
                connection.execute(audit_log.insert().values(at=0, actor=name, action="test", subject="x"))

    threads = [threading.Thread(target=write, args=(str(number),)) for number in range(writers)]
    with database.begin() as held:
        held.execute(store_state.update().values(revision=store_state.c.revision + 1))
        for thread in threads:
            thread.start()
        with database.connect() as reader:
            assert reader.scalar(sa.select(store_state.c.revision)) == before
    for thread in threads:
        thread.join()
    with database.connect() as connection:
        assert connection.scalar(sa.select(store_state.c.revision)) == before + 1 + writers * times
        assert connection.scalar(sa.select(sa.func.count()).select_from(audit_log)) == writers * times


def test_a_database_that_comes_back_is_used_again(postgres: Postgres) -> None:
    """Connections to PostgreSQL fail during an outage and succeed after it, though pooled ones were cut."""
    database = databases.connect(postgres.url)
    with database.connect() as connection:
        assert connection.scalar(sa.select(1)) == 1
    postgres.stop()
    try:
        with pytest.raises(sa.exc.OperationalError):
            database.connect()
    finally:
        postgres.start()
    with database.connect() as connection:
        assert connection.scalar(sa.select(1)) == 1
    database.dispose()
