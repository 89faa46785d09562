"""Content codings of downloads: misused names pass the bytes through, gzip and deflate are inflated within bounds.

Object stores repeat whatever an uploader wrote into `Content-Encoding`, so names that are no compression
(`aws-chunked`, `utf-8`, `binary`, `audio/wav`) come with plain bytes. A name of a compression that is not inflated here
is refused.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from serving.errors import DownloadFailed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PLAIN = frozenset(
    (
        *("", "identity", "none", "null", "undefined", "binary", "raw", "plain", "7bit", "8bit", "base64"),
        *("aws-chunked", "chunked", "utf-8", "utf8", "ascii", "us-ascii", "iso-8859-1", "latin1", "gb2312", "gbk"),
    )
)
"""Names with which the bytes are plain; `base64` is what the AWS SDK for JavaScript is often given with a buffer."""

_GZIP, _DEFLATE = ("gzip", "x-gzip"), ("deflate",)

_OUTPUT_BYTES = 256 * 1024
"""Most bytes that are inflated at once: the bound of memory for one download."""

_RATIO, _RATIO_FREE_BYTES = 100, 16 * 1024 * 1024
"""Bound of an inflated body: `_RATIO` times the compressed bytes, and `_RATIO_FREE_BYTES` in addition.

Speech and music shrink to about a half, digital silence to a thousandth: the addition admits 8 minutes of silence.
"""

_MEMBER_BYTES, _FREE_MEMBERS = 1024, 16
"""A gzip body may have a member per `_MEMBER_BYTES`, and this number in addition: each costs a new decompressor."""

_AUTO, _RAW = 47, -15
"""zlib's codes for a gzip or zlib header, and for none."""


def decoder(names: Iterable[str]) -> Inflater | None:
    """Return a decoder for the values of `Content-Encoding` and `Transfer-Encoding`, `None` if the body is plain.

    Raises `DownloadFailed`, which names the coding, for a coding that is not known and for more than one compression.
    """
    codings = [name.strip().lower() for value in names for name in value.split(",")]
    compressions = [name for name in codings if name not in PLAIN and "/" not in name]
    if not compressions:
        return None
    if len(compressions) == 1 and compressions[0] in (*_GZIP, *_DEFLATE):
        return Inflater(compressions[0])
    shown = ", ".join(compressions).encode("ascii", "replace").decode()[:64]
    raise DownloadFailed(f"{DownloadFailed.message} The server sent the file with the Content-Encoding {shown}.")


class Inflater:
    """An incremental decompressor with bounded memory and ratio. Raises `DownloadFailed` for a body that is damaged."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._first = b""
        self._zlib: zlib._Decompress | None = None
        self._read = self._written = self._members = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the bytes in `data`, at most `_OUTPUT_BYTES` at once."""
        self._read += len(data)
        data, self._first = self._first + data, b""
        while data:
            if self._zlib is None or self._zlib.eof:
                if len(data) < 2:  # noqa: PLR2004 - every header has two bytes
                    self._first = data
                    return
                if self._zlib is not None and not (self._name in _GZIP and data.startswith(b"\x1f\x8b")):
                    return  # padding after the last member, which `gzip` ignores, too
                self._zlib = self._member(data)
            try:
                piece = self._zlib.decompress(data, _OUTPUT_BYTES)
            except zlib.error:
                raise self._failed("is damaged") from None
            data = self._zlib.unused_data if self._zlib.eof else self._zlib.unconsumed_tail
            self._written += len(piece)
            if self._written > _RATIO * self._read + _RATIO_FREE_BYTES:
                raise self._failed(f"grows to more than {_RATIO} times its size")
            if piece:
                yield piece

    def finish(self) -> None:
        """Check that the body is complete."""
        if self._first if self._zlib is None else not self._zlib.eof:
            raise self._failed("is cut off")

    def _member(self, data: bytes) -> zlib._Decompress:
        self._members += 1
        if self._members > _FREE_MEMBERS + self._read // _MEMBER_BYTES:
            raise self._failed("has too many members")
        has_header = self._name in _GZIP or (data[0] & 15 == 8 and int.from_bytes(data[:2], "big") % 31 == 0)  # noqa: PLR2004 - RFC 1950
        return zlib.decompressobj(_AUTO if has_header else _RAW)

    def _failed(self, fault: str) -> DownloadFailed:
        return DownloadFailed(f"{DownloadFailed.message} The server's {self._name} body {fault}.")
