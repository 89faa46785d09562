"""aiohttp's HTTP/1.1 client with bounds on what a hostile server may send: headers, 1xx answers, tiny chunks.

aiohttp bounds one header line and their number, but neither the answers with status 1xx nor the chunks of a body: a
server that sends chunks of one byte costs a processor 50 times its network's bytes. Here bytes are parsed a slice at a
time, and counted.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import aiohttp
from aiohttp.client_proto import ResponseHandler

from serving.errors import DownloadFailed

if TYPE_CHECKING:
    import asyncio

MAX_HEADERS_BYTES = 64 * 1024
"""All header bytes of one request: every 1xx answer, status lines, and lines that browsers accept (CSP, cookies)."""

MAX_HEADER_LINES = 1000

MIN_MEAN_CHUNK_BYTES = ((4096, 24), (32_768, 256))
"""Least mean size of all chunks, by the number of chunks above which it is asked for.

The first admits a server that sends each frame of a telephone codec in its own chunk (AMR: 32 bytes for 20 ms), for the
11 minutes to the second. At 24 bytes a download of 1 GiB would take a processor for a minute and a half, at 256 for ten
seconds.
"""

MAX_FRAMING_BYTES = 1024 * 1024
"""Most bytes of chunk sizes, chunk extensions and trailers in excess of the content; a signature for each
chunk, as S3 has it, is a hundredth. Bytes that the parser keeps while the disk is slow (256 KiB) count until parsed.
"""

_SLICE_BYTES = 4096
"""Bytes that are parsed between two checks: 700 chunks at most, about a millisecond."""

_FIRST_FINAL_STATUS, _SWITCHING = 200, 101


def bounded_session(**options: Any) -> aiohttp.ClientSession:
    """Return a session for one request, which is sent once: aiohttp sends a GET again when a server disconnects."""
    limits: dict[str, Any] = {"max_line_size": MAX_HEADERS_BYTES, "max_field_size": MAX_HEADERS_BYTES}
    session = aiohttp.ClientSession(**options, **limits, max_headers=MAX_HEADER_LINES)
    session._retry_connection = False  # noqa: SLF001 - aiohttp's own test client does the same
    return session


class BoundedConnector(aiohttp.TCPConnector):
    """A connector whose connections are `BoundedProtocol`s."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._factory: Any = functools.partial(BoundedProtocol, loop=self._loop)


class BoundedProtocol(ResponseHandler):
    """A connection that ends with `DownloadFailed` when the server exceeds a bound."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._header_bytes = 0
        self._in_body = self._is_chunked = False
        self._body: Any = None  # outlives `_payload`, which aiohttp drops
        self._chunks = self._wire_bytes = 0
        self._failed = False

    def data_received(self, data: bytes) -> None:
        """Parse bytes in slices, and count them. No bytes: go on with those that the parser kept when it paused."""
        if self._parser is None:  # before the request is sent; aiohttp passes the bytes in again afterwards
            super().data_received(data)
            return
        start = 0
        while not self._failed and self._parser is not None:
            # A body of a known length is one copy, however long.
            end = start + _SLICE_BYTES if not self._in_body or self._is_chunked else len(data)
            piece, start = data[start:end], end
            if not self._in_body:
                self._header_bytes += len(piece)
            elif self._is_chunked:
                self._wire_bytes += len(piece)
            before = self._splits()
            super().data_received(piece)
            self._chunks += self._splits() - before
            self._check()
            if start >= len(data):
                return

    def feed_data(self, data: Any, size: int = 0) -> None:
        """Receive a parsed answer: the message and its body."""
        message, payload = data
        if message.code >= _FIRST_FINAL_STATUS or message.code == _SWITCHING:
            self._in_body, self._is_chunked, self._body = True, message.chunked, payload
        super().feed_data(data, size)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Name a reset within a body as such; aiohttp takes it for a body that is too short."""
        body, reset = self._body, aiohttp.ClientOSError(*exc.args) if isinstance(exc, OSError) else None
        if body is None or body.is_eof() or reset is None or self._failed:
            super().connection_lost(exc)
            return
        body.set_exception(reset)  # for a reader that waits
        super().connection_lost(exc)
        body.set_exception(reset)  # for a reader that comes later

    def _splits(self) -> int:
        """Return the number of chunks that are parsed and not yet read; no reader runs during `data_received`."""
        return len(getattr(self._body, "_http_chunk_splits", None) or ())

    def _check(self) -> None:
        if not self._in_body and self._header_bytes > MAX_HEADERS_BYTES:
            self._fail("The server's headers are too long.")
        elif any(
            self._chunks > chunks and self._body.total_bytes < mean_bytes * self._chunks
            for chunks, mean_bytes in MIN_MEAN_CHUNK_BYTES
        ):
            self._fail("The server sends the file in pieces that are too small.")
        elif self._is_chunked and self._wire_bytes > MAX_FRAMING_BYTES + 2 * self._body.total_bytes:
            self._fail("The server sends more framing than file.")

    def _fail(self, cause: str) -> None:
        self._failed = True
        error = DownloadFailed(f"{DownloadFailed.message} {cause}")
        if self._body is not None:
            self._body.set_exception(error)
        self.set_exception(error)
        if self.transport is not None:
            self.transport.abort()
