"""Copies of journals in a bucket: what a lost machine closed while the database was away is booked once, exactly."""

from __future__ import annotations

import asyncio
import shutil
import threading
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import sqlalchemy as sa

from serving.config import Settings
from serving.storage.journal_copies import JournalCopies
from serving.tenancy.billing import sums
from serving.tenancy.ledger import copies as journal_copies
from serving.tenancy.ledger import database_writer, usage_table
from serving.tenancy.ledger.journal_lines import entries, line
from serving.tenancy.ledger.ledger import Ledger
from serving.tenancy.ledger.usage_record import now_ms
from serving.tenancy.schema import usage_days
from serving.types import Outcome
from tests.storage.s3 import S3Server, bucket_settings
from tests.tenancy.test_ledger import kill, rows, until, usage

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("hurried")


class MemoryCopies:
    """A `CopyStore` in memory. `failing`: each call fails."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.failing = False
        self.writes = 0

    def _check(self) -> None:
        if self.failing:
            raise OSError("the bucket is away")

    def write(self, name: str, data: bytes) -> None:
        """Write an object."""
        self._check()
        self.writes += 1
        self.objects[name] = data

    def names(self) -> list[str]:
        """Return all names."""
        self._check()
        return sorted(self.objects)

    def read(self, name: str) -> bytes | None:
        """Return an object."""
        self._check()
        return self.objects.get(name)

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects."""
        self._check()
        for name in names:
            self.objects.pop(name, None)


class Outage:
    """A database that is away for this process's ledgers while `away` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.away = False
        for name in ("write", "write_progress", "report_living", "close_lost", "close_unreported", "living"):
            monkeypatch.setattr(usage_table, name, self._failing(getattr(usage_table, name)))

    def _failing(self, real: Any) -> Any:
        def call(*positional: Any, **named: Any) -> Any:
            if self.away:
                raise sa.exc.OperationalError("", None, Exception("away"))
            return real(*positional, **named)

        return call


@pytest.fixture
def outage(monkeypatch: pytest.MonkeyPatch) -> Outage:
    """Short times, and a switch for the database."""
    monkeypatch.setattr(journal_copies, "_COPY_EVERY_S", 0.05)
    monkeypatch.setattr(journal_copies, "_COPY_AFTER_S", 0.3)
    monkeypatch.setattr(database_writer, "_SWEEP_EVERY_S", 0.1)
    monkeypatch.setattr(database_writer, "_BOOK_COPIES_EVERY_S", 0.1)
    monkeypatch.setattr(database_writer, "_REPORT_LIVING_S", 0.1)
    monkeypatch.setattr(database_writer, "UNREPORTED_S", 1.5)
    return Outage(monkeypatch)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """An S3 server that accepts any key."""
    with S3Server() as server:
        yield server


@pytest.fixture
def bucket(s3_server: S3Server) -> JournalCopies:
    """Copies in a new bucket of a real S3 server."""
    return JournalCopies(Settings(**bucket_settings(s3_server.url, s3_server.bucket())))  # type: ignore[arg-type]


def ledger_on(disk: Path, database: sa.Engine, store: Any) -> Ledger:
    """Return a process's ledger on its own disk."""
    return Ledger(database, disk, max_journal_bytes=2**24, copies=store)


def billed(ledger: Ledger, name: str, amount: int) -> None:
    """Open and close a record."""
    record = usage(name, ledger.replica)
    ledger.open(record)
    record.billed, record.amount_nanos, record.input_tokens, record.output_tokens = True, amount, 21, 24
    ledger.close(record, Outcome.FINISHED)


async def copied(ledger: Ledger) -> None:
    """Wait until the store has all that the journal has."""
    copier = ledger._copier
    assert copier is not None
    began, end = copier.copied, ledger._journal._committed
    await until(lambda: copier.copied > began and copier._reader.position >= end)


async def lose_machine(ledger: Ledger, disk: Path) -> None:
    """Delete the disk of a process, then kill it."""
    shutil.rmtree(disk)
    await asyncio.to_thread(ledger._copier._stopping.set)  # type: ignore[union-attr]
    ledger._copier._copy = lambda **_: None  # type: ignore[union-attr, method-assign]
    kill(ledger)


