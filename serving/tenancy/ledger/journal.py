"""A local journal: entries survive the end of their process and are read back in order.

    <data_dir>/journal/<owner>/lock            locked (flock) as long as the owner lives
                              /00000001.log    segments: lines of a checksum and a JSON value

When `append` returns, the entry is in the kernel: SIGKILL loses none. `sync` writes it to the disk; a power failure may
lose what was appended since. A journal whose lock is free has no living owner, and any process may replay it.
The directory must be local to the machine, or on a volume where flock holds between machines.
"""

from __future__ import annotations

import fcntl
import os
import zlib
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

import orjson

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SEGMENT_BYTES = 4 * 1024 * 1024
_READ_BYTES = 512 * 1024
_MAX_ENTRY_BYTES = 64 * 1024
_LOCK = "lock"


class JournalReader:
    """Reads one owner's segments, from the oldest, as far as they are written."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._segment: int | None = None
        self._offset = self._end = self._torn = 0
        self.damaged = 0
        """Number of lines whose checksum is wrong: power failed, or the disk is failing."""

    def read(self) -> tuple[list[Any], int]:
        """Return the next entries and their size in bytes, 0 if there are none yet; the same until `advance`."""
        while True:
            segments = _segments(self._directory)
            current = self._segment if self._segment in segments else min(segments, default=None)
            if current is None:
                return [], 0
            if current != self._segment:
                self._segment, self._offset = current, 0
            later = [number for number in segments if number > current]  # listed before reading: the order matters
            lines = self._lines(segments[current])
            if lines:
                self._end = self._offset + len(lines)
                return list(self._entries(lines)), len(lines)
            if not later:
                return [], 0
            self._segment, self._offset = min(later), 0

    def advance(self) -> None:
        """Continue after the entries that were read last."""
        self._offset = self._end
        self.damaged += self._torn

    def remove_read_segments(self) -> None:
        """Remove the segments before the one that is being read."""
        for number, path in _segments(self._directory).items():
            if self._segment is not None and number < self._segment:
                path.unlink(missing_ok=True)

    def _lines(self, path: Path) -> bytes:
        with path.open("rb") as segment:
            segment.seek(self._offset)
            data = segment.read(_READ_BYTES)
        return data[: data.rfind(b"\n") + 1]

    def _entries(self, lines: bytes) -> Iterator[Any]:
        self._torn = 0
        for line in lines.splitlines():
            checksum, _, payload = line.partition(b" ")
            if checksum == b"%08x" % zlib.crc32(payload):
                yield orjson.loads(payload)
            else:
                self._torn += 1


class Journal:
    """The journal of this process. `append` is called on one thread; reading, discarding and `sync` on others."""

    def __init__(self, parent: Path, owner: str) -> None:
        self.owner = owner
        self.directory = parent / owner
        self.reader = JournalReader(self.directory)
        self.appended = self.written = 0
        """Number of entries appended, and of those written to the database."""
        self.appended_bytes = self.written_bytes = 0
        self._segment_bytes = 0
        self._number = 0
        self._file = -1
        self._synced_bytes = 0
        self._full: list[int] = []
        self._new_segment = False

    @property
    def pending_bytes(self) -> int:
        """Size of the entries that only the journal has."""
        return self.appended_bytes - self.written_bytes

    def open(self) -> Self:
        """Create the directory, lock it, create the first segment. Raises `OSError`."""
        while True:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if (lock := _lock(self.directory, create=True)) is not None:
                break  # else a sweep had locked the directory while it was empty
        self._lock = lock
        self._open_segment()
        return self

    def append(self, entry: Any) -> None:
        """Write one entry. Raises `OSError`; then no part of the entry is in the journal."""
        payload = orjson.dumps(entry)
        if len(payload) > _MAX_ENTRY_BYTES:
            raise ValueError(f"a journal entry of {len(payload)} bytes exceeds the limit of {_MAX_ENTRY_BYTES}")
        line = b"%08x %b\n" % (zlib.crc32(payload), payload)
        if self._segment_bytes >= SEGMENT_BYTES:
            self._open_segment()
        nbytes = os.write(self._file, line)
        if nbytes != len(line):
            os.ftruncate(self._file, self._segment_bytes)
            raise OSError("the journal's disk is full")
        self._segment_bytes += nbytes
        self.appended_bytes += nbytes
        self.appended += 1

    def discard_written(self, entries: int, nbytes: int) -> None:
        """Discard the entries that were read last: they are in the database."""
        self.written += entries
        self.written_bytes += nbytes
        self.reader.advance()
        self.reader.remove_read_segments()

    def sync(self) -> None:
        """Write what was appended to the disk. For one thread, the only one that closes files."""
        appended_bytes = self.appended_bytes
        if appended_bytes == self._synced_bytes:
            return
        while self._full:
            full = self._full.pop(0)
            os.fdatasync(full)
            os.close(full)
        os.fdatasync(self._file)
        if self._new_segment:
            self._new_segment = False
            _sync_directory(self.directory)
            _sync_directory(self.directory.parent)
        self._synced_bytes = appended_bytes

    def close(self) -> None:
        """Release the lock when no thread uses the journal any more; remove it if nothing is pending. Idempotent."""
        if self._file < 0:
            return
        self.sync()
        for descriptor in (*self._full, self._file):
            os.close(descriptor)
        self._file = -1
        if not self.pending_bytes:
            _remove(self.directory)
        os.close(self._lock)

    def _open_segment(self) -> None:
        self._number += 1
        path = self.directory / f"{self._number:08d}.log"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        if self._file >= 0:
            self._full.append(self._file)
        self._file, self._segment_bytes, self._new_segment = file, 0, True


class AbandonedJournal:
    """A journal without a living owner, locked by this process until the context is left."""

    def __init__(self, directory: Path, lock: int) -> None:
        self.owner = directory.name
        self.directory = directory
        self.reader = JournalReader(directory)
        self._lock = lock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._lock)

    def remove(self) -> None:
        """Remove the journal: all of it is in the database."""
        _remove(self.directory)


def abandoned(parent: Path, *, excluding: str) -> Iterator[AbandonedJournal]:
    """Yield the journals without a living owner, except the one of the owner `excluding`."""
    with suppress(FileNotFoundError):
        for directory in sorted(parent.iterdir()):
            if directory.is_dir() and directory.name != excluding and (lock := _lock(directory)) is not None:
                yield AbandonedJournal(directory, lock)


def size_bytes(parent: Path, *, excluding: str) -> int:
    """Return the size on disk of all journals, except the one of the owner `excluding`."""
    total = 0
    with suppress(FileNotFoundError):
        for path in parent.glob("*/*.log"):
            if path.parent.name != excluding:
                with suppress(FileNotFoundError):  # another process has replayed and removed it
                    total += path.stat().st_size
    return total


def _lock(directory: Path, *, create: bool = False) -> int | None:
    """Lock a journal; return `None` if another process has locked it or has just removed it."""
    path = directory / _LOCK
    try:
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
    except FileNotFoundError:
        if not create:
            with suppress(OSError):  # its owner died between creating the directory and the lock
                directory.rmdir()
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.stat().st_ino == os.fstat(lock).st_ino:
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(lock)
    return None


def _segments(directory: Path) -> dict[int, Path]:
    return {int(path.stem): path for path in sorted(directory.glob("*.log"))}


def _remove(directory: Path) -> None:
    for path in _segments(directory).values():
        path.unlink(missing_ok=True)
    (directory / _LOCK).unlink(missing_ok=True)
    with suppress(OSError):
        directory.rmdir()


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
