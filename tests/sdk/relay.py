"""A relay between a client and the service that records every byte of both and changes none."""

from __future__ import annotations

import contextlib
import http.client
import io
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Exchange:
    """One request and its answer as sent over the wire. Header names are in lower case."""

    method: str
    target: str
    request_headers: dict[str, str]
    status: int
    headers: list[tuple[str, str]]
    body: bytes
    complete: bool
    """The answer is complete."""

    def header(self, name: str) -> str:
        """Return the answer's header, or an empty string."""
        return next((value for key, value in self.headers if key == name), "")

    @property
    def is_stream(self) -> bool:
        """True if the answer is an event stream."""
        return self.header("content-type").startswith("text/event-stream")


@dataclass
class _Connection:
    """The bytes of one connection, and the time at which each piece of the answer passed."""

    sent: bytearray = field(default_factory=bytearray)
    received: bytearray = field(default_factory=bytearray)
    arrivals: list[tuple[float, bytes]] = field(default_factory=list)


class Relay:
    """A loopback address that forwards to the service's. A context."""

    def __init__(self, origin: str) -> None:
        self._upstream = urlsplit(origin)
        self._connections: list[_Connection] = []
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.origin = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        _end(self._listener)
        self._accepting.join()
        _end(*self._sockets)  # clients keep idle connections
        for thread in self._threads:
            thread.join()
        for end in (self._listener, *self._sockets):
            end.close()

    def exchanges(self) -> list[Exchange]:
        """Return every answer so far, connection by connection."""
        return [exchange for connection in self._connections for exchange in _exchanges(connection)]

    def sent(self) -> bytes:
        """Return all bytes that clients have sent."""
        return b"".join(bytes(connection.sent) for connection in self._connections)

    def arrivals(self) -> list[tuple[float, bytes]]:
        """Return each piece of the answers as the service sent it, with the monotonic time in seconds."""
        return [arrival for connection in self._connections for arrival in connection.arrivals]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                service = socket.create_connection((str(self._upstream.hostname), int(self._upstream.port or 80)))
                for end in (client, service):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self._sockets.append(end)
                self._connections.append(connection := _Connection())
                for pump in (_pump_request, _pump_answer):
                    thread = threading.Thread(target=pump, args=(client, service, connection), daemon=True)
                    thread.start()
                    self._threads.append(thread)


def _pump_request(client: socket.socket, service: socket.socket, connection: _Connection) -> None:
    with contextlib.suppress(OSError):
        while piece := client.recv(262_144):
            connection.sent += piece
            service.sendall(piece)
    _end(client, service)


def _pump_answer(client: socket.socket, service: socket.socket, connection: _Connection) -> None:
    with contextlib.suppress(OSError):
        while piece := service.recv(262_144):
            connection.received += piece
            connection.arrivals.append((time.monotonic(), piece))
            client.sendall(piece)
    _end(client, service)


def _end(*ends: socket.socket) -> None:
    """Close both sides: no client here closes one direction only."""
    for end in ends:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def _exchanges(connection: _Connection) -> Iterator[Exchange]:
    requests, answers = io.BytesIO(connection.sent), _Unclosed(connection.received)
    while request_line := requests.readline().decode("latin-1").split():
        method, target, _ = request_line
        request_headers = {name.lower(): value for name, value in http.client.parse_headers(requests).items()}
        _skip_body(requests, request_headers)
        answer = http.client.HTTPResponse(answers, method=method)  # type: ignore[arg-type]
        try:
            answer.begin()
        except http.client.HTTPException:
            return  # the client disconnected before the answer
        body, complete = b"", True
        try:
            body = answer.read()
        except http.client.IncompleteRead as incomplete:
            body, complete = incomplete.partial, False
        headers = [(name.lower(), value) for name, value in answer.getheaders()]
        yield Exchange(method, target, request_headers, answer.status, headers, body, complete)


def _skip_body(requests: io.BytesIO, headers: dict[str, str]) -> None:
    if headers.get("transfer-encoding") != "chunked":
        requests.seek(int(headers.get("content-length", 0)), io.SEEK_CUR)
        return
    while size := int(requests.readline() or b"0", 16):
        requests.seek(size + len(b"\r\n"), io.SEEK_CUR)
    requests.readline()


class _Unclosed(io.BytesIO):
    """A file in place of a socket for `HTTPResponse`. The end of one answer does not close it for the next."""

    def makefile(self, mode: str) -> Self:
        """Return the rest."""
        del mode
        return self

    def close(self) -> None:
        """Stay open."""
