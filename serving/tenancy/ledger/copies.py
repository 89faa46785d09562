"""Copies of this process's journal in a bucket while the database is away, and the booking of those of lost processes.

    journal ─► bucket        each second, once the database has not kept up for two seconds: what only this disk has
    bucket ─► database       the copies of a process that does not live any more, by any other process

A copy has journal lines, which are written into the database as a journal is: a record that is booked by several
processes, or that the database has already, is booked once. While the database keeps up there is no copy.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import defaultdict
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from serving.tenancy.ledger import usage_table
from serving.tenancy.ledger.journal_lines import entries, line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sqlalchemy import Engine

    from serving.tenancy.ledger.database_writer import DatabaseWriter
    from serving.tenancy.ledger.journal import Journal
    from serving.tenancy.ledger.unrecorded import Unrecorded

log = logging.getLogger(__name__)

_COPY_EVERY_S = 1.0
_COPY_AFTER_S = 2.0
"""Time for which the database must not have kept up: it takes entries twice a second."""
_MEMORY = "memory-"


class CopyStore(Protocol):
    """A store of small objects that outlives the machine. Methods block, and raise `OSError` if it cannot be used."""

    def write(self, name: str, data: bytes) -> None:
        """Write an object, which may exist with the same bytes at its beginning."""

    def names(self) -> list[str]:
        """Return the names of all objects, in their order."""

    def read(self, name: str) -> bytes | None:
        """Return an object's bytes; `None` if there is none."""

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects, some of which another process may have deleted."""


class JournalCopier:
    """The thread that copies what only this process has."""

    def __init__(self, store: CopyStore, journal: Journal, unrecorded: Unrecorded, writer: DatabaseWriter) -> None:
        self._store = store
        self._journal = journal
        self._unrecorded = unrecorded
        self._writer = writer
        self._reader = journal.second_reader()
        self._copies: list[str] = []
        self._in_memory = b""
        self._failing = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._copy_forever, name="ledger-copies", daemon=True)
        self.copied = 0
        """Number of objects written."""

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Copy once more what the database does not have, delete the other copies, and stop. Blocking."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _copy_forever(self) -> None:
        while True:
            stopping = self._stopping.wait(_COPY_EVERY_S)
            try:
                self._copy(at_once=stopping)
            except Exception as error:  # noqa: BLE001 - of any kind: the thread must go on
                if not self._failing:
                    extra = {"reason": str(error)[:300], "error": type(error).__name__}
                    log.error("ledger copies cannot be written", extra=extra)  # noqa: TRY400 - the reason says it all
                self._failing = True
            else:
                if self._failing:
                    log.info("ledger copies are written again")
                self._failing = False
            if stopping:
                return

    def _copy(self, *, at_once: bool) -> None:
        if not self._journal.pending_bytes and not self._unrecorded:
            self._delete()
        elif self._copies or at_once or time.monotonic() - self._writer.caught_up_s > _COPY_AFTER_S:
            if not self._copies:
                log.warning("database does not keep up, the ledger's journal is copied to the object store")
                self._reader.continue_from(self._journal.reader.position)
            self._copy_memory()
            self._copy_lines()

    def _copy_lines(self) -> None:
        with suppress(FileNotFoundError):  # a segment that was written into the database meanwhile and removed
            while lines := self._reader.read_lines():
                segment, start = self._reader.next_position
                self._write(f"{segment:08d}-{start:07d}", lines)
                self._reader.advance()

    def _copy_memory(self) -> None:
        """Copy the records that the disk does not take."""
        lines = b"".join(line(row) for row in self._unrecorded.rows())
        if lines and lines != self._in_memory:
            self._write(_MEMORY + hashlib.sha256(lines).hexdigest()[:16], lines)
            self._in_memory = lines

    def _write(self, name: str, lines: bytes) -> None:
        name = f"{self._journal.owner}/{name}"
        if name not in self._copies:
            self._copies.append(name)  # before it is written: a write that seems to fail may have had its effect
        self._store.write(name, lines)
        self.copied += 1

    def _delete(self) -> None:
        if self._copies:
            self._store.delete(self._copies)
            log.info("copies of the ledger's journal deleted", extra={"copies": len(self._copies)})
            self._copies, self._in_memory = [], b""


def book_lost(
    store: CopyStore, database: Engine, apply: Callable[[list[Any]], None], *, owner: str, after_s: float
) -> Iterator[str]:
    """Write the copies of processes that have not reported for `after_s` into the database, and delete them.

    Yields the name of each such process. A copy that cannot be read stays.
    """
    copies: defaultdict[str, list[str]] = defaultdict(list)
    for name in store.names():
        copies[name.partition("/")[0]].append(name)
    copies.pop(owner, None)
    if not copies:
        return
    living = usage_table.living(database, after_s=after_s)
    for replica in sorted(copies.keys() - living):
        try:
            for name in copies[replica]:
                if not (lines := store.read(name)):
                    continue  # another process has booked it
                found, damaged = entries(lines)
                apply(found)
                usage_table.write_progress(database, found)
                if damaged:
                    log.error("copy of a journal is damaged", extra={"copy": name, "lines": damaged})
            store.delete(copies[replica])
        except (OSError, LookupError, TypeError, ValueError) as error:  # it must not hold up the others
            extra = {"replica": replica, "error": type(error).__name__, "reason": str(error)[:300]}
            log.error("copies of a lost process cannot be booked", extra=extra)  # noqa: TRY400 - the reason says it all
        else:
            yield replica
