"""A local journal: entries survive the end of their process and are read back in order.

    <data_dir>/journal/<owner>/lock            locked (flock) as long as the owner lives
                              /00000001.log    segments: lines of a checksum and a JSON value, then zeros
                              /spare-1         the next segment

When `append` returns, the entry is in the kernel: SIGKILL loses none. `sync` writes it to the disk; a power failure may
lose what was appended since. A journal whose lock is free has no living owner, and any process may replay it.
The directory must be local to the machine, or on a volume where flock holds between machines.

Segments are allocated in full before they are used, and one is always held as a spare: on a disk (or in a quota) that
is full, `room` bytes can still be appended. A reserve file that is removed when the disk fills would not do: whatever
else writes to that disk takes the space first.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from serving.tenancy.ledger.journal_lines import SEGMENT_BYTES, JournalReader, line

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_LOCK = "lock"


class Journal:
    """The journal of this process. `append` is called on one thread; reading, discarding and `sync` on others."""

    def __init__(self, parent: Path, owner: str) -> None:
        self.owner = owner
        self.directory = parent / owner
        self.reader = JournalReader(self.directory, lambda: self._committed)
        self.appended = self.written = 0
        """Number of entries appended, and of those written to the database."""
        self.appended_bytes = self.written_bytes = self.synced_bytes = 0
        self.reported_segment: int | None = None
        """Segments from this one on have the progress of all open records; those before may be removed."""
        self._committed = (0, 0)
        self._file = self._lock = -1
        self._spares: list[tuple[int, Path]] = []
        self._spare_numbers = itertools.count(1)
        self._full: list[int] = []
        self._new_segment = False
        self._longest_bytes = 0

    @property
    def pending_bytes(self) -> int:
        """Size of the entries that only the journal has."""
        return self.appended_bytes - self.written_bytes

    @property
    def room(self) -> int:
        """Bytes that can be appended without more space on the disk."""
        left = SEGMENT_BYTES - self._committed[1] if self._file >= 0 else 0
        # A line is in one segment: the end of each may stay unused.
        return max(0, left - self._longest_bytes) + len(self._spares) * max(0, SEGMENT_BYTES - self._longest_bytes)

    @property
    def segment(self) -> int:
        """Number of the segment that entries are appended to."""
        return self._committed[0]

    def second_reader(self) -> JournalReader:
        """Return another reader of this journal, for one thread."""
        return JournalReader(self.directory, lambda: self._committed)

    def open(self) -> Self:
        """Create the directory, lock it, allocate the first segment and a spare. Raises `OSError`; may be repeated."""
        while self._lock < 0:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if (lock := _lock(self.directory, create=True)) is not None:
                self._lock = lock  # else a sweep had locked the directory while it was empty
        if self._file < 0:
            self._open_segment()
        self.allocate_spare()
        return self

    def append(self, entry: Any, *, leaving: int = 0) -> int:
        """Write one entry; return its size in bytes. Raises `OSError`; then no part of the entry is in the journal.

        `leaving`: bytes that must be left for later entries, else it raises, too.
        """
        written = line(entry)
        nbytes = len(written)
        self._longest_bytes = max(self._longest_bytes, nbytes)
        while leaving and self.room < nbytes + leaving:
            self._spares.append(self._allocate())
        if self._committed[1] and self._committed[1] + nbytes > SEGMENT_BYTES:
            self._open_segment()
        number, offset = self._committed
        if os.pwrite(self._file, written, offset) != nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # the next line is written over the part
        self._committed = number, offset + nbytes
        self.appended_bytes += nbytes
        self.appended += 1
        return nbytes

    def discard_written(self, entries: int, nbytes: int) -> None:
        """Discard the entries that were read last: they are in the database."""
        self.written += entries
        self.written_bytes += nbytes
        self.reader.advance()
        self.reader.remove_read_segments(before=self.reported_segment)

    def allocate_spare(self) -> None:
        """Allocate a spare segment if there is none. Raises `OSError`. For the thread that syncs."""
        if self._file >= 0 and not self._spares:
            self._spares.append(self._allocate())

    def sync(self) -> None:
        """Write what was appended to the disk. For one thread, the only one that closes files.

        Raises `OSError`: then anything appended since the last success may be lost, and a repetition that succeeds
        does not mean otherwise, because the kernel reports a failure once.
        """
        appended_bytes = self.appended_bytes
        if appended_bytes == self.synced_bytes:
            return
        current = self._file  # read before the list: the appending thread moves it there when it is full
        while self._full:
            full = self._full.pop(0)
            current = -1 if full == current else current
            try:
                os.fdatasync(full)
            finally:
                os.close(full)
        if current >= 0:
            os.fdatasync(current)
            if not os.fstat(current).st_nlink:
                raise OSError(errno.ESTALE, "the journal's directory was removed")
        if self._new_segment:
            self._new_segment = False
            _sync_directory(self.directory)
            _sync_directory(self.directory.parent)
        self.synced_bytes = appended_bytes

    def renew(self) -> None:
        """Continue in a new segment after a failed `sync`. Raises `OSError`. For the thread that appends."""
        self._open_segment()

    def close(self) -> None:
        """Release the lock when no thread uses the journal any more; remove it if nothing is pending. Idempotent.

        What was appended since the last `sync` is left to the kernel.
        """
        if self._file >= 0:
            for descriptor in (*self._full, self._file, *(spare for spare, _ in self._spares)):
                os.close(descriptor)
            for _, path in self._spares:
                with suppress(OSError):  # a read-only disk
                    path.unlink()
            self._file, self._full, self._spares = -1, [], []
        if self._lock >= 0:
            if not self.pending_bytes:
                _remove(self.directory)
            os.close(self._lock)
            self._lock = -1

    def _open_segment(self) -> None:
        file, spare = self._spares.pop(0) if self._spares else self._allocate()
        number = self._committed[0] + 1
        try:
            spare.rename(self.directory / f"{number:08d}.log")
        except OSError:
            self._spares.insert(0, (file, spare))
            raise
        if self._file >= 0:
            self._full.append(self._file)
        self._new_segment = True
        self._file, self._committed = file, (number, 0)

    def _allocate(self) -> tuple[int, Path]:
        path = self.directory / f"spare-{next(self._spare_numbers)}"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(file, 0, SEGMENT_BYTES)
        except OSError:
            os.close(file)
            path.unlink(missing_ok=True)
            raise
        return file, path


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
        """Remove the journal: all of it is in the database. One on a read-only disk stays and is replayed again."""
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
                with suppress(OSError):  # another process has replayed and removed it
                    total += _content_bytes(path)
    return total


def disk_error(path: Path) -> OSError | None:
    """Return the error that a new segment would meet by what the file system reports. Raises `OSError`.

    A quota is not reported: it is met when the segment is allocated.
    """
    state = os.statvfs(path)
    if state.f_flag & os.ST_RDONLY:
        return OSError(errno.EROFS, os.strerror(errno.EROFS))
    free_blocks = state.f_bavail if os.geteuid() else state.f_bfree
    if state.f_blocks and free_blocks * state.f_frsize < SEGMENT_BYTES:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return None


def living(parent: Path, *, excluding: str) -> list[str]:
    """Return the owners of the journals that other living processes have locked."""
    found = []
    with suppress(FileNotFoundError):
        for directory in sorted(parent.iterdir()):
            if directory.name != excluding and (directory / _LOCK).exists():
                if (lock := _lock(directory)) is None:
                    found.append(directory.name)
                else:
                    os.close(lock)
    return found


def _lock(directory: Path, *, create: bool = False) -> int | None:
    """Lock a journal; return `None` if another process has locked it or has just removed it.

    `None`, too, for an old journal on a read-only disk: it could not be removed when it is in the database.
    """
    path = directory / _LOCK
    try:
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
    except FileNotFoundError:
        if not create:
            with suppress(OSError):  # its owner died between creating the directory and the lock
                directory.rmdir()
        return None
    except OSError as error:
        if create or error.errno != errno.EROFS:
            raise
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.stat().st_ino == os.fstat(lock).st_ino:
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(lock)
    return None


def _content_bytes(path: Path) -> int:
    """Return the size of what a segment has before its zeros, without reading all of it."""
    with path.open("rb") as segment:
        low, high = 0, os.fstat(segment.fileno()).st_size
        while low < high:
            middle = (low + high) // 2
            if os.pread(segment.fileno(), 1, middle) not in {b"", b"\0"}:
                low = middle + 1
            else:
                high = middle
    return low


def _remove(directory: Path) -> None:
    with suppress(OSError):
        for path in (*directory.glob("*.log"), *directory.glob("spare-*"), directory / _LOCK):
            path.unlink(missing_ok=True)
        directory.rmdir()


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
