"""uvicorn's HTTP connection, with the bounds that uvicorn lacks.

The only file that uses private names of uvicorn and httptools, but for status lines; `tests/compat/test_uvicorn.py`
checks that each exists.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import httptools
import uvicorn.config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.api.connections import Connections, raise_descriptor_limit
from serving.api.request_head import HeadRefusals, check_fields
from serving.errors import CaptionerError, HeadersTooLarge, InvalidRequest, MalformedHttp, NotReady, Overloaded

if TYPE_CHECKING:
    from asyncio import TimerHandle, Transport

    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

    from serving.config import Settings

MAX_HEADER_BYTES = 65_536
"""Limit of request line and headers. Clients send a few hundred bytes, and most proxies allow 8 to 32 KiB."""

MAX_TARGET_BYTES = 8192
"""Limit of the request's target, path and query."""

MAX_HEADER_FIELDS = 128
"""Limit of header fields. Each costs a microsecond of the event loop; proxies and clients send about twenty."""

MAX_PIPELINED = 32
"""Limit of requests that wait on one connection for the response to the request before them."""

_FREE_CHUNKS, _BYTES_PER_CHUNK = 1024, 256
"""Chunks of a body without a least size, and mean bytes that every further one must have: a chunk costs a microsecond,
so that a body of single bytes would cost the event loop 15 s for each 16 MiB."""

_FREE_FRAMING_BYTES, _FRAMING_BYTES_PER_CHUNK = 16_384, 16
"""Bytes of chunk extensions and trailers of a body, and bytes of framing for each chunk."""

_FRAMING = (b"content-length", b"transfer-encoding")

_LINGER_S = 2.0
"""Time in which data of an answered client is read and discarded, so that it receives the answer instead of a reset."""