async def check_lost_machine(tmp_path: Path, database: sa.Engine, outage: Outage, store: Any) -> None:
    """Run the case: two frontends, each with its own disk; one is lost with its disk in an outage of the database."""
    disks = [tmp_path / "one", tmp_path / "two"]
    lost, other = (ledger_on(disk, database, store) for disk in disks)
    await lost.start()
    await other.start()
    billed(lost, "before", 1)
    running, ended = usage("running", lost.replica), usage("ended", lost.replica)
    lost.open(running)
    lost.open(ended)
    await until(lambda: len(rows(database)) == 3)
    assert store.names() == []  # while the database keeps up nothing is copied
    outage.away = True
    for number in range(100):
        billed(lost, f"lost-{number}", 10**9 + number)
        billed(other, f"other-{number}", 1000)
    late = usage("late", lost.replica)
    lost.open(late)
    late.input_tokens, running.input_tokens = 33, 44
    lost._journal.append({"at": now_ms(), "progress": [late.progress(), running.progress()]})
    ended.billed, ended.amount_nanos = True, 7
    lost.close(ended, Outcome.FINISHED)
    await copied(lost)
    assert {name.partition("/")[0] for name in store.names()} >= {lost.replica}
    await lose_machine(lost, disks[0])
    outage.away = False

    await until(lambda: "late" in rows(database) and rows(database)["running"].ending is not None)
    await until(lambda: rows(database)["late"].ending is not None and not other.pending and not store.names())
    found = rows(database)
    assert len(found) == 204
    assert [found[f"lost-{number}"].amount_nanos for number in range(100)] == [10**9 + n for n in range(100)]
    assert {found[f"lost-{number}"].ending for number in range(100)} == {"finished"}
    assert (found["ended"].ending, found["ended"].amount_nanos) == ("finished", 7)
    assert [(found[name].ending, found[name].input_tokens) for name in ("late", "running")] == [
        ("lost", 33),
        ("lost", 44),
    ]
    with database.connect() as connection:
        amount = sum(
            10**9 * units + nanos
            for units, nanos in connection.execute(sa.select(usage_days.c.amount_units, usage_days.c.amount_nanos))
        )
    assert amount == 1 + 7 + sum(10**9 + number for number in range(100)) + 100 * 1000
    assert sums.check(database)["different"] == 0
    await other.stop()
    assert store.names() == []


async def test_a_machine_that_is_lost_in_an_outage_loses_no_bill(
    database: sa.Engine, tmp_path: Path, outage: Outage
) -> None:
    """Records that only the lost disk had are booked by the other frontend, each once, to the nano-unit."""
    await check_lost_machine(tmp_path, database, outage, MemoryCopies())


async def test_a_machine_that_is_lost_loses_no_bill_with_s3(
    database: sa.Engine, tmp_path: Path, outage: Outage, bucket: JournalCopies
) -> None:
    """The same holds with a real S3 server."""
    await check_lost_machine(tmp_path, database, outage, bucket)


