"""Private and undocumented names of uvicorn and httptools that `serving/api/uvicorn_protocol.py` uses.

`deploy/upgrading.md` lists them, and the steps to take if one of these tests fails after an upgrade.
"""

from __future__ import annotations

import asyncio
import inspect
import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httptools
import pytest
import uvicorn
import uvicorn.config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from serving.api import uvicorn_protocol
from serving.config import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OFFER = b"POST /path HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\ncontent-length: 4\r\n\r\n"


@pytest.fixture
def http_protocols() -> Iterator[dict[str, Any]]:
    """Table of uvicorn's protocols, restored after the test."""
    table: dict[str, Any] = uvicorn.config.HTTP_PROTOCOLS
    before = dict(table)
    yield table
    table.clear()
    table.update(before)


class Transport(asyncio.Transport):
    """A transport that records what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closing = False

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        self.written += bytes(data)

    def close(self) -> None:
        self.closing = True

    abort = close

    def write_eof(self) -> None:
        """Do nothing."""

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        """Do nothing."""

    def resume_reading(self) -> None:
        """Do nothing."""


def connected(transport: Transport, app: Any) -> HttpToolsProtocol:
    """Return this service's protocol on a new connection."""
    config = uvicorn.Config(app, http=uvicorn_protocol.protocol(Settings()), log_config=None, access_log=False)
    config.load()
    protocol: HttpToolsProtocol = config.http_protocol_class(config, ServerState(), {})  # type: ignore[call-arg,assignment]
    protocol.connection_made(transport)
    return protocol


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("connection_made", ["transport"]),
        ("connection_lost", ["exc"]),
        ("data_received", ["data"]),
        ("pause_writing", []),
        ("resume_writing", []),
        ("on_message_begin", []),
        ("on_url", ["url"]),
        ("on_header", ["name", "value"]),
        ("on_headers_complete", []),
        ("on_body", ["body"]),
        ("on_message_complete", []),
        ("on_response_complete", []),
        ("send_400_response", ["msg"]),
        ("timeout_keep_alive_handler", []),
        ("shutdown", []),
        ("_should_upgrade", []),
        ("_unset_keepalive_if_required", []),
    ],
)
def test_methods_of_the_protocol_have_these_signatures(name: str, parameters: list[str]) -> None:
    """Each method that is overridden or called exists and takes these parameters."""
    assert list(inspect.signature(getattr(HttpToolsProtocol, name)).parameters)[1:] == parameters


def test_every_override_is_an_override() -> None:
    """Every public method of this service's class exists in uvicorn's: a renamed callback would never be called."""
    own = {name for name, value in vars(uvicorn_protocol._Connection).items() if inspect.isfunction(value)}
    helpers = {name for name in own if name.startswith("_") and not hasattr(HttpToolsProtocol, name)}
    assert helpers == {
        "_cancel_headers_deadline",
        "_cancel_write_deadline",
        "_decline_upgrade",
        "_discard",
        "_end_headers",
        "_end_linger",
        "_feed",
        "_refuse",
        "_response",
        "_start_headers_deadline",
        "_start_linger_deadline",
        "_start_write_deadline",
        "_stop",
    }
    added = {"evict", "linger", "on_chunk_header"}
    assert not [name for name in added if hasattr(HttpToolsProtocol, name)]
    assert all(hasattr(HttpToolsProtocol, name) for name in own - helpers - added)


def test_new_names_do_not_shadow_names_of_the_protocol() -> None:
    """No attribute of this service's class has, by chance, a name that uvicorn's instances use for something else."""
    source = inspect.getsource(HttpToolsProtocol)
    added = {name for name in vars(uvicorn_protocol._Connection) if not hasattr(HttpToolsProtocol, name)}
    added -= {"__annotations__", "__static_attributes__", "__firstlineno__"}
    assert {"_headers_deadline", "_write_deadline", "_buffered_bytes", "is_discarding", "_replaying"} <= added
    assert not [name for name in added if f"self.{name}" in source]


def test_the_replaced_method_does_what_it_did() -> None:
    """`data_received` is replaced, not extended: it must still only feed the parser and handle these cases."""
    assert set(HttpToolsProtocol.data_received.__code__.co_names) == {
        "_unset_keepalive_if_required",
        "parser",
        "feed_data",
        "httptools",
        "HttpParserError",
        "logger",
        "warning",
        "send_400_response",
        "HttpParserUpgrade",
        "_should_upgrade",
        "handle_websocket_upgrade",
        "_unsupported_upgrade_warning",
    }


async def test_attributes_of_the_protocol_and_its_cycle_exist() -> None:
    """A connection has these attributes; after a request's headers, so has its cycle."""
    receiving = asyncio.Event()

    async def app(_scope: Any, _receive: Any, _send: Any) -> None:
        await receiving.wait()

    transport = Transport()
    protocol: Any = connected(transport, app)
    assert vars(protocol)["cycle"] is None
    assert protocol.transport is transport
    assert protocol.loop is asyncio.get_running_loop()
    protocol.data_received(b"POST /path HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nab")
    assert (protocol.url, protocol.headers) == (b"/path", [(b"host", b"x"), (b"content-length", b"4")])
    cycle = protocol.cycle
    assert isinstance(cycle, RequestResponseCycle)
    assert (cycle.response_complete, cycle.more_body, cycle.keep_alive) == (False, True, True)
    assert (cycle.response_started, cycle.disconnected, cycle.chunked_encoding) == (False, False, None)
    assert (cycle.expected_content_length, cycle.waiting_for_100_continue) == (0, False)
    assert cycle.message_event.is_set()
    assert protocol.scope["state"]["peer"] is None
    assert not protocol.pipeline
    protocol.data_received(b"cd")
    assert not cycle.more_body
    protocol.connection_lost(None)
    assert protocol.parser is None
    receiving.set()
    await asyncio.wait(protocol.tasks)


