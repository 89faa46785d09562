"""The ledger on a disk that fails: full, over a quota, read-only, unreadable; what ran is billed, the rest refused."""

from __future__ import annotations

import errno
import logging
import os
import resource
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from serving.errors import NotReady, Overloaded
from serving.tenancy.ledger import journal as journals
from serving.tenancy.ledger import usage_table
from serving.types import Outcome
from tests.tenancy.test_ledger import kill, ledger_in, rows, until, usage

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from serving.tenancy.ledger.ledger import Ledger
    from serving.tenancy.ledger.usage_record import UsageRecord

pytestmark = pytest.mark.usefixtures("hurried")

FAULTS = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO]


class Disk:
    """The calls by which the journal uses the disk; each can be made to fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing: dict[str, int] = {}
        for name in ("pwrite", "posix_fallocate", "fdatasync"):
            monkeypatch.setattr(os, name, self._call(name, getattr(os, name)))

    def fail(self, code: int, *names: str) -> None:
        """Let these calls fail, all of them if none is named."""
        self.failing = dict.fromkeys(names or ("pwrite", "posix_fallocate", "fdatasync"), code)

    def _call(self, name: str, real: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if code := self.failing.get(name):
                raise OSError(code, os.strerror(code))
            return real(*arguments)

        return call


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """The disk under the journal."""
    return Disk(monkeypatch)


class Database:
    """The ledger's use of the database, which can be made to fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.away = False
        write = usage_table.write

        def call(*arguments: Any) -> None:
            if self.away:
                raise sa.exc.OperationalError("", {}, ConnectionError("away"))
            write(*arguments)

        monkeypatch.setattr(usage_table, "write", call)