class _Connection(HttpToolsProtocol):
    """A connection with bounds on the head, the framing and the time of a request, and on a client that does not read.

    A request that is answered before its body has arrived leaves `_LINGER_S` for the rest of the body.
    """

    limits: Connections
    refusals: HeadRefusals
    header_timeout_s: float
    write_timeout_s: float
    linger_bytes: int
    _write_deadline: TimerHandle | None = None
    _headers_deadline: TimerHandle | None = None
    _linger_deadline: TimerHandle | None = None
    is_discarding = False
    """The connection is answered for the last time; what still arrives is not parsed."""
    _discarded_bytes = 0
    _refusal: CaptionerError | None = None
    """Reason for which a callback of the parser stopped it."""
    _buffered_bytes = 0
    """Bytes fed to the parser since its last callback with headers or a part of a body; it keeps all of them."""
    _chunks = _body_bytes = _framing_bytes = _header_bytes = 0
    _in_trailers = False
    """Fields that follow are trailers: they are counted, and no part of the request."""
    _replaying = False
    """The parser reads a copy of headers that were handled before; see `_decline_upgrade`."""

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        opened = transport.get_extra_info("socket")
        host = self.client[0] if self.client else None
        if reason := self.limits.add(self, host, opened.fileno() if opened else 0):
            self.is_discarding = True
            transport.write(self._response(Overloaded(reason=reason)))
            transport.close()
            return
        self._start_headers_deadline()

    def evict(self) -> None:
        """Close the connection for a new one."""
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.is_discarding:
            self._discard(len(data))
            return
        if self.cycle is None or self.cycle.response_complete:  # type: ignore[redundant-expr]
            self._start_headers_deadline()
        if self._buffered_bytes > MAX_HEADER_BYTES:
            self._refuse(HeadersTooLarge())
            return
        self._buffered_bytes += len(data)
        self._unset_keepalive_if_required()
        cycle, body_bytes = self.cycle, self._body_bytes
        self._feed(data)
        if self._chunks and self.cycle is cycle and cycle.more_body and not self.is_discarding:
            self._framing_bytes += len(data) - (self._body_bytes - body_bytes)
            if self._framing_bytes > _FREE_FRAMING_BYTES + _FRAMING_BYTES_PER_CHUNK * self._chunks:
                self._refuse(MalformedHttp("The chunks of the body have too much framing."))

    def _feed(self, data: bytes) -> None:
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offered:
                (headers_end,) = offered.args
                data = self._decline_upgrade() + data[headers_end:]
                continue
            except httptools.HttpParserError:
                self._refuse(self._refusal or MalformedHttp())
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
            self._header_bytes = 0
            self._in_trailers = False

    def on_url(self, url: bytes) -> None:
        if not self._replaying:
            super().on_url(url)
            if len(self.url) > MAX_TARGET_BYTES:
                self._stop(HeadersTooLarge())

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._replaying and not self._in_trailers:
            super().on_header(name, value)
            self._header_bytes += len(name) + len(value)
            if self._header_bytes > MAX_HEADER_BYTES or len(self.headers) > MAX_HEADER_FIELDS:
                self._stop(HeadersTooLarge())

    def _stop(self, error: CaptionerError) -> NoReturn:
        """Make the parser stop: it raises `HttpParserError` after a callback that raised."""
        self._refusal = error
        raise error

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():  # else the body follows
            super().on_message_complete()
            self.limits.request_received(self)
            if self._linger_deadline is not None and not self.is_discarding:
                self._linger_deadline.cancel()
                self._linger_deadline = None

    def _should_upgrade(self) -> bool:
        return False

    def on_headers_complete(self) -> None:
        if self._replaying:
            self._replaying = False
            return
        http_version = self.parser.get_http_version()
        try:
            check_fields(http_version, self.headers)
        except InvalidRequest as error:
            self._stop(error)
        if len(self.pipeline) >= MAX_PIPELINED:
            self._stop(MalformedHttp("Too many requests wait on this connection."))
        self._buffered_bytes = self._chunks = self._body_bytes = self._framing_bytes = 0
        self._in_trailers = True
        self._cancel_headers_deadline()
        self.scope["state"]["peer"] = self.client[0] if self.client else None
        super().on_headers_complete()
        self.cycle.transport = _CycleTransport(self, self.cycle)  # type: ignore[assignment] # it has what a cycle uses
        if http_version == "1.0":
            self.cycle.waiting_for_100_continue = False
            self.cycle.send = _UntilClose(self.cycle)  # type: ignore[method-assign]
        self.limits.request_started(self)

    def on_body(self, body: bytes) -> None:
        self._buffered_bytes = 0
        self._body_bytes += len(body)
        self._cancel_headers_deadline()
        if self.cycle.response_complete:
            self._discard(len(body))
        super().on_body(body)

    def on_chunk_header(self) -> None:
        """Count a chunk: httptools calls this for each."""
        self._chunks += 1
        if self._chunks > _FREE_CHUNKS + self._body_bytes // _BYTES_PER_CHUNK:
            self._stop(MalformedHttp("The chunks of the body are too small."))

    def send_400_response(self, msg: str) -> None:
        self._refuse(MalformedHttp(msg))

    def _response(self, error: CaptionerError) -> bytes:
        url = getattr(self, "url", b"")  # uvicorn sets it with the first request
        return self.refusals.response(error, url, self.server_state.default_headers)

    def _refuse(self, error: CaptionerError) -> None:
        """Answer once for the parser, and close the connection. A response in progress is completed before."""
        if self.is_discarding or self.transport.is_closing():
            return
        self.is_discarding = True
        self._cancel_headers_deadline()
        self.limits.count("headers" if isinstance(error, HeadersTooLarge) else "malformed")
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is not None and not cycle.response_complete:
            if not cycle.more_body:
                cycle.keep_alive = False  # its response is the last of this connection
                return
            cycle.disconnected = True  # its body never ends; the application's response is discarded
            cycle.message_event.set()
            if cycle.response_started:
                self.transport.abort()
                return
        self.transport.write(self._response(error))
        self.linger()

    def linger(self) -> None:
        """Close for writing, and read for a while what the client still sends."""
        self.is_discarding = True
        self.limits.became_idle(self)
        self.transport.write_eof()
        self._start_linger_deadline()

    def _start_linger_deadline(self) -> None:
        if self._linger_deadline is None:
            self._discarded_bytes = 0
            self._linger_deadline = self.loop.call_later(_LINGER_S, self._end_linger)

    def _end_linger(self) -> None:
        self.limits.count("unread")
        self.transport.abort()

    def _discard(self, size: int) -> None:
        self._discarded_bytes += size
        if self._discarded_bytes > self.linger_bytes and not self.transport.is_closing():
            self._end_linger()

    def _start_headers_deadline(self) -> None:
        if self._headers_deadline is None:
            self._headers_deadline = self.loop.call_later(self.header_timeout_s, self._end_headers)

    def _end_headers(self) -> None:
        self.limits.count("header_timeout")
        self.transport.abort()

    def _cancel_headers_deadline(self) -> None:
        if self._headers_deadline is not None:
            self._headers_deadline.cancel()
            self._headers_deadline = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_headers_deadline()
        self._cancel_write_deadline()
        if self._linger_deadline is not None:
            self._linger_deadline.cancel()
        self.limits.discard(self)
        super().connection_lost(exc)

    def shutdown(self) -> None:
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is not None and cycle.more_body and not cycle.response_started:
            self.limits.count("shutdown")
            cycle.disconnected = True
            cycle.message_event.set()
            self.transport.write(self._response(NotReady()))
            self.transport.close()
            return
        super().shutdown()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_write_deadline()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_write_deadline()
        if self.transport.is_closing():
            self._start_write_deadline()

    def on_response_complete(self) -> None:
        cycle = self.cycle
        super().on_response_complete()
        if self.transport.is_closing():
            self._start_write_deadline()
        elif cycle.response_complete:
            self.limits.became_idle(self)
            if cycle.more_body:
                self._start_linger_deadline()

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


