"""The ledger: each admitted request leaves exactly one record, however it ends.

    open ─► progress, each second ─► close          on the event loop: an append to the local journal, no more
                    │ journal.py
                    ▼
    writer thread: batches into the database        twice a second, and when the database is back
    writer thread: the sweep                        journals and open records that no living process owns

The journal is the queue: entries that the database does not have are read from there, not kept in memory. An entry is a
whole row, so writing it twice has the effect of writing it once. A closed record is final; only `lost`, which is other
processes' guess, is replaced by the owner's outcome. The database may be away: requests continue until the journal
reaches its limit, and are refused then.
"""

from __future__ import annotations

import asyncio
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

import orjson
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, SQLAlchemyError

from serving.errors import Overloaded
from serving.tenancy.ledger import usage_table
from serving.tenancy.ledger.journal import Journal, abandoned, size_bytes
from serving.tenancy.ledger.usage_record import now_ms
from serving.types import Outcome

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy import Engine

    from serving.observability.request_record import RequestRecord
    from serving.tenancy.ledger.usage_record import UsageRecord
    from serving.tenancy.limits.counter_store import Spent
    from serving.types import Caller

log = logging.getLogger(__name__)

_PROGRESS_EVERY_S = 1.0
_ALIVE_TICKS = 15
_RECORDS_PER_ENTRY = 200

_WRITE_EVERY_S = 0.5
_SYNC_EVERY_S = 0.1
_SWEEP_EVERY_S = 10.0
_FIRST_SWEEP_TIMEOUT_S = 5.0
_MAX_RETRY_S = 5.0

UNREPORTED_S = 120.0
"""Age of an open record's last report, while the database was reachable, after which its machine is considered lost."""