async def test_copies_are_booked_once_by_several_processes(database: sa.Engine, tmp_path: Path, outage: Outage) -> None:
    """Processes that find the same copies at once, or again, book each record once."""
    store = MemoryCopies()
    lost = ledger_on(tmp_path / "one", database, store)
    await lost.start()
    outage.away = True
    for number in range(50):
        billed(lost, f"r{number}", 5)
    await copied(lost)
    await lose_machine(lost, tmp_path / "one")
    outage.away = False
    copies = dict(store.objects)

    def book() -> None:
        store.objects |= copies
        found = journal_copies.book_lost(
            store, database, lambda rows: usage_table.write(database, rows), owner="me", after_s=60
        )
        assert set(found) <= {lost.replica}

    usage_table.report_living(database, lost.replica)
    book()
    assert rows(database) == {}  # it lives, and will write them
    usage_table.forget_dead(database, after_s=-1)
    threads = [threading.Thread(target=book) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    book()
    assert store.objects == {}
    assert {row.amount_nanos for row in rows(database).values()} == {5}
    with database.connect() as connection:
        assert connection.scalar(sa.select(sa.func.sum(usage_days.c.amount_nanos))) == 250


async def test_records_that_no_disk_takes_are_copied(database: sa.Engine, tmp_path: Path, outage: Outage) -> None:
    """With the disk deleted and the database away, what is closed is in the bucket; a kill loses none of it."""
    store = MemoryCopies()
    lost, disk = ledger_on(tmp_path / "one", database, store), tmp_path / "one"
    await lost.start()
    outage.away = True
    running = [usage(f"r{number}", lost.replica) for number in range(20)]
    for record in running:
        lost.open(record)
    await copied(lost)
    shutil.rmtree(disk)
    for record in running:
        record.billed, record.amount_nanos = True, 3
        lost.close(record, Outcome.FINISHED)

    def finished() -> int:
        lines = [entries(data)[0] for name, data in store.objects.items() if "memory" in name]
        return len({entry["request_id"] for found in lines for entry in found if entry["ending"] == "finished"})

    await until(lambda: finished() == 20)
    ledger_kill = asyncio.to_thread(lost._copier._stopping.set)  # type: ignore[union-attr]
    await ledger_kill
    lost._copier._copy = lambda **_: None  # type: ignore[union-attr, method-assign]
    kill(lost)
    outage.away = False
    other = ledger_on(tmp_path / "two", database, store)
    await other.start()
    await until(lambda: {row.ending for row in rows(database).values()} == {"finished"})
    assert {(row.amount_nanos, row.billed) for row in rows(database).values()} == {(3, True)}
    assert len(rows(database)) == 20
    await other.stop()


async def test_a_bucket_that_is_away_costs_no_request(database: sa.Engine, tmp_path: Path, outage: Outage) -> None:
    """A failing bucket is logged; requests, the journal and the bills go on, and copies follow when it is back."""
    store = MemoryCopies()
    store.failing = True
    ledger = ledger_on(tmp_path / "one", database, store)
    await ledger.start()
    outage.away = True
    for number in range(30):
        billed(ledger, f"r{number}", 2)
    await until(lambda: ledger._copier is not None and ledger._copier._failing)
    assert ledger.writable
    store.failing = False
    await copied(ledger)
    assert sum(len(entries(data)[0]) for data in store.objects.values()) >= 60
    outage.away = False
    await until(lambda: not ledger.pending and not store.objects)
    assert {row.amount_nanos for row in rows(database).values()} == {2}
    await ledger.stop()


async def test_a_stop_in_an_outage_leaves_a_copy(database: sa.Engine, tmp_path: Path, outage: Outage) -> None:
    """A process that is stopped while the database is away copies all that is pending: its disk may go with it."""
    store = MemoryCopies()
    ledger = ledger_on(tmp_path / "one", database, store)
    await ledger.start()
    outage.away = True
    for number in range(5):
        billed(ledger, f"r{number}", 2)
    await ledger.stop()
    found = [entry for data in store.objects.values() for entry in entries(data)[0]]
    assert {entry["request_id"] for entry in found if entry.get("ending") == "finished"} == {f"r{n}" for n in range(5)}


def test_a_copy_that_is_no_journal_holds_up_nothing(
    database: sa.Engine, outage: Outage, s3_server: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Objects that were changed or made by others are logged and stay; copies of other processes are booked."""
    name = s3_server.bucket()
    store = JournalCopies(Settings(**bucket_settings(s3_server.url, name)))  # type: ignore[arg-type]
    closed = usage("closed", "good", ending="finished", billed=True, amount_nanos=4)
    usage_table.write(database, [closed.row()])
    store.write("good/00000001-0000000", line(usage("r", "good", ending="finished", billed=True, amount_nanos=3).row()))
    store.write("good/00000001-0000900", line(closed.row() | {"amount_nanos": 0, "ending": "failed"}) + b"no line\n")
    store.write("bad-1/00000001-0000000", line(5))
    store.write("bad-2/00000001-0000000", line({"request_id": "x"}))
    httpx.put(f"{s3_server.url}/{name}/some/prefix/ledger/bad-3/x", content=b"{}", timeout=30).raise_for_status()
    booked = list(
        journal_copies.book_lost(
            store, database, lambda rows: usage_table.write(database, rows), owner="me", after_s=60
        )
    )
    assert booked == ["good"]
    assert {name: row.amount_nanos for name, row in rows(database).items()} == {"closed": 4, "r": 3}
    assert [each.partition("/")[0] for each in store.names()] == ["bad-1", "bad-2", "bad-3"]
    messages = [record.message for record in caplog.records]
    assert messages.count("copies of a lost process cannot be booked") == 3
    assert messages.count("copy of a journal is damaged") == 1
    assert not outage.away