@pytest.fixture
def access(monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    """The access to the database."""
    made = Database(monkeypatch)
    yield made
    made.away = False


def delivered(record: UsageRecord) -> UsageRecord:
    """Return a record of a caption that was delivered whole: 20 tokens, billed 700 nano-units."""
    record.output_tokens, record.billed, record.amount_nanos = 20, True, 700
    return record


def bills(database: sa.Engine) -> dict[str, tuple[Any, ...]]:
    """Return ending, billed, tokens and amount of each record in the database."""
    return {name: (row.ending, row.billed, row.output_tokens, row.amount_nanos) for name, row in rows(database).items()}


def messages(caplog: pytest.LogCaptureFixture, message: str) -> list[Any]:
    """Return the log records with that message."""
    return [record for record in caplog.records if record.message == message]


async def started(ledger: Ledger, *names: str) -> list[UsageRecord]:
    """Start a ledger and open records of these names in it."""
    await ledger.start()
    records = [usage(name, ledger.replica) for name in names]
    for record in records:
        ledger.open(record)
    return records


@pytest.mark.parametrize("code", FAULTS, ids=errno.errorcode.get)
async def test_what_ran_is_billed_when_the_disk_works_again(
    database: sa.Engine,
    tmp_path: Path,
    disk: Disk,
    access: Database,
    caplog: pytest.LogCaptureFixture,
    *,
    code: int,
) -> None:
    """Captions delivered on a failing disk, without a database, are kept and billed; new requests are refused."""
    caplog.set_level(logging.INFO)
    ledger = ledger_in(tmp_path, database)
    records = await started(ledger, "a", "b", "c")
    assert ledger.writable
    access.away = True
    disk.fail(code)
    for record in records[:2]:
        ledger.close(delivered(record), Outcome.FINISHED)
    assert (ledger.unrecorded, ledger.writable) == (2, False)
    for _ in range(3):
        with pytest.raises(Overloaded) as refused:
            ledger.open(usage("new", ledger.replica))
        assert refused.value.reason == "ledger"
    with pytest.raises(NotReady):
        ledger.check_writable()
    await until(lambda: ledger.write_failures > 0)
    [line] = messages(caplog, "ledger cannot record, new requests are refused")
    assert (line.reason, line.running) == (f"{errno.errorcode[code]}: {os.strerror(code)}", 2)
    assert [each.usage_record["request_id"] for each in messages(caplog, "usage record kept in memory")] == ["a", "b"]

    disk.failing = {}
    await until(lambda: ledger.writable)
    assert ledger.unrecorded == 0
    ledger.open(usage("later", ledger.replica))
    [line] = messages(caplog, "ledger records again")
    assert (line.kept, line.refused, line.unrecorded) == (2, 3, 0)
    access.away = False
    ledger.close(delivered(records[2]), Outcome.FINISHED)
    await until(lambda: ledger.pending == 0)
    finished = ("finished", True, 20, 700)
    assert bills(database) == dict.fromkeys("abc", finished) | {"later": (None, False, 0, 0)}
    await ledger.stop()
    assert ledger.unstored == 0
    assert "nothing was lost" not in caplog.text


async def test_the_database_takes_what_the_disk_does_not(
    database: sa.Engine, tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    """While the disk fails, closed records go directly into the database; the process may end then."""
    ledger = ledger_in(tmp_path, database)
    first, second = await started(ledger, "a", "b")
    disk.fail(errno.EIO)
    ledger.close(delivered(first), Outcome.FINISHED)
    await until(lambda: bills(database).get("a") == ("finished", True, 20, 700))
    await until(lambda: ledger.unrecorded == 0)
    assert not ledger.writable
    ledger.close(delivered(second), Outcome.FINISHED)
    await ledger.stop()
    assert bills(database) == dict.fromkeys("ab", ("finished", True, 20, 700))
    assert (ledger.unstored, messages(caplog, "usage record not stored")) == (0, [])


async def test_what_can_be_stored_nowhere_is_logged(
    database: sa.Engine, tmp_path: Path, disk: Disk, access: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """If disk and database fail until the end, each record is one line of the log with everything that is billed."""
    ledger = ledger_in(tmp_path, database)
    records = await started(ledger, "a", "b", "c")
    access.away = True
    disk.fail(errno.ENOSPC)
    for record in records:
        ledger.close(delivered(record), Outcome.FINISHED)
    await ledger.stop()
    lines = messages(caplog, "usage record not stored")
    assert ledger.unstored == 3
    assert [line.levelno for line in lines] == [logging.ERROR] * 3
    assert [line.usage_record["request_id"] for line in lines] == ["a", "b", "c"]
    assert {(line.usage_record["tenant_id"], line.usage_record["amount_nanos"]) for line in lines} == {("acme", 700)}
    await ledger.stop()
    ledger.log_unstored()
    assert ledger.unstored == 3


async def test_a_sync_that_fails_is_not_believed_when_repeated(
    database: sa.Engine, tmp_path: Path, disk: Disk, access: Database
) -> None:
    """Records that the disk did not confirm are kept and written again, into a new segment: the kernel writes once."""
    access.away = True
    ledger = ledger_in(tmp_path, database)
    [record] = await started(ledger, "a")
    disk.fail(errno.EIO, "fdatasync")
    ledger.close(delivered(record), Outcome.FINISHED)  # the kernel has it
    await until(lambda: ledger.unrecorded == 1)
    with pytest.raises(Overloaded) as refused:
        ledger.open(usage("new", ledger.replica))
    assert refused.value.reason == "ledger"
    segments = sorted(path.name for path in ledger._journal.directory.glob("*.log"))
    disk.failing = {}
    await until(lambda: ledger.writable)
    assert ledger.unrecorded == 0
    added = [*ledger._journal.directory.glob("*.log")]
    assert len(added) > len(segments)
    assert b'"ending":"finished"' in max(added).read_bytes()
    access.away = False
    await ledger.stop()
    assert bills(database) == {"a": ("finished", True, 20, 700)}


async def test_space_for_the_end_of_every_request_is_allocated_before_it_begins(
    database: sa.Engine, tmp_path: Path, disk: Disk, access: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When nothing more can be allocated, requests are admitted as long as all of them can be closed, and no longer."""
    monkeypatch.setattr(journals, "SEGMENT_BYTES", 40_000)
    access.away = True
    ledger = ledger_in(tmp_path, database)
    await started(ledger)
    disk.fail(errno.EDQUOT, "posix_fallocate")  # a quota, of which the file system reports nothing
    admitted: list[UsageRecord] = []
    while ledger.writable:
        record = usage(f"r{len(admitted)}", ledger.replica)
        with suppress(Overloaded):
            ledger.open(record)
            admitted.append(record)
    with pytest.raises(Overloaded) as refused:
        ledger.open(usage("new", ledger.replica))
    assert refused.value.reason == "ledger"
    assert 30 < len(admitted) < 80
    for record in admitted:
        record.output_tokens, record.audio_ms = 16_000, 2_400_000
    ledger._report([record.progress() for record in admitted])  # is left out, because it would take the space
    for record in admitted:
        record.prepared_at = record.first_token_at = record.reported_at
        record.finish_reason, record.billed, record.amount_nanos, record.free_tokens = "length", True, 2**60, 9999
        ledger.close(record, Outcome.FAILED_MIDSTREAM)
    assert ledger.unrecorded == 0
    access.away = False
    await ledger.stop()
    assert {row.amount_nanos for row in rows(database).values()} == {2**60}
    assert len(rows(database)) == len(admitted)


@pytest.mark.parametrize(("full", "read_only"), [(True, False), (False, True)])
async def test_a_full_disk_is_noticed_before_the_journal_needs_it(
    database: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, full: bool, read_only: bool
) -> None:
    """New requests are refused once the file system has no space for a segment, or is read-only; running ones end."""
    ledger = ledger_in(tmp_path, database)
    [record] = await started(ledger, "a")
    statvfs = os.statvfs

    def reports(path: Any) -> os.statvfs_result:
        fields = list(statvfs(path))
        if full:
            fields[3] = fields[4] = 10  # free blocks
        if read_only:
            fields[8] |= os.ST_RDONLY
        return os.statvfs_result(fields)

    monkeypatch.setattr(os, "statvfs", reports)
    await until(lambda: not ledger.writable)
    with pytest.raises(Overloaded):
        ledger.open(usage("new", ledger.replica))
    ledger.close(delivered(record), Outcome.FINISHED)
    assert ledger.unrecorded == 0
    monkeypatch.setattr(os, "statvfs", statvfs)
    await until(lambda: ledger.writable)
    await ledger.stop()
    assert bills(database) == {"a": ("finished", True, 20, 700)}


async def test_a_full_disk_at_start_does_not_hold_up_the_replay(
    database: sa.Engine, tmp_path: Path, disk: Disk, access: Database
) -> None:
    """Journals of dead processes are replayed, which frees their space, before a new journal is allocated."""
    access.away = True
    dead = ledger_in(tmp_path, database)
    [record] = await started(dead, "a")
    dead.close(delivered(record), Outcome.FINISHED)
    kill(dead)
    access.away = False
    disk.fail(errno.ENOSPC, "posix_fallocate")
    ledger = ledger_in(tmp_path, database)
    with pytest.raises(OSError, match="No space"):
        await ledger.start()
    assert bills(database) == {"a": ("finished", True, 20, 700)}
    assert not ledger.writable
    disk.failing = {}
    await ledger.start()
    await until(lambda: ledger.writable)
    await ledger.stop()


async def test_a_refused_record_is_counted_once_on_a_full_disk(
    database: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record that the database refuses waits in the journal while the file for it cannot be written."""
    ledger = ledger_in(tmp_path, database)
    (tmp_path / "refused.log").mkdir()
    bad = usage("bad", ledger.replica)
    bad.model = None  # type: ignore[assignment]
    await ledger.start()
    ledger.open(bad)
    await until(lambda: ledger.write_failures > 1)
    assert (ledger._writer.refused, ledger.database_up) == (0, True)
    (tmp_path / "refused.log").rmdir()
    await until(lambda: ledger.pending == 0)
    assert ledger._writer.refused == 1
    await ledger.stop()


PROGRAM = """
import asyncio, pathlib, resource, sys
from serving.errors import Overloaded
from serving.tenancy import database as databases
from serving.types import Outcome
from tests.tenancy.test_ledger import ledger_in, usage, until, rows

async def main():
    directory = pathlib.Path(sys.argv[1])
    database = databases.connect(f"sqlite:///{directory}/test.db")
    databases.migrate(database)
    ledger = ledger_in(directory, database)
    await ledger.start()
    record = usage("a", ledger.replica)
    ledger.open(record)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    record.billed, record.amount_nanos = True, 700
    ledger.close(record, Outcome.FINISHED)
    try:
        ledger.open(usage("b", ledger.replica))
    except Overloaded as refused:
        print(refused.reason, ledger.unrecorded, flush=True)
    await until(lambda: ledger.write_failures)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    await until(lambda: ledger.writable)
    await until(lambda: ledger.pending == 0)
    await ledger.stop()
    print({name: (row.ending, row.amount_nanos) for name, row in rows(database).items()})

asyncio.run(main())
"""


def test_a_limit_of_file_sizes_is_a_fault_as_any_other(tmp_path: Path) -> None:
    """The kernel refuses every write of a process, also SQLite's, until the limit is raised; the record is billed."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.stdout == "ledger 1\n{'a': ('finished', 700)}\n", ended.stderr