class _CycleTransport:
    """The transport of one response, which closes the connection only after it has lingered for the request's body."""

    def __init__(self, connection: _Connection, cycle: RequestResponseCycle) -> None:
        self._connection = connection
        self._cycle = cycle
        self.write = connection.transport.write
        self.is_closing = connection.transport.is_closing

    def close(self) -> None:
        """Close after the response; linger if the body has not arrived."""
        connection = self._connection
        if (
            (self._cycle.more_body or connection.is_discarding)
            and not self._cycle.disconnected
            and not self.is_closing()
        ):
            connection.linger()
        else:
            connection.transport.close()


class _UntilClose:
    """`send` for an HTTP/1.0 client, which knows no chunks: the end of the connection ends a body of unknown length."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._send = cycle.send
        self._has_length = False

    async def __call__(self, message: Any) -> None:
        """Send one ASGI message."""
        if message["type"] == "http.response.start":
            self._has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            if not self._has_length:
                self._cycle.chunked_encoding = False
        elif not self._has_length:
            self._cycle.expected_content_length = len(message.get("body", b""))
        await self._send(message)


def use_everywhere(settings: Settings) -> Connections:
    """Use these connections in every server of this process, also those that Ray Serve configures (its frontends).

    Their clients come through Ray's HAProxy: no address is limited.
    """
    raise_descriptor_limit()
    limits = Connections(settings, behind_proxy=True)
    uvicorn.config.HTTP_PROTOCOLS["auto"] = protocol(settings, limits)  # type: ignore[assignment] # it may be a class
    return limits


def protocol(settings: Settings, limits: Connections | None = None) -> type[HttpToolsProtocol]:
    """Return the protocol class of each connection, for `http` of `uvicorn.Config`."""
    bounds = {
        "limits": limits or Connections(settings),
        "refusals": HeadRefusals(settings),
        "header_timeout_s": settings.header_timeout_s,
        "write_timeout_s": settings.write_timeout_s,
        "linger_bytes": settings.max_body_bytes,
    }
    return type("Connection", (_Connection,), bounds)
