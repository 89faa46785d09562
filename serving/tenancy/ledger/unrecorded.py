"""Closed records that are in this process's memory alone."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable


class Unrecorded:
    """Rows of closed records that neither the disk nor the database has for certain. Used by several threads.

    A row is *kept* here when the journal cannot be written. A row that the journal has is remembered until the disk has
    it: if the disk reports then that it failed, the row is kept as well. There is no other bound than the number of
    requests that were running when the disk failed, because none is admitted while a row is kept.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[str, dict[str, Any]] = {}
        self._unsynced: dict[str, tuple[int, dict[str, Any]]] = {}
        self.kept = 0
        """Number of rows that were ever kept."""

    def __len__(self) -> int:
        """Return the number of rows that are kept."""
        return len(self._kept)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows that are kept."""
        with self._lock:
            return [*self._kept.values()]

    def keep(self, row: dict[str, Any]) -> None:
        """Keep a row that could not be appended to the journal."""
        with self._lock:
            self._kept[row["request_id"]] = row
            self.kept += 1

    def appended(self, row: dict[str, Any], end: int) -> None:
        """Remember a row that was appended: `end` is the number of bytes in the journal with it."""
        with self._lock:
            self._kept.pop(row["request_id"], None)
            self._unsynced[row["request_id"]] = end, row

    def synced(self, end: int) -> None:
        """Forget the rows in the first `end` bytes of the journal: the disk has them."""
        with self._lock:
            self._unsynced = {name: each for name, each in self._unsynced.items() if each[0] > end}

    def sync_failed(self) -> int:
        """Keep the rows that the disk has not confirmed; return their number."""
        with self._lock:
            unsynced, self._unsynced = self._unsynced, {}
            self._kept |= {name: row for name, (_, row) in unsynced.items()}
            self.kept += len(unsynced)
        return len(unsynced)

    def stored(self, rows: Iterable[dict[str, Any]]) -> None:
        """Forget rows that the database has."""
        with self._lock:
            for row in rows:
                if self._kept.get(row["request_id"]) is row:
                    del self._kept[row["request_id"]]
