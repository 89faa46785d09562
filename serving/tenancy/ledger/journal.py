"""A local journal: what is appended survives the end of its process, and is read back in order.

    <data_dir>/journal/<owner>/lock            held (flock) as long as the owner lives
                              /00000001.log    segments: lines of a checksum and a JSON value

An entry is in the kernel when `append` returns: SIGKILL loses none. `sync` brings it to the disk; the power going off
may lose what was appended since. A journal whose lock can be had belongs to nobody, and may be replayed by anyone.
The directory must be local to the machine, or a volume on which flock holds between machines.
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
        """Lines that were not as they had been written. The power went off, or the disk is failing."""

    def read(self) -> tuple[list[Any], int]:
        """The next entries, and how many bytes they take; nothing when there are none yet. The same until `advance`."""
        while True:
            segments = _segments(self._directory)
            current = self._segment if self._segment in segments else min(segments, default=None)
            if current is None:
                return [], 0
            if current != self._segment:
                self._segment, self._offset = current, 0
            later = [number for number in segments if number > current]  # looked for before reading: the order matters
            lines = self._lines(segments[current])
            if lines:
                self._end = self._offset + len(lines)
                return list(self._entries(lines)), len(lines)
            if not later:
                return [], 0
            self._segment, self._offset = min(later), 0

    def advance(self) -> None:
        """Go on behind what was read last."""
        self._offset = self._end
        self.damaged += self._torn

    def discard(self) -> None:
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
    """The journal of this process. `append` from one thread; reading, discarding and `sync` from others."""

    def __init__(self, parent: Path, owner: str) -> None:
        self.owner = owner
        self.directory = parent / owner
        self.reader = JournalReader(self.directory)
        self.appended = self.settled = 0
        """Entries."""
        self.appended_bytes = self.settled_bytes = 0
        """What was appended, and of that what is safe elsewhere."""
        self._segment_bytes = 0
        self._number = 0
        self._file = -1
        self._synced_bytes = 0
        self._full: list[int] = []
        self._begun = False

    @property
    def pending_bytes(self) -> int:
        """What is nowhere but here."""
        return self.appended_bytes - self.settled_bytes

    def open(self) -> Self:
        """Make the directory, lock it, begin the first segment. Raises `OSError`."""
        while True:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if (lock := _locked(self.directory, make=True)) is not None:
                break  # else a sweep had the directory, which was still empty, in this moment
        self._lock = lock
        self._begin_segment()
        return self

    def append(self, entry: Any) -> None:
        """Write one entry. Raises `OSError`: it then is not in the journal at all."""
        payload = orjson.dumps(entry)
        if len(payload) > _MAX_ENTRY_BYTES:
            raise ValueError("an entry is too long")
        line = b"%08x %b\n" % (zlib.crc32(payload), payload)
        if self._segment_bytes >= SEGMENT_BYTES:
            self._begin_segment()
        written = os.write(self._file, line)
        if written != len(line):
            os.ftruncate(self._file, self._segment_bytes)
            raise OSError("the journal's disk is full")
        self._segment_bytes += written
        self.appended_bytes += written
        self.appended += 1

    def read(self) -> tuple[list[Any], int]:
        """See `JournalReader.read`."""
        return self.reader.read()

    def settle(self, entries: int, nbytes: int) -> None:
        """What was read last is safe elsewhere."""
        self.settled += entries
        self.settled_bytes += nbytes
        self.reader.advance()
        self.reader.discard()

    def sync(self) -> None:
        """Bring what was appended to the disk, once for all of it. For one thread, which alone closes files."""
        appended_bytes = self.appended_bytes
        if appended_bytes == self._synced_bytes:
            return
        while self._full:
            full = self._full.pop(0)
            os.fdatasync(full)
            os.close(full)
        os.fdatasync(self._file)
        if self._begun:
            self._begun = False
            _sync_directory(self.directory)
            _sync_directory(self.directory.parent)
        self._synced_bytes = appended_bytes

    def close(self) -> None:
        """Give the journal up, when no thread uses it any more; if nothing is pending, remove it. Idempotent."""
        if self._file < 0:
            return
        self.sync()
        for descriptor in (*self._full, self._file):
            os.close(descriptor)
        self._file = -1
        if not self.pending_bytes:
            _remove(self.directory)
        os.close(self._lock)

    def _begin_segment(self) -> None:
        self._number += 1
        path = self.directory / f"{self._number:08d}.log"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        if self._file >= 0:
            self._full.append(self._file)
        self._file, self._segment_bytes, self._begun = file, 0, True


class Abandoned:
    """A journal that its owner has left behind, ours while the context lasts. Read, then removed by `remove`."""

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
        """All of it is safe elsewhere."""
        _remove(self.directory)


def abandoned(parent: Path, *, but: str) -> Iterator[Abandoned]:
    """Journals without a living owner; `but` is our own."""
    with suppress(FileNotFoundError):
        for directory in sorted(parent.iterdir()):
            if directory.is_dir() and directory.name != but and (lock := _locked(directory)) is not None:
                yield Abandoned(directory, lock)


def size_bytes(parent: Path, *, but: str) -> int:
    """What all journals take on the disk but one."""
    total = 0
    with suppress(FileNotFoundError):
        for path in parent.glob("*/*.log"):
            if path.parent.name != but:
                with suppress(FileNotFoundError):  # whoever replayed it has removed it
                    total += path.stat().st_size
    return total


def _locked(directory: Path, *, make: bool = False) -> int | None:
    """Lock a journal; `None` if it is another's, or was removed in this moment."""
    path = directory / _LOCK
    try:
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if make else 0), 0o600)
    except FileNotFoundError:
        if not make:
            with suppress(OSError):  # its owner died between two steps of its beginning
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
