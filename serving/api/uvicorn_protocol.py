"""uvicorn's HTTP connection, with the bounds that uvicorn lacks.

The only file that uses private names of uvicorn and httptools; `tests/compat/test_uvicorn.py` checks that each exists.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import httptools
import uvicorn.config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

if TYPE_CHECKING:
    from asyncio import TimerHandle, Transport

    from serving.config import Settings

MAX_HEADER_BYTES = 65_536
"""Limit of request line and headers. Clients send a few hundred bytes, and most proxies allow 8 to 32 KiB."""

_FRAMING = (b"content-length", b"transfer-encoding")

_LINGER_S = 2.0
"""Time in which data from a refused client is read and discarded, so that it receives the answer instead of a reset."""


class _Connection(HttpToolsProtocol):
    """A connection with a limit and a deadline for request headers, and a deadline for a client that does not read."""

    header_timeout_s: float
    write_timeout_s: float
    _write_deadline: TimerHandle | None = None
    _headers_deadline: TimerHandle | None = None
    _refused = False
    _buffered_bytes = 0
    """Bytes fed to the parser since its last callback with headers or a part of a body; it keeps all of them."""
    _replaying = False
    """The parser reads a copy of headers that were handled before; see `_decline_upgrade`."""

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_headers_deadline()

    def data_received(self, data: bytes) -> None:
        if self.cycle is None or self.cycle.response_complete:  # type: ignore[redundant-expr]
            self._start_headers_deadline()
        if self._buffered_bytes > MAX_HEADER_BYTES:
            self._refuse()
            return
        self._buffered_bytes += len(data)
        self._unset_keepalive_if_required()
        self._feed(data)

    def _feed(self, data: bytes) -> None:
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offered:
                (headers_end,) = offered.args
                data = self._decline_upgrade() + data[headers_end:]
                continue
            except httptools.HttpParserError:
                self.send_400_response("Invalid HTTP request received.")
            return

    def _decline_upgrade(self) -> bytes:
        """Replace the parser after an upgrade offer; return headers to feed to the new parser before the body.

        The offer is ignored, and the request served as HTTP/1.1 (RFC 9110, 7.8). The old parser stops after the headers
        of such a request: it treats the following bytes as the other protocol, and uvicorn treats the next bytes as
        another request. So a new parser reads the body, after headers with the same framing and without the offer.
        """
        framing = [(name, value) for name, value in self.headers if name in _FRAMING]
        if not self.parser.should_keep_alive():
            framing.append((b"connection", b"close"))
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self._replaying = True
        return b"".join((b"POST / HTTP/1.1\r\n", *(b"%s: %s\r\n" % field for field in framing), b"\r\n"))

    def on_message_begin(self) -> None:
        if not self._replaying:
            super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._replaying:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._replaying:
            super().on_header(name, value)

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():  # else the body follows
            super().on_message_complete()

    def _should_upgrade(self) -> bool:
        return False

    def on_headers_complete(self) -> None:
        if self._replaying:
            self._replaying = False
            return
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEADER_BYTES:
            self._buffered_bytes = MAX_HEADER_BYTES + 1
            raise ValueError("request headers are too large")  # makes the parser stop with `HttpParserError`
        self._buffered_bytes = 0
        self._cancel_headers_deadline()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._buffered_bytes = 0
        self._cancel_headers_deadline()
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        if self._buffered_bytes > MAX_HEADER_BYTES:
            self._refuse()
        else:
            super().send_400_response(msg)

    def _refuse(self) -> None:
        """Answer 431 once, and close the connection."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        if self.cycle is not None and not self.cycle.response_complete:  # type: ignore[redundant-expr]
            if self.cycle.more_body:
                self.transport.abort()  # a trailer was too large, so the body before it never ends
            self.cycle.keep_alive = False  # otherwise the response in progress is the last of this connection
            return
        self.transport.write(
            STATUS_LINE[431] + b"content-type: text/plain; charset=utf-8\r\ncontent-length: 31\r\n"
            b"connection: close\r\n\r\nRequest Header Fields Too Large"
        )
        self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.abort)

    def _start_headers_deadline(self) -> None:
        if self._headers_deadline is None:
            self._headers_deadline = self.loop.call_later(self.header_timeout_s, self.transport.abort)

    def _cancel_headers_deadline(self) -> None:
        if self._headers_deadline is not None:
            self._headers_deadline.cancel()
            self._headers_deadline = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_headers_deadline()
        self._cancel_write_deadline()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_write_deadline()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_write_deadline()
        if self.transport.is_closing():
            self._start_write_deadline()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._start_write_deadline()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._start_write_deadline()

    def _start_write_deadline(self) -> None:
        # `close` would not help: it waits until everything is sent.
        if self._write_deadline is None:
            self._write_deadline = self.loop.call_later(self.write_timeout_s, self.transport.abort)

    def _cancel_write_deadline(self) -> None:
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None


def use_everywhere(settings: Settings) -> None:
    """Use these connections in every server of this process, also those that Ray Serve configures (its frontends)."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = protocol(settings)  # type: ignore[assignment] # `Config` accepts a class, too


def protocol(settings: Settings) -> type[HttpToolsProtocol]:
    """Return the protocol class of each connection, for `http` of `uvicorn.Config`."""
    bounds = {"header_timeout_s": settings.header_timeout_s, "write_timeout_s": settings.write_timeout_s}
    return type("Connection", (_Connection,), bounds)
