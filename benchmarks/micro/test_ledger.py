"""The ledger: appending a record to the journal, syncing to the disk, and writing to the database.

pytest benchmarks/micro/test_ledger.py --benchmark-sort=name
"""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING, Any

import orjson
import pytest
import sqlalchemy as sa

from benchmarks.servers import Postgres
from serving.tenancy.database import connect, migrate
from serving.tenancy.ledger import usage_table
from serving.tenancy.ledger.journal import Journal
from serving.tenancy.ledger.usage_record import UsageRecord
from serving.tenancy.schema import usage_records

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BATCH = 100
_numbers = itertools.count()


def entry() -> dict[str, Any]:
    """Return a record that was just opened, as the journal stores it."""
    record = UsageRecord(
        request_id=f"r{next(_numbers)}",
        tenant_id="acme",
        key_id="k1",
        region="beijing",
        dialect="openai",
        model="captioner",
        stream=True,
        audio_form="inline",
        replica="here",
        currency="CNY",
        input_price="0.0158",
        output_price="0.0127",
    )
    return record.row()


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """The journal of a process."""
    with_lock = Journal(tmp_path, "here").open()
    yield with_lock
    with_lock.close()


def test_append(benchmark: Callable[..., Any], journal: Journal) -> None:
    """A record is appended to the journal, where it survives the process; each request waits for that twice."""
    benchmark(journal.append, entry())
    assert journal.appended_bytes > 0


def test_append_reference(benchmark: Callable[..., Any], tmp_path: Path) -> None:
    """The same record is written to a file as JSON."""
    file = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    record = entry()
    benchmark(lambda: os.write(file, orjson.dumps(record)))
    os.close(file)
    assert (tmp_path / "file").stat().st_size > 0


def test_append_and_sync(benchmark: Callable[..., Any], journal: Journal) -> None:
    """A batch is synced to the disk, as a thread does, so that no request waits for it."""

    def batch() -> None:
        for record in records:
            journal.append(record)
        journal.sync()

    records = [entry() for _ in range(BATCH)]
    benchmark(batch)
    assert journal.appended >= BATCH


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sa.Engine]:
    """An empty database of each kind; PostgreSQL without fsync."""
    if request.param == "sqlite":
        engine = connect(f"sqlite:///{tmp_path / 'ledger.db'}")
        migrate(engine)
        yield engine
        engine.dispose()
        return
    with Postgres() as server:
        engine = connect(server.url)
        migrate(engine)
        yield engine
        engine.dispose()


def test_write(benchmark: Callable[..., Any], database: sa.Engine) -> None:
    """A batch of records is written to the database, as the ledger's thread does."""
    benchmark.pedantic(  # type: ignore[attr-defined]
        usage_table.write, setup=lambda: ((database, [entry() for _ in range(BATCH)]), {}), rounds=30
    )
    with database.connect() as connection:
        assert len(connection.execute(sa.select(usage_records.c.request_id)).all()) >= BATCH


def test_write_reference(benchmark: Callable[..., Any], database: sa.Engine) -> None:
    """The same number of plain rows, each inserted once, is written by one statement."""

    def write(rows: list[dict[str, Any]]) -> None:
        with database.begin() as connection:
            connection.execute(sa.insert(usage_records), rows)

    def rows() -> tuple[tuple[list[dict[str, Any]]], dict[str, Any]]:
        return ([usage_table._columns(entry()) for _ in range(BATCH)],), {}  # noqa: SLF001 - the ledger's own columns

    benchmark.pedantic(write, setup=rows, rounds=30)  # type: ignore[attr-defined]
