"""The ledger: each admitted request leaves exactly one record, however it ends.

    open ─► progress, each second ─► close          on the event loop: an append to the local journal, no more
                    │ journal.py
                    ▼
    a thread: batches into the database             twice a second, and when the database is back
    the same thread: the sweep                      journals and open records that nobody owns any more

The journal is the queue: what the database has not got is read from there, not kept in memory. A record is a whole row,
so that writing it twice is writing it once. Once closed it is final; only `lost`, which is a guess of others, yields to
the word of its owner. The database may be away: requests go on until the journal is at its bound, and are refused then.
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
from serving.tenancy.ledger import store as ledger_store
from serving.tenancy.ledger.journal import Journal, abandoned, size_bytes
from serving.tenancy.ledger.usage_record import Ending, now_ms

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy import Engine

    from serving.observability.request_record import RequestRecord
    from serving.tenancy.ledger.usage_record import UsageRecord
    from serving.tenancy.limits.limiter import Spent
    from serving.types import Caller

log = logging.getLogger(__name__)

_PROGRESS_EVERY_S = 1.0
_ALIVE_TICKS = 15
_PROGRESS_RECORDS = 200
"""In one journal entry."""

_WRITE_EVERY_S = 0.5
_SYNC_EVERY_S = 0.1
_SWEEP_EVERY_S = 10.0
_FIRST_SWEEP_S = 5.0
_RETRY_MOST_S = 5.0

UNREPORTED_S = 120.0
"""A record that has been open for so long without a report, while the database was there, is lost with its machine."""


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
        self.closed: Counter[str] = Counter({ending.value: 0 for ending in Ending})
        """Records that were closed here, by ending."""
        self.write_failures = self.refused = 0

    @property
    def open_records(self) -> int:
        """Requests under way."""
        return len(self._open)

    @property
    def database_up(self) -> bool:
        """Whether its last use went well."""
        return not self._failing

    @property
    def pending(self) -> int:
        """Entries that the database has not got."""
        return self._journal.appended - self._journal.settled

    @property
    def journal_bytes(self) -> int:
        """What only the local disk has: this process's records, and those that dead ones have left."""
        return self._journal.pending_bytes + self._others_bytes

    @property
    def lag_s(self) -> float:
        """How long ago the database had everything."""
        return time.monotonic() - self._caught_up_s if self._journal.pending_bytes else 0.0

    async def start(self) -> None:
        """Begin a journal; replay what dead processes have left, if the database lets us within some seconds."""
        await asyncio.to_thread(self._journal.open)
        for name, work in (("ledger-writer", self._write_forever), ("ledger-sync", self._sync_forever)):
            thread = threading.Thread(target=work, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)
        self._reporting = asyncio.create_task(self._report_forever())
        await asyncio.to_thread(self._swept.wait, _FIRST_SWEEP_S)

    async def stop(self) -> None:
        """Write what is pending, if the database is there; else it stays in the journal for the next start."""
        if self._reporting is None:
            return
        self._reporting.cancel()
        await asyncio.wait((self._reporting,))
        self._reporting = None
        for record, _ in [*self._open.values()]:  # of requests that were not waited for
            self.close(record, Ending.CANCELLED)
        self._stopping.set()
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        await asyncio.to_thread(self._journal.close)

    def open(self, record: UsageRecord, request: RequestRecord | None = None) -> None:
        """Enter a request, and what it reports of itself. Raises `Overloaded` if nothing more can be kept."""
        if self.journal_bytes >= self._max_journal_bytes:
            raise Overloaded(reason="journal")
        try:
            self._journal.append(record.row())
        except OSError:
            log.exception("a request is refused: the journal cannot be written")
            raise Overloaded(reason="journal") from None
        self._open[record.request_id] = (record, request)

    def close(self, record: UsageRecord, ending: Ending) -> None:
        """Enter its end. `billed` and the amount are set already. Once: the first word counts."""
        if self._open.pop(record.request_id, None) is None:
            return
        self.closed[ending] += 1
        record.ending = ending
        record.closed_at = record.reported_at = now_ms()
        try:
            self._journal.append(record.row())
        except OSError:
            # What ends needs no more room than this: a full disk refuses what begins first.
            log.exception("a record could not be closed in the journal", extra={"record": record.row()})

    async def spent(self, caller: Caller) -> Spent:
        """What a caller was billed before. Raises `Overloaded` if the database does not tell: a budget is at stake."""
        try:
            return await asyncio.to_thread(ledger_store.spent, self._database, caller, now_ms())
        except SQLAlchemyError as error:
            log.warning("a caller's budget cannot be told", extra={"error": type(error).__name__})
            raise Overloaded(reason="budget") from None

    async def _report_forever(self) -> None:
        """Journal what has changed of the open records; and of all of them from time to time, that they are alive."""
        reported: dict[str, list[Any]] = {}
        for tick in itertools.count(1):
            await asyncio.sleep(_PROGRESS_EVERY_S)
            for record, request in self._open.values():
                if request is not None:
                    record.follow(request)
            running = {request_id: record.progress() for request_id, (record, _) in self._open.items()}
            told = [
                progress
                for request_id, progress in running.items()
                if tick % _ALIVE_TICKS == 0 or reported.get(request_id) != progress
            ]
            reported = running
            try:
                for first in range(0, len(told), _PROGRESS_RECORDS):
                    self._journal.append({"at": now_ms(), "progress": told[first : first + _PROGRESS_RECORDS]})
            except OSError:
                log.exception("progress could not be journalled")

    # What follows runs on the threads.

    def _sync_forever(self) -> None:
        while not self._stopping.wait(_SYNC_EVERY_S):
            try:
                self._journal.sync()
            except OSError:
                log.exception("the journal could not be brought to the disk")

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
                pause_s = min(2 * pause_s, _RETRY_MOST_S)
            else:
                if self._failing:
                    log.info("the ledger's database is back; nothing was lost")
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
                "the ledger cannot write to its database; records wait in the journal",
                exc_info=None if isinstance(error, DBAPIError) else error,
                extra={"error": type(error).__name__, "journal_bytes": self.journal_bytes},
            )

    def _write(self) -> None:
        """Bring what was appended into the database."""
        while True:
            began_s = time.monotonic()
            entries, nbytes = self._journal.read()
            if not nbytes:
                break
            self._apply(entries)
            self._journal.settle(len(entries), nbytes)
            if not self._journal.pending_bytes:
                break
        self._caught_up_s = began_s

    def _apply(self, entries: list[Any]) -> None:
        try:
            ledger_store.write(self._database, entries)
        except (DataError, IntegrityError):
            for entry in entries:  # one of them must not hold up the others
                try:
                    ledger_store.write(self._database, [entry])
                except (DataError, IntegrityError):
                    self._refuse(entry)

    def _refuse(self, entry: Any) -> None:
        """Keep aside what the database will never take."""
        self.refused += 1
        log.error("the database refuses a record; it is kept in %s", self._refused_path)
        with self._refused_path.open("ab") as file:
            file.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))
            file.flush()
            os.fsync(file.fileno())

    def _sweep(self) -> None:
        """Bring in what dead processes have left, and close what they had open."""
        self._others_bytes = size_bytes(self._parent, but=self.replica)
        for journal in abandoned(self._parent, but=self.replica):
            with journal:
                while True:
                    entries, nbytes = journal.reader.read()
                    if not nbytes:
                        break
                    self._apply(entries)
                    journal.reader.advance()
                lost = ledger_store.close_lost(self._database, journal.owner)
                journal.remove()
            self.closed[Ending.LOST] += lost
            log.warning(
                "the journal of a dead process was replayed",
                extra={"replica": journal.owner, "lost": lost, "damaged": journal.reader.damaged},
            )
        self._others_bytes = size_bytes(self._parent, but=self.replica)
        # After an outage of the database the others need a moment, too.
        if time.monotonic() - self._reachable_since_s > UNREPORTED_S:
            lost = ledger_store.close_unreported(self._database, before_ms=now_ms() - round(1000 * UNREPORTED_S))
            self.closed[Ending.LOST] += lost
            if lost:
                log.warning("records of a lost machine were closed", extra={"lost": lost})