async def test_a_response_calls_the_protocol_and_observes_keep_alive() -> None:
    """A complete response calls `on_response_complete`, and a cycle with `keep_alive` off closes the connection."""
    protocol = connected(transport := Transport(), _answer)
    protocol.data_received(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    cycle: Any = protocol.cycle
    cycle.keep_alive = False
    assert cycle.on_response == protocol.on_response_complete
    await asyncio.wait(protocol.tasks)
    assert cycle.response_complete
    assert transport.closing
    assert b"connection: close" in transport.written
    protocol.connection_lost(None)


async def test_a_callback_that_raises_stops_the_parser() -> None:
    """An exception of `on_headers_complete` leaves the parser as `HttpParserError`: the request is refused."""

    def refuse() -> None:
        raise ValueError("request headers are too large")

    parser = httptools.HttpRequestParser(SimpleNamespace(on_headers_complete=refuse))
    with pytest.raises(httptools.HttpParserError):
        parser.feed_data(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")


def test_the_parser_reports_chunks_and_trailers() -> None:
    """The parser calls `on_chunk_header` for each chunk, and `on_header` for trailers after `on_headers_complete`."""
    events: list[str] = []
    names = ("on_header", "on_headers_complete", "on_chunk_header", "on_body")
    callbacks = {name: lambda *_, name=name: events.append(name) for name in names}
    parser = httptools.HttpRequestParser(SimpleNamespace(**callbacks))
    parser.feed_data(b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n1;x\r\nb\r\n0\r\ny: z\r\n\r\n")
    chunks = ["on_chunk_header", "on_body"] * 2 + ["on_chunk_header"]
    assert events == ["on_header", "on_headers_complete", *chunks, "on_header"]


def test_a_response_uses_its_transport_in_these_ways_only() -> None:
    """`_CycleTransport` has every method of the transport that uvicorn's response calls."""
    source = inspect.getsource(RequestResponseCycle)
    assert set(re.findall(r"self\.transport\.(\w+)", source)) == {"write", "close", "is_closing"}


async def test_an_upgrade_offer_carries_the_offset_of_the_body() -> None:
    """The parser stops after the headers of an offer, and its exception has the offset of the next byte alone."""
    events: list[str] = []
    callbacks: dict[str, Callable[[], None]] = {
        name: lambda name=name: events.append(name)  # type: ignore[misc]
        for name in ("on_message_begin", "on_headers_complete", "on_message_complete")
    }
    parser = httptools.HttpRequestParser(SimpleNamespace(**callbacks))
    with pytest.raises(httptools.HttpParserUpgrade) as offered:
        parser.feed_data(OFFER + b"body")
    assert offered.value.args == (len(OFFER),)
    assert parser.should_upgrade()
    assert parser.should_keep_alive()
    assert events == ["on_message_begin", "on_headers_complete", "on_message_complete"]


async def test_a_declined_offer_is_served_as_a_request() -> None:
    """A second parser reads the body of an offer, after headers that uvicorn does not see again."""
    bodies: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        bodies.append((await receive())["body"])
        await _answer(scope, receive, send)

    protocol = connected(transport := Transport(), app)
    protocol.data_received(OFFER + b"body")
    assert protocol.url == b"/path"
    await asyncio.wait(protocol.tasks)
    assert bodies == [b"body"]
    assert transport.written.startswith(STATUS_LINE[200])
    protocol.connection_lost(None)


def test_the_parser_has_the_leniency_of_uvicorn() -> None:
    """`set_dangerous_leniencies` takes `lenient_data_after_close`, and uvicorn sets this leniency and no other."""
    httptools.HttpRequestParser(SimpleNamespace()).set_dangerous_leniencies(lenient_data_after_close=True)
    source = inspect.getsource(HttpToolsProtocol.__init__)
    assert source.count("set_dangerous_leniencies(lenient_data_after_close=True)") == 1
    assert source.count("set_dangerous_leniencies") == 1


def test_status_lines_are_bytes() -> None:
    """`STATUS_LINE` holds complete status lines, 431 included; the response to large headers repeats its phrase."""
    assert STATUS_LINE[200] == b"HTTP/1.1 200 OK\r\n"
    assert STATUS_LINE[431] == b"HTTP/1.1 431 Request Header Fields Too Large\r\n"


def test_the_default_protocol_may_be_a_class(http_protocols: dict[str, Any]) -> None:
    """A server with the default `http` (Ray Serve's frontends) uses the class that `HTTP_PROTOCOLS["auto"]` holds."""
    assert inspect.signature(uvicorn.Config).parameters["http"].default == "auto"
    uvicorn_protocol.use_everywhere(Settings())
    config = uvicorn.Config(_answer, log_config=None)
    config.load()
    assert config.http_protocol_class is http_protocols["auto"]
    assert issubclass(config.http_protocol_class, uvicorn_protocol._Connection)


async def test_servers_have_the_attributes_that_are_used() -> None:
    """`uvicorn.Server` has the methods that are overridden and the attributes that are read or set."""
    assert list(inspect.signature(uvicorn.Server.startup).parameters) == ["self", "sockets"]
    assert list(inspect.signature(uvicorn.Server.shutdown).parameters) == ["self", "sockets"]
    assert hasattr(uvicorn.Server.capture_signals, "__wrapped__"), "a context manager made of a generator"
    server = uvicorn.Server(uvicorn.Config(_answer, port=0, log_config=None, lifespan="off"))
    assert (server.started, server.should_exit) == (False, False)
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    assert host == "127.0.0.1"
    assert port
    assert server.server_state.tasks == set()
    server.should_exit = True
    await serving


async def _answer(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})
