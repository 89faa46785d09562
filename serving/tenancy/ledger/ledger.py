"""The ledger: each admitted request leaves exactly one record, however it ends.

    open ─► progress, each second ─► close          on the event loop: an append to the local journal, no more
      │                                │ journal.py
      ▼                                ▼
    database_writer.py: batches into the database   twice a second, and when the database is back
                        the sweep                   journals and open records that no living process owns

The journal is the queue: entries that the database does not have are read from there, not kept in memory. An entry is a
whole row, so writing it twice has the effect of writing it once. A closed record is final; only `lost`, which is other
processes' guess, is replaced by the owner's outcome. The database may be away: requests continue until the journal
reaches its limit, and are refused then.

The disk may fail: full, read-only, over a quota, unreadable. New requests are refused while it lasts. Running ones are
closed in space that was allocated before; a record that cannot be written even there is kept in memory (unrecorded.py)
and goes into the journal, or directly into the database, whichever works first.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import SQLAlchemyError

from serving.errors import NotReady, Overloaded
from serving.tenancy.ledger import journal, usage_table
from serving.tenancy.ledger.copies import JournalCopier
from serving.tenancy.ledger.database_writer import DatabaseWriter
from serving.tenancy.ledger.fault import Fault
from serving.tenancy.ledger.journal import Journal
from serving.tenancy.ledger.unrecorded import Unrecorded
from serving.tenancy.ledger.usage_record import now_ms
from serving.types import Outcome

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy import Engine

    from serving.observability.request_record import RequestRecord
    from serving.tenancy.ledger.copies import CopyStore
    from serving.tenancy.ledger.usage_record import UsageRecord
    from serving.tenancy.limits.counter_store import Spent
    from serving.types import Caller

log = logging.getLogger(__name__)

_PROGRESS_EVERY_S = 1.0
_ALIVE_TICKS = 15
_RECORDS_PER_ENTRY = 200

_SYNC_EVERY_S = 0.1
_CHECK_DISK_EVERY_S = 1.0
_FIRST_SWEEP_TIMEOUT_S = 5.0
_LOG_EVERY_S = 30.0

_GROWTH_BYTES = 256
"""Bytes by which a closed record's entry is at most larger than the open one's: times, tokens, ending, amount."""

_MIN_ROOM_BYTES = 4096
"""Space in the journal for one more request, without which none is admitted."""


class Ledger:
    """This process's part of the ledger."""

    def __init__(
        self, database: Engine, directory: Path, *, max_journal_bytes: int, copies: CopyStore | None = None
    ) -> None:
        self._database = database
        self._parent = directory / "journal"
        self._max_journal_bytes = max_journal_bytes
        host = re.sub(r"[^\w-]", "-", socket.gethostname())[:40]
        self.replica = f"{host}-{os.getpid()}-{secrets.token_hex(4)}"
        self.closed: Counter[str] = Counter({outcome.value: 0 for outcome in Outcome})
        """Number of records closed by this process, by outcome."""
        self.unstored = 0
        """Number of closed records that the process could store nowhere when it stopped; each is in the log."""
        self._journal = Journal(self._parent, self.replica)
        self._unrecorded = Unrecorded()
        self._writer = DatabaseWriter(database, directory, self._journal, self._unrecorded, self.closed, copies=copies)
        self._copier = JournalCopier(copies, self._journal, self._unrecorded, self._writer) if copies else None
        self._open: dict[str, tuple[UsageRecord, RequestRecord | None, int]] = {}
        self._closing_bytes = 0
        self._fault: Fault | None = None
        self._sync_error: OSError | None = None
        self._disk_error: OSError | None = None
        self._start_error: OSError | None = None
        self._stopping = threading.Event()
        self._syncing = threading.Thread(target=self._sync_forever, name="ledger-sync", daemon=True)
        self._started = False
        self._reporting: asyncio.Task[None] | None = None

    @property
    def open_records(self) -> int:
        """Number of running requests."""
        return len(self._open)

    @property
    def writable(self) -> bool:
        """True unless the disk is full or failing: then new requests cannot be recorded."""
        return self._disk_failure() is None

    @property
    def unrecorded(self) -> int:
        """Number of closed records that are in memory alone."""
        return len(self._unrecorded)

    @property
    def database_up(self) -> bool:
        """True if the last use of the database succeeded."""
        return self._writer.database_up

    @property
    def write_failures(self) -> int:
        """Number of failed attempts to write into the database."""
        return self._writer.failures

    @property
    def pending(self) -> int:
        """Number of entries that the database does not have."""
        return self._journal.appended - self._journal.written

    @property
    def journal_bytes(self) -> int:
        """Size of what only the local disk has: of this process's journal and those that dead processes have left."""
        return self._journal.pending_bytes + self._writer.others_bytes

    @property
    def lag_s(self) -> float:
        """Seconds since the database had every entry."""
        return time.monotonic() - self._writer.caught_up_s if self._journal.pending_bytes else 0.0

    async def start(self) -> None:
        """Wait a few seconds for the journals of dead processes to be replayed; open a journal.

        Raises `OSError` if the disk is full or not writable: repeat it. A full disk does not prevent the replay, which
        frees space.
        """
        if not self._started:
            self._started = True
            self._writer.start()
            self._syncing.start()
            if self._copier is not None:
                self._copier.start()
            await asyncio.to_thread(self._writer.swept.wait, _FIRST_SWEEP_TIMEOUT_S)
        try:
            await asyncio.to_thread(self._journal.open)
        except OSError as error:
            self._start_error = error
            raise
        self._start_error = None
        self._journal.reported_segment = self._journal.segment
        self._reporting = asyncio.create_task(self._report_forever())

    async def stop(self) -> None:
        """Write what is pending; while the database is away it stays in the journal for the next start. Idempotent.

        Closed records that neither the journal nor the database has taken are logged, one line each.
        """
        if self._reporting is not None:
            self._reporting.cancel()
            await asyncio.wait((self._reporting,))
            self._reporting = None
            for record, *_ in [*self._open.values()]:  # of requests that were not waited for
                self.close(record, Outcome.CANCELLED)
            with contextlib.suppress(OSError):
                self._append_unrecorded()
        if self._started:
            self._started = False
            await asyncio.to_thread(self._finish)

    def log_unstored(self) -> None:
        """Log each closed record that is in memory alone, so that it can be billed by hand. Idempotent."""
        rows = self._unrecorded.rows()
        self._unrecorded.stored(rows)
        self.unstored += len(rows)
        for row in rows:
            log.error("usage record not stored", extra={"usage_record": row})

    def neighbours(self) -> list[str]:
        """Return the replica names of other living processes that use this directory. Blocking."""
        return journal.living(self._parent, excluding=self.replica)

    def check_writable(self) -> None:
        """Raise `NotReady` while new requests cannot be recorded."""
        if not self.writable:
            raise NotReady("Usage cannot be recorded: the disk of data_dir is full or failing.")

    def open(self, record: UsageRecord, request: RequestRecord | None = None) -> None:
        """Open a request's record. Raises `Overloaded`: the journal has reached its limit, or cannot be written."""
        if error := self._disk_failure():
            self._begin_fault(error).refused += 1
            raise Overloaded(reason="ledger")
        if self.journal_bytes >= self._max_journal_bytes:
            raise Overloaded(reason="journal")
        try:
            nbytes = self._journal.append(record.row(), leaving=self._closing_bytes + _MIN_ROOM_BYTES)
        except OSError as error:
            self._begin_fault(error).refused += 1
            raise Overloaded(reason="ledger") from None
        self._open[record.request_id] = (record, request, nbytes + _GROWTH_BYTES)
        self._closing_bytes += nbytes + _GROWTH_BYTES

    def close(self, record: UsageRecord, outcome: Outcome) -> None:
        """Close a record, whose `billed` and amount are set; only the first call has an effect."""
        if record.request_id not in self._open:
            return
        *_, nbytes = self._open.pop(record.request_id)
        self._closing_bytes -= nbytes
        self.closed[outcome] += outcome is not Outcome.LOST  # an attempt of a batch's line, which is repeated
        record.ending = outcome
        record.closed_at = record.reported_at = now_ms()
        row = record.row()
        try:
            self._append_closed(row)
        except OSError as error:
            self._begin_fault(error)
            self._unrecorded.keep(row)
            # With the row, in case that the process is killed before the disk works again.
            log.error("usage record kept in memory", extra={"usage_record": row})  # noqa: TRY400 - logged as a fault

    async def spent(self, caller: Caller, at_ms: int, currency: str) -> Spent:
        """Return what a caller was billed before, on the day and in the month of `at_ms`, and in that currency.

        Raises `Overloaded` if the database cannot be read: without the sums a budget could be exceeded.
        """
        try:
            return await asyncio.to_thread(usage_table.spent, self._database, caller, at_ms, currency)
        except SQLAlchemyError as error:
            log.warning("cannot read what a caller was billed", extra={"error": type(error).__name__})
            raise Overloaded(reason="budget") from None

    async def _report_forever(self) -> None:
        """Journal changes of open records each second.

        All open records each 15 s, to show that they are alive, and after a new segment was begun: only then the
        segments before may be removed, so that the journal always has the last report of each open record.
        """
        reported: dict[str, list[Any]] = {}
        for tick in itertools.count(1):
            await asyncio.sleep(_PROGRESS_EVERY_S)
            for record, request, _ in self._open.values():
                if request is not None:
                    record.follow(request)
            segment = self._journal.segment
            complete = tick % _ALIVE_TICKS == 0 or segment != self._journal.reported_segment
            running = {request_id: record.progress() for request_id, (record, *_) in self._open.items()}
            reports = [
                progress for request_id, progress in running.items() if complete or reported.get(request_id) != progress
            ]
            reported = running
            for first in range(0, len(reports), _RECORDS_PER_ENTRY):
                self._report(reports[first : first + _RECORDS_PER_ENTRY])
            self._journal.reported_segment = segment  # also if that failed: a full disk needs the space
            self._follow_fault()

    def _report(self, reports: list[Any]) -> None:
        """Journal progress, in space that is not needed to close the running requests."""
        entry = {"at": now_ms(), "progress": reports}
        try:
            self._journal.append(entry, leaving=self._closing_bytes + _MIN_ROOM_BYTES)
        except OSError as error:
            self._begin_fault(error).skipped += len(reports)

    def _append_closed(self, row: dict[str, Any]) -> None:
        self._journal.append(row)
        self._unrecorded.appended(row, self._journal.appended_bytes)

    def _append_unrecorded(self) -> None:
        for row in self._unrecorded.rows():
            self._append_closed(row)

    def _disk_failure(self) -> OSError | None:
        return self._fault.error if self._fault else self._sync_error or self._disk_error or self._start_error

    def _begin_fault(self, error: OSError) -> Fault:
        if self._fault is None:
            self._fault = fault = Fault(error, kept_before=self._unrecorded.kept)
            log.error(
                "ledger cannot record, new requests are refused",
                extra={
                    "reason": fault.reason,
                    "directory": str(self._parent),
                    "running": len(self._open),
                    "room_bytes": self._journal.room,
                    "unrecorded": len(self._unrecorded),
                },
            )
        return self._fault

    def _follow_fault(self) -> None:
        """Log a fault of the disk, try to record again what was kept, and end the fault when that succeeds."""
        if error := self._disk_failure():
            fault = self._begin_fault(error)
            if self._has_recovered(fault):
                self._fault = None
                log.info("ledger records again", extra=self._counts(fault))
            elif time.monotonic() - fault.logged_s >= _LOG_EVERY_S:
                fault.logged_s = time.monotonic()
                log.error("ledger still cannot record", extra={"reason": fault.reason} | self._counts(fault))

    def _counts(self, fault: Fault) -> dict[str, Any]:
        return {
            "after_s": round(time.monotonic() - fault.since_s, 1),
            "refused": fault.refused,
            "kept": self._unrecorded.kept - fault.kept_before,
            "unrecorded": len(self._unrecorded),
            "progress_skipped": fault.skipped,
        }

    def _has_recovered(self, fault: Fault) -> bool:
        """Append what was kept and an empty entry; return whether the disk has confirmed what was appended before."""
        if fault.tried_bytes is not None and not (self._sync_error or self._disk_error or self._unrecorded):
            return self._journal.synced_bytes >= fault.tried_bytes
        fault.tried_bytes = None
        fault.error = self._sync_error or self._disk_error or fault.error
        try:
            if self._sync_error is not None:
                self._journal.renew()  # the kernel does not write again what it failed to write in the segment before
                self._sync_error = None
            self._append_unrecorded()
            if self._disk_error is None:
                self._journal.append({"at": now_ms(), "progress": []}, leaving=self._closing_bytes + _MIN_ROOM_BYTES)
                fault.tried_bytes = self._journal.appended_bytes
        except OSError as error:
            fault.error = error
        return False

    # What follows runs on threads.

    def _sync_forever(self) -> None:
        checked_s = 0.0
        while True:
            stopping = self._stopping.wait(_SYNC_EVERY_S)
            try:
                self._journal.sync()
            except OSError as error:
                self._sync_error = error
                if moved := self._unrecorded.sync_failed():
                    extra = {"kept": moved, "error": str(error)}
                    log.error("journal sync failed, records kept in memory", extra=extra)  # noqa: TRY400 - no need
            self._unrecorded.synced(self._journal.synced_bytes)
            if stopping:
                return
            if time.monotonic() - checked_s >= _CHECK_DISK_EVERY_S:
                checked_s = time.monotonic()
                self._disk_error = self._check_disk()

    def _check_disk(self) -> OSError | None:
        """Return the error that a new segment would meet, and allocate one if there is none in reserve."""
        try:
            if error := journal.disk_error(self._parent):
                return error
            self._journal.allocate_spare()
        except FileNotFoundError:
            return None  # before its start
        except OSError as error:
            return error
        return None

    def _finish(self) -> None:
        """Write everything as far as that is possible now."""
        self._stopping.set()
        self._syncing.join()
        self._writer.stop()
        if self._copier is not None:
            self._copier.stop()
        self.log_unstored()
        if pending := self.pending:
            extra = {"entries": pending, "directory": str(self._journal.directory)}
            log.warning("ledger entries stay in the journal for the next start", extra=extra)
        self._journal.close()