class Ledger:
    """This process's part of the ledger."""

    def __init__(self, database: Engine, directory: Path, *, max_journal_bytes: int) -> None:
        self._database = database
        self._parent = directory / "journal"
        self._refused_path = directory / "refused.log"
        self._max_journal_bytes = max_journal_bytes
        host = re.sub(r"[^\w-]", "-", socket.gethostname())[:40]
        self.replica = f"{host}-{os.getpid()}-{secrets.token_hex(4)}"
        self._journal = Journal(self._parent, self.replica)
        self._open: dict[str, tuple[UsageRecord, RequestRecord | None]] = {}
        self._others_bytes = 0
        self._caught_up_s = self._reachable_since_s = time.monotonic()
        self._failing = False
        self._stopping = threading.Event()
        self._swept = threading.Event()
        self._threads: list[threading.Thread] = []
        self._reporting: asyncio.Task[None] | None = None
        self.closed: Counter[str] = Counter({outcome.value: 0 for outcome in Outcome})
        """Number of records closed by this process, by outcome."""
        self.write_failures = self.refused = 0

    @property
    def open_records(self) -> int:
        """Number of running requests."""
        return len(self._open)

    @property
    def database_up(self) -> bool:
        """True if the last use of the database succeeded."""
        return not self._failing

    @property
    def pending(self) -> int:
        """Number of entries that the database does not have."""
        return self._journal.appended - self._journal.written

    @property
    def journal_bytes(self) -> int:
        """Size of what only the local disk has: of this process's journal and those that dead processes have left."""
        return self._journal.pending_bytes + self._others_bytes

    @property
    def lag_s(self) -> float:
        """Seconds since the database had every entry."""
        return time.monotonic() - self._caught_up_s if self._journal.pending_bytes else 0.0

    async def start(self) -> None:
        """Open a journal; wait a few seconds for the journals of dead processes to be replayed."""
        await asyncio.to_thread(self._journal.open)
        for name, work in (("ledger-writer", self._write_forever), ("ledger-sync", self._sync_forever)):
            thread = threading.Thread(target=work, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)
        self._reporting = asyncio.create_task(self._report_forever())
        await asyncio.to_thread(self._swept.wait, _FIRST_SWEEP_TIMEOUT_S)

    async def stop(self) -> None:
        """Write what is pending; while the database is away it stays in the journal for the next start. Idempotent."""
        if self._reporting is None:
            return
        self._reporting.cancel()
        await asyncio.wait((self._reporting,))
        self._reporting = None
        for record, _ in [*self._open.values()]:  # of requests that were not waited for
            self.close(record, Outcome.CANCELLED)
        self._stopping.set()
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        await asyncio.to_thread(self._journal.close)

    def open(self, record: UsageRecord, request: RequestRecord | None = None) -> None:
        """Open a request's record. Raises `Overloaded` if the journal is full or cannot be written."""
        if self.journal_bytes >= self._max_journal_bytes:
            raise Overloaded(reason="journal")
        try:
            self._journal.append(record.row())
        except OSError:
            log.exception("journal write failed, request refused")
            raise Overloaded(reason="journal") from None
        self._open[record.request_id] = (record, request)

    def close(self, record: UsageRecord, outcome: Outcome) -> None:
        """Close a record, whose `billed` and amount are set; only the first call has an effect."""
        if self._open.pop(record.request_id, None) is None:
            return
        self.closed[outcome] += 1
        record.ending = outcome
        record.closed_at = record.reported_at = now_ms()
        try:
            self._journal.append(record.row())
        except OSError:
            # A closed record needs no more space than an open one: on a full disk new requests are refused first.
            log.exception("journal write failed, record not closed", extra={"record": record.row()})

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
        """Journal changes of open records each second; every 15 s all open records, to show that they are alive."""
        reported: dict[str, list[Any]] = {}
        for tick in itertools.count(1):
            await asyncio.sleep(_PROGRESS_EVERY_S)
            for record, request in self._open.values():
                if request is not None:
                    record.follow(request)
            running = {request_id: record.progress() for request_id, (record, _) in self._open.items()}
            reports = [
                progress
                for request_id, progress in running.items()
                if tick % _ALIVE_TICKS == 0 or reported.get(request_id) != progress
            ]
            reported = running
            try:
                for first in range(0, len(reports), _RECORDS_PER_ENTRY):
                    self._journal.append({"at": now_ms(), "progress": reports[first : first + _RECORDS_PER_ENTRY]})
            except OSError:
                log.exception("journal write failed, progress not recorded")

    # What follows runs on the threads.

    def _sync_forever(self) -> None:
        while not self._stopping.wait(_SYNC_EVERY_S):
            try:
                self._journal.sync()
            except OSError:
                log.exception("journal sync failed")

    def _write_forever(self) -> None:
        swept_s, pause_s = 0.0, _WRITE_EVERY_S
        while True:
            stopping = self._stopping.is_set()
            try:
                self._write()
                if not stopping and time.monotonic() - swept_s > _SWEEP_EVERY_S:
                    self._sweep()
                    swept_s = time.monotonic()
            except Exception as error:  # noqa: BLE001 - of any kind: the thread must go on
                self._failed(error)
                pause_s = min(2 * pause_s, _MAX_RETRY_S)
            else:
                if self._failing:
                    log.info("ledger database is back, nothing was lost")
                self._failing, pause_s = False, _WRITE_EVERY_S
            self._swept.set()
            if stopping:
                return
            self._stopping.wait(pause_s)

    def _failed(self, error: Exception) -> None:
        self.write_failures += 1
        self._reachable_since_s = time.monotonic()
        if not self._failing:
            self._failing = True
            log.error(
                "ledger database write failed, records wait in the journal",
                exc_info=None if isinstance(error, DBAPIError) else error,
                extra={"error": type(error).__name__, "journal_bytes": self.journal_bytes},
            )

    def _write(self) -> None:
        """Write what was appended to the journal into the database."""
        while True:
            started_s = time.monotonic()
            entries, nbytes = self._journal.reader.read()
            if not nbytes:
                break
            self._apply(entries)
            self._journal.discard_written(len(entries), nbytes)
            if not self._journal.pending_bytes:
                break
        self._caught_up_s = started_s

    def _apply(self, entries: list[Any]) -> None:
        try:
            usage_table.write(self._database, entries)
        except (DataError, IntegrityError):
            for entry in entries:  # one refused entry must not hold up the others
                try:
                    usage_table.write(self._database, [entry])
                except (DataError, IntegrityError):
                    self._keep_refused(entry)

    def _keep_refused(self, entry: Any) -> None:
        """Append an entry that the database refuses to a file."""
        self.refused += 1
        log.error("ledger entry refused by the database", extra={"kept_in": str(self._refused_path)})
        with self._refused_path.open("ab") as file:
            file.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))
            file.flush()
            os.fsync(file.fileno())

    def _sweep(self) -> None:
        """Write the journals of dead processes into the database, and close their open records as lost."""
        self._others_bytes = size_bytes(self._parent, excluding=self.replica)
        for journal in abandoned(self._parent, excluding=self.replica):
            with journal:
                while True:
                    entries, nbytes = journal.reader.read()
                    if not nbytes:
                        break
                    self._apply(entries)
                    journal.reader.advance()
                lost = usage_table.close_lost(self._database, journal.owner)
                journal.remove()
            self.closed[Outcome.LOST] += lost
            log.warning(
                "journal of a dead process replayed",
                extra={"replica": journal.owner, "lost": lost, "damaged": journal.reader.damaged},
            )
        self._others_bytes = size_bytes(self._parent, excluding=self.replica)
        # After an outage of the database other processes need time to report as well.
        if time.monotonic() - self._reachable_since_s > UNREPORTED_S:
            lost = usage_table.close_unreported(self._database, before_ms=now_ms() - round(1000 * UNREPORTED_S))
            self.closed[Outcome.LOST] += lost
            if lost:
                log.warning("records of a lost machine closed", extra={"lost": lost})
