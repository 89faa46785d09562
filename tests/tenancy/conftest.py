"""Database servers for the tests of tenancy, started once a session."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
import sqlalchemy as sa

from benchmarks.servers import Postgres, Redis
from serving.tenancy import database as databases
from serving.tenancy.ledger import database_writer
from serving.tenancy.ledger import ledger as ledgers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BACKENDS = ("sqlite", "postgresql")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server. A test that stops it starts it again; one that writes to it makes its own database."""
    with Postgres() as server:
        yield server


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Redis]:
    """A Redis server. A test that stops it starts it again."""
    with Redis() as server:
        yield server


@pytest.fixture(params=BACKENDS)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty database for this test, of each kind in turn."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'test.db'}"
    server: Postgres = request.getfixturevalue("postgres")
    name = f"test_{uuid4().hex}"
    admin = sa.create_engine(server.url.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    admin.dispose()
    return server.url.rpartition("/")[0] + f"/{name}"


@pytest.fixture
def database(database_url: str) -> Iterator[sa.Engine]:
    """A database for this test with all tables, of each kind in turn."""
    engine = databases.connect(database_url)
    databases.migrate(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger whose threads and tasks run ten times as often, so that tests wait for conditions and not for turns."""
    monkeypatch.setattr(database_writer, "_WRITE_EVERY_S", 0.05)
    monkeypatch.setattr(database_writer, "_MAX_RETRY_S", 0.5)
    monkeypatch.setattr(ledgers, "_PROGRESS_EVERY_S", 0.1)
    monkeypatch.setattr(ledgers, "_SYNC_EVERY_S", 0.01)
    monkeypatch.setattr(ledgers, "_CHECK_DISK_EVERY_S", 0.1)
