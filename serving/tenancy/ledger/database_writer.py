"""The thread that writes journals into the database: this process's, and those that dead processes have left."""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import orjson
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError

from serving.tenancy.database import address, failure
from serving.tenancy.ledger import usage_table
from serving.tenancy.ledger.copies import book_lost
from serving.tenancy.ledger.journal import abandoned, size_bytes
from serving.types import Outcome

if TYPE_CHECKING:
    from collections import Counter
    from pathlib import Path

    from sqlalchemy import Engine

    from serving.tenancy.ledger.copies import CopyStore
    from serving.tenancy.ledger.journal import Journal
    from serving.tenancy.ledger.unrecorded import Unrecorded

log = logging.getLogger(__name__)

_WRITE_EVERY_S = 0.5
_SWEEP_EVERY_S = 10.0
_MAX_RETRY_S = 5.0
_REPORT_LIVING_S = 15.0
_BOOK_COPIES_EVERY_S = 60.0
_FORGET_DEAD_S = 24 * 3600.0

UNREPORTED_S = 120.0
"""Age of an open record's last report, while the database was reachable, after which its machine is considered lost."""


class DatabaseWriter:
    """Writes what only this machine has, twice a second, and when the database is back; sweeps every ten seconds."""

    def __init__(
        self,
        database: Engine,
        directory: Path,
        journal: Journal,
        unrecorded: Unrecorded,
        closed: Counter[str],
        *,
        copies: CopyStore | None = None,
    ) -> None:
        self._database = database
        self._parent = directory / "journal"
        self._refused_path = directory / "refused.log"
        self._journal = journal
        self._unrecorded = unrecorded
        self._closed = closed
        self._copies = copies
        self._booked_s = 0.0
        self._reachable_since_s = self.caught_up_s = time.monotonic()
        self._reported_living_s = 0.0
        self._failing_since_s: float | None = None
        self._written_before = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._write_forever, name="ledger-writer", daemon=True)
        self.swept = threading.Event()
        """Set after the first sweep, whether it succeeded or not."""
        self.database_up = True
        self.others_bytes = 0
        """Size of the journals of other processes, living and dead."""
        self.failures = self.refused = 0
        """Number of failed passes, and of entries that the database refused."""

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Write once more and stop. Blocking."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _write_forever(self) -> None:
        swept_s, pause_s = 0.0, _WRITE_EVERY_S
        while True:
            stopping = self._stopping.is_set()
            try:
                self._write_unrecorded()
                self._write()
                if not stopping and time.monotonic() - swept_s > _SWEEP_EVERY_S:
                    self._sweep()
                    swept_s = time.monotonic()
            except Exception as error:  # noqa: BLE001 - of any kind: the thread must go on
                self._failed(error)
                pause_s = min(2 * pause_s, _MAX_RETRY_S)
            else:
                self._succeeded()
                pause_s = _WRITE_EVERY_S
            self.swept.set()
            if stopping:
                return
            self._stopping.wait(pause_s)

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        self._reachable_since_s = time.monotonic()
        self.database_up = not isinstance(error, SQLAlchemyError)
        if self._failing_since_s is not None:
            return
        self._failing_since_s, self._written_before = time.monotonic(), self._journal.written
        extra: dict[str, Any] = {"journal_bytes": self._journal.pending_bytes, "unrecorded": len(self._unrecorded)}
        if isinstance(error, SQLAlchemyError):
            extra |= {"database": address(self._database), "reason": failure(error), "error": type(error).__name__}
            log.error("ledger database write failed, records wait in the journal", extra=extra)
        else:
            log.error("ledger journal read failed, records wait in the journal", exc_info=error, extra=extra)

    def _succeeded(self) -> None:
        self.database_up = True
        if self._failing_since_s is None:
            return
        extra = {
            "after_s": round(time.monotonic() - self._failing_since_s, 1),
            "written": self._journal.written - self._written_before,
            "refused": self.refused,
            "unrecorded": len(self._unrecorded),
        }
        self._failing_since_s = None
        log.info("ledger database is back", extra=extra)

    def _write_unrecorded(self) -> None:
        """Write the records that the journal could not be given."""
        rows = self._unrecorded.rows()
        if rows:
            self._apply(rows)
            self._unrecorded.stored(rows)
            log.warning("records kept in memory were written to the database", extra={"records": len(rows)})

    def _write(self) -> None:
        """Write what was appended to the journal."""
        while True:
            started_s = time.monotonic()
            entries, nbytes = self._journal.reader.read()
            if not nbytes:
                break
            if any("progress" in entry for entry in entries):
                self._report_living()
            self._apply(entries)
            self._journal.discard_written(len(entries), nbytes)
            if not self._journal.pending_bytes:
                break
        self.caught_up_s = started_s

    def _report_living(self) -> None:
        """Report that this process lives, each 15 s while it has open records; their progress is in its journal.

        During an outage each pass does: one that writes no record would else seem to end the outage.
        """
        started_s = time.monotonic()
        if self._failing_since_s is not None or started_s - self._reported_living_s >= _REPORT_LIVING_S:
            usage_table.report_living(self._database, self._journal.owner)
            self._reported_living_s = started_s

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
        with self._refused_path.open("ab") as file:
            file.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))
            file.flush()
            os.fsync(file.fileno())
        self.refused += 1
        log.error("ledger entry refused by the database", extra={"kept_in": str(self._refused_path)})

    def _sweep(self) -> None:
        """Write the journals of dead processes into the database, and close their open records as lost."""
        owner = self._journal.owner
        self.others_bytes = size_bytes(self._parent, excluding=owner)
        for journal in abandoned(self._parent, excluding=owner):
            with journal:
                while True:
                    entries, nbytes = journal.reader.read()
                    if not nbytes:
                        break
                    self._apply(entries)
                    usage_table.write_progress(self._database, entries)
                    journal.reader.advance()
                lost = usage_table.close_lost(self._database, journal.owner)
                journal.remove()
            self._closed[Outcome.LOST] += lost
            log.warning(
                "journal of a dead process replayed",
                extra={"replica": journal.owner, "lost": lost, "damaged": journal.reader.damaged},
            )
        self.others_bytes = size_bytes(self._parent, excluding=owner)
        # After an outage of the database other processes need time to report as well.
        if time.monotonic() - self._reachable_since_s > UNREPORTED_S:
            if self._copies is not None and time.monotonic() - self._booked_s > _BOOK_COPIES_EVERY_S:
                self._book(self._copies)
                self._booked_s = time.monotonic()
            lost = usage_table.close_unreported(self._database, after_s=UNREPORTED_S)
            self._closed[Outcome.LOST] += lost
            if lost:
                log.warning("records of a lost machine closed", extra={"lost": lost})
            usage_table.forget_dead(self._database, after_s=_FORGET_DEAD_S)

    def _book(self, copies: CopyStore) -> None:
        """Write the copies of lost processes' journals into the database; their open records are closed after it."""
        try:
            for replica in book_lost(
                copies, self._database, self._apply, owner=self._journal.owner, after_s=UNREPORTED_S
            ):
                log.warning("copied journal of a lost process booked", extra={"replica": replica})
        except OSError as error:
            log.warning("copies of lost processes cannot be read", extra={"reason": str(error)[:300]})
