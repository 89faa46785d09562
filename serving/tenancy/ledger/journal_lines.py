"""Lines of a journal: a checksum and a JSON value each; read from segments, or from copies of them."""

from __future__ import annotations

import zlib
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SEGMENT_BYTES = 1024 * 1024
"""Size of a segment: about 800 entries. A process has two on the disk while the database keeps up."""

_READ_BYTES = 512 * 1024
_MAX_ENTRY_BYTES = 64 * 1024


class JournalReader:
    """Reads one owner's segments, from the oldest, as far as they are written.

    `committed` returns the number of the owner's current segment and the bytes in it that are complete, where the owner
    may be appending meanwhile: the kernel may show a part of a line that is being written.
    """

    def __init__(self, directory: Path, committed: Callable[[], tuple[int, int]] = lambda: (0, 0)) -> None:
        self._directory = directory
        self._committed = committed
        self._segment: int | None = None
        self._offset = self._end = self._torn = 0
        self.position: tuple[int | None, int] = (None, 0)
        """Segment and offset up to which entries were read, for other threads."""
        self.damaged = 0
        """Number of lines whose checksum is wrong: power failed, or the disk is failing."""

    def read(self) -> tuple[list[Any], int]:
        """Return the next entries and their size in bytes, 0 if there are none yet; the same until `advance`."""
        lines = self.read_lines()
        if not lines:
            return [], 0
        found, self._torn = entries(lines)
        return found, len(lines)

    def read_lines(self) -> bytes:
        """Return the next lines, none if there are none yet; the same until `advance`."""
        while True:
            segments = _segments(self._directory)
            current = self._segment if self._segment in segments else min(segments, default=None)
            if current is None:
                return b""
            if current != self._segment:
                self._segment, self._offset = current, 0
            later = [number for number in segments if number > current]  # listed before reading: the order matters
            number, nbytes = self._committed()
            lines = self._lines(segments[current], nbytes if number == current else None)
            if lines:
                self._end = self._offset + len(lines)
                return lines
            if not later:
                return b""
            self._segment, self._offset = min(later), 0

    def advance(self) -> None:
        """Continue after the entries that were read last."""
        self._offset = self._end
        self.damaged += self._torn
        self.position = self._segment, self._offset

    @property
    def next_position(self) -> tuple[int, int]:
        """Segment and offset of the lines that were read last."""
        return self._segment or 0, self._offset

    def continue_from(self, position: tuple[int | None, int]) -> None:
        """Read from another reader's position on."""
        self._segment, self._offset = self.position = position

    def remove_read_segments(self, *, before: int | None = None) -> None:
        """Remove the segments before the one that is being read, and before that number."""
        for number, path in _segments(self._directory).items():
            if self._segment is not None and number < (self._segment if before is None else min(self._segment, before)):
                with suppress(OSError):  # a read-only disk: it is removed later
                    path.unlink()

    def _lines(self, path: Path, end: int | None) -> bytes:
        """Return the complete lines from the offset on; the zeros behind the last line are not returned."""
        nbytes = _READ_BYTES if end is None else min(_READ_BYTES, end - self._offset)
        with path.open("rb") as segment:
            segment.seek(self._offset)
            data = segment.read(nbytes)
            if b"\n" not in data and end is None:  # lost sectors, behind which there may be more lines
                data += segment.read(SEGMENT_BYTES)
        return data[: data.rfind(b"\n") + 1]


def line(entry: Any) -> bytes:
    """Return the line of an entry. Raises `ValueError` if it is too long."""
    payload = orjson.dumps(entry)
    if len(payload) > _MAX_ENTRY_BYTES:
        raise ValueError(f"a journal entry of {len(payload)} bytes exceeds the limit of {_MAX_ENTRY_BYTES}")
    return b"%08x %b\n" % (zlib.crc32(payload), payload)


def entries(lines: bytes) -> tuple[list[Any], int]:
    """Return the entries of complete lines, and the number of lines that are damaged."""
    found, damaged = [], 0
    for each in lines[:-1].split(b"\n"):
        checksum, _, payload = each.partition(b" ")
        entry = None
        if checksum == b"%08x" % zlib.crc32(payload):
            with suppress(orjson.JSONDecodeError):  # damage with the right checksum: rare, but no reason to stop
                entry = orjson.loads(payload)
        if entry is None:
            damaged += 1
        else:
            found.append(entry)
    return found, damaged


def _segments(directory: Path) -> dict[int, Path]:
    return {int(path.stem): path for path in sorted(directory.glob("*.log"))}
