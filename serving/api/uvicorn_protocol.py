"""One connection of a client: uvicorn's, with the bounds that it lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httptools
import uvicorn.config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

if TYPE_CHECKING:
    from asyncio import TimerHandle, Transport

    from serving.config import Settings

MAX_HEAD_BYTES = 65_536
"""Request line and headers. Clients send a few hundred bytes, and proxies mostly let 8 to 32 KiB through."""

_FRAMING = (b"content-length", b"transfer-encoding")

_LINGER_S = 2.0
"""So long what a refused client still sends is read and thrown away, so that it hears the answer instead of a reset."""


class _Connection(HttpToolsProtocol):
    """A connection whose requests have heads of a bounded size that come in time, and whose client must read."""

    header_timeout_s: float
    write_timeout_s: float
    _drop: TimerHandle | None = None
    _head_due: TimerHandle | None = None
    _refused = False
    _loose_bytes = 0
    """What the parser was given since it last handed on a head or a part of a body: it keeps all of that."""
    _replaying = False
    """The parser reads a copy of a head that was handled before; see `_decline_upgrade`."""

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self.cycle is None or self.cycle.response_complete:  # type: ignore[redundant-expr]
            self._await_head()
        if self._loose_bytes > MAX_HEAD_BYTES:
            self._refuse()
            return
        self._loose_bytes += len(data)
        self._unset_keepalive_if_required()
        self._feed(data)

    def _feed(self, data: bytes) -> None:
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offered:
                (end_of_head,) = offered.args
                data = self._decline_upgrade() + data[end_of_head:]
                continue
            except httptools.HttpParserError:
                self.send_400_response("Invalid HTTP request received.")
            return

    def _decline_upgrade(self) -> bytes:
        """Begin to parse the body of a request that offers another protocol; return what to parse before the body.

        An offer is ignored, and the request served as HTTP/1.1 (RFC 9110, 7.8). The parser stops behind the head of
        such a request: it takes what follows for the other protocol, and uvicorn the next bytes for another request.
        So another parser reads the body behind a head that has the same framing and offers nothing.
        """
        framing = [(name, value) for name, value in self.headers if name in _FRAMING]
        if not self.parser.should_keep_alive():
            framing.append((b"connection", b"close"))
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
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
        if not self.parser.should_upgrade():  # else the body is still to come
            super().on_message_complete()

    def _should_upgrade(self) -> bool:
        return False

    def on_headers_complete(self) -> None:
        if self._replaying:
            self._replaying = False
            return
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD_BYTES:
            self._loose_bytes = MAX_HEAD_BYTES + 1
            raise ValueError("the head is too large")  # for the parser, which ends and calls it a bad request
        self._loose_bytes = 0
        self._head_has_come()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._loose_bytes = 0
        self._head_has_come()
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        if self._loose_bytes > MAX_HEAD_BYTES:
            self._refuse()
        else:
            super().send_400_response(msg)

    def _refuse(self) -> None:
        """Answer that the head is too large, once, and give up the connection."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        if self.cycle is not None and not self.cycle.response_complete:  # type: ignore[redundant-expr]
            if self.cycle.more_body:
                self.transport.abort()  # it was a trailer, and the body before it never ends
            self.cycle.keep_alive = False  # else an answer of before is on its way, and shall be the last
            return
        self.transport.write(
            STATUS_LINE[431] + b"content-type: text/plain; charset=utf-8\r\ncontent-length: 31\r\n"
            b"connection: close\r\n\r\nRequest Header Fields Too Large"
        )
        self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.abort)

    def _await_head(self) -> None:
        if self._head_due is None:
            self._head_due = self.loop.call_later(self.header_timeout_s, self.transport.abort)

    def _head_has_come(self) -> None:
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_has_come()
        self._is_read()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._must_be_read()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._is_read()
        if self.transport.is_closing():
            self._must_be_read()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._must_be_read()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._must_be_read()

    def _must_be_read(self) -> None:
        # Closing would not do: it waits until all is sent.
        if self._drop is None:
            self._drop = self.loop.call_later(self.write_timeout_s, self.transport.abort)

    def _is_read(self) -> None:
        if self._drop is not None:
            self._drop.cancel()
            self._drop = None


def use_everywhere(settings: Settings) -> None:
    """Have these connections in servers of this process that someone else configures, too (Ray Serve's frontends)."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = protocol(settings)  # type: ignore[assignment] # it takes a class as well


def protocol(settings: Settings) -> type[HttpToolsProtocol]:
    """What uvicorn makes of each connection (its `http`)."""
    bounds = {"header_timeout_s": settings.header_timeout_s, "write_timeout_s": settings.write_timeout_s}
    return type("Connection", (_Connection,), bounds)
