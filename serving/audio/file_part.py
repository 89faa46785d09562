"""Part of a file, as a separate file."""

from __future__ import annotations

from io import SEEK_CUR, SEEK_END, SEEK_SET, BytesIO, RawIOBase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from io import BufferedReader

    from _typeshed import WriteableBuffer

    File = BytesIO | BufferedReader

_READ_BYTES = 1 << 20


class FilePart(RawIOBase):
    """Bytes `begin` to `end` of a file, as a separate file. `magic` stands in for the first of them."""

    def __init__(self, file: File, begin: int, end: int, magic: bytes = b"") -> None:
        self.file, self.begin, self.end = file, begin, end
        self._magic = magic
        self._position = begin

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position - self.begin

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        origin = {SEEK_SET: self.begin, SEEK_CUR: self._position, SEEK_END: self.end}[whence]
        self._position = max(self.begin, origin + offset)
        return self.tell()

    def read(self, size: int = -1) -> bytes:
        """Read for FFmpeg, which requests a complete packet or picture, and requests again the bytes it did not get."""
        self.file.seek(self._position)
        data = self.file.read(max(0, min(size, _READ_BYTES, self.end - self._position)))
        if self._magic and (rest := self._magic[self.tell() :][: len(data)]):
            data = rest + data[len(rest) :]
        self._position += len(data)
        return data

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Read for libsndfile, which takes a short read for the end."""
        self.file.seek(self._position)
        with memoryview(buffer) as view, view[: max(0, self.end - self._position)] as part:
            size = self.file.readinto(part)
            if self._magic and (rest := self._magic[self.tell() :][:size]):
                part[: len(rest)] = rest
        self._position += size
        return size
