"""Offers to switch the protocol (`Upgrade`) are ignored, and no byte of a request is taken for another request."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from http.client import HTTPResponse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.cluster.running import free_port
from tests.support.programs import program
from tests.support.service import RunningService
from tests.support.wire import COMPATIBLE, compatible_body, data_url, events, wav

if TYPE_CHECKING:
    from collections.abc import Iterator

KEY = "sk-of-the-settings"
SHORT, LONG = 8 + 13, 8 + 75
"""Prompt tokens of a clip of 0.4 s and of a clip of 6 s: they identify the clip that an answer describes."""


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    """A service that requires keys."""
    with RunningService("--engine=fake", f"--api-keys={KEY}", "--fake-tpot-s=0") as running:
        yield running


def post(seconds: float, *headers: str, key: str | None = KEY, chunked: bool = False, stream: bool = False) -> bytes:
    """Return a caption request as bytes for the wire."""
    body = json.dumps(compatible_body(data_url(wav(seconds)), stream=stream)).encode()
    fields = ["host: x", *headers] + ([f"authorization: Bearer {key}"] if key else [])
    if chunked:
        fields.append("transfer-encoding: chunked")
        body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:100], body[100:])) + b"0\r\n\r\n"
    else:
        fields.append(f"content-length: {len(body)}")
    return "\r\n".join([f"POST {COMPATIBLE} HTTP/1.1", *fields, "", ""]).encode() + body


def connect(port: int) -> socket.socket:
    """Connect on loopback."""
    client = socket.create_connection(("127.0.0.1", port), timeout=60)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


class _Kept:
    """A socket that `HTTPResponse` reads without a buffer, so that no byte of the next answer is lost in it."""

    def __init__(self, client: socket.socket) -> None:
        self._client = client

    def makefile(self, _: str) -> Any:
        return self._client.makefile("rb", buffering=0)


def read(client: socket.socket, method: str = "POST") -> tuple[int, bytes]:
    """Return status and body of the next answer."""
    with HTTPResponse(_Kept(client), method=method) as answer:  # type: ignore[arg-type]
        answer.begin()
        return answer.status, answer.read()


def prompt_tokens(answer: tuple[int, bytes]) -> int:
    """Return the clip that an answer describes."""
    status, body = answer
    assert status == 200, body
    tokens: int = json.loads(body)["usage"]["prompt_tokens"]
    return tokens


OFFERS = {
    "h2c": ("Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA"),
    "websocket": (
        "Upgrade: websocket",
        "Connection: keep-alive, Upgrade",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    ),
    "anything": ("upgrade: TLS/1.0, foo/2", "connection: upgrade"),
}


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("segments", ["one", "head and body", "bytes"])
def test_a_request_that_offers_an_upgrade_is_served(
    service: RunningService, offer: str, segments: str, *, chunked: bool
) -> None:
    """A body split at any place is read completely, and so are the requests behind it on the connection."""
    request = post(0.4, *OFFERS[offer], chunked=chunked)
    head = request.index(b"\r\n\r\n") + 4
    cut = {"one": [len(request)], "head and body": [head, len(request)], "bytes": range(1, len(request) + 1)}[segments]
    with connect(int(service.url.rpartition(":")[2])) as client:
        start = 0
        for end in cut:
            client.sendall(request[start:end])
            if segments == "head and body":
                time.sleep(0.1)
            start = end
        assert prompt_tokens(read(client)) == SHORT
        # both further requests in one piece, the second of them with another offer
        client.sendall(post(6) + post(0.4, *OFFERS["h2c"]) + post(6))
        assert [prompt_tokens(read(client)) for _ in range(3)] == [LONG, SHORT, LONG]


def test_a_body_that_looks_like_a_request_is_a_body(service: RunningService) -> None:
    """No part of a body is served, sent with the headers or after them; without a key it is refused like any other."""
    inner = post(0.4)
    body = b"\r\n" * 20_000 + inner
    outer = f"POST {COMPATIBLE} HTTP/1.1\r\nhost: x\r\n{{}}content-length: {len(body)}\r\n\r\n"
    offer = "".join(f"{field}\r\n" for field in OFFERS["h2c"])
    for pause_s in (0, 0.1):
        for fields, status in ((offer, 401), (f"{offer}authorization: Bearer {KEY}\r\n", 400)):
            with connect(int(service.url.rpartition(":")[2])) as client:
                client.sendall(outer.format(fields).encode())
                time.sleep(pause_s)
                client.sendall(body)
                assert read(client)[0] == status
                client.sendall(post(6))
                assert prompt_tokens(read(client)) == LONG


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_offers_without_a_body(service: RunningService, method: str) -> None:
    """The bytes after such a request are the next request; after `connection: close` they are ignored."""
    offer = "\r\n".join(OFFERS["websocket"])
    with connect(int(service.url.rpartition(":")[2])) as client:
        client.sendall(f"{method} /healthz HTTP/1.1\r\nhost: x\r\n{offer}\r\n\r\n".encode() * 2 + post(6))
        for _ in range(2):
            assert read(client, method)[0] == 200
        assert prompt_tokens(read(client)) == LONG
        client.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\nupgrade: h2c\r\nconnection: upgrade, close\r\n\r\n")
        assert read(client)[0] == 200
        assert client.recv(1) == b""


def test_connect_is_refused_and_ends_the_connection(service: RunningService) -> None:
    """CONNECT is refused: the service is no proxy, and the following bytes are for another host."""
    with connect(int(service.url.rpartition(":")[2])) as client:
        client.sendall(b"CONNECT example.com:443 HTTP/1.1\r\nhost: example.com:443\r\n\r\n" + post(0.4))
        received = b""
        while piece := client.recv(65_536):
            received += piece
    assert received.startswith(b"HTTP/1.1 400 ")
    assert received.count(b"HTTP/1.1") == 1


NGINX = """
{user}daemon off; pid {directory}/nginx.pid; error_log {directory}/error.log warn; worker_processes 1;
events {{ worker_connections 64; }}
http {{
  access_log off;
  client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy; fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;
  map $http_upgrade $connection_upgrade {{ default upgrade; '' ''; }}
  upstream captioner {{ server 127.0.0.1:{upstream}; keepalive 1; }}
  server {{
    listen 127.0.0.1:{port}; client_max_body_size 20m;
    location / {{
      proxy_pass http://captioner; proxy_http_version 1.1; proxy_set_header Host $host;
      proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection $connection_upgrade;
    }}
  }}
}}
"""
"""Configuration as ingress controllers write it: the offer is passed on, and connections are shared by all clients."""


def test_behind_nginx_each_client_gets_its_own_answer(service: RunningService, tmp_path: Path) -> None:
    """A client that hides a request in the body of one that offers h2c changes nothing for the next client."""
    port = free_port()
    configuration = tmp_path / "nginx.conf"
    upstream = service.url.rpartition(":")[2]
    user = "user root; " if os.geteuid() == 0 else ""  # another user's worker cannot write to root's directories
    configuration.write_text(NGINX.format(user=user, directory=tmp_path, port=port, upstream=upstream))
    nginx = subprocess.Popen([program("nginx"), "-e", str(tmp_path / "error.log"), "-c", str(configuration)])
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                connect(port).close()
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        for lines in (10, 8000, 12_000, 20_000) * 3:
            body = b"\r\n" * lines + post(0.4)
            head = f"POST {COMPATIBLE} HTTP/1.1\r\nhost: x\r\nupgrade: h2c\r\nconnection: Upgrade\r\n"
            with connect(port) as attacker, connect(port) as victim:
                attacker.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
                assert read(attacker)[0] == 401
                victim.sendall(post(6))
                assert prompt_tokens(read(victim)) == LONG
                attacker.sendall(post(6, key=None))
                assert read(attacker)[0] == 401
    finally:
        nginx.terminate()
        nginx.wait(60)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_the_stock_java_client(service: RunningService, tmp_path: Path, *, stream: bool) -> None:
    """`java.net.http` offers h2c with each first request on http://."""
    body = tmp_path / "body.json"
    body.write_text(json.dumps(compatible_body(data_url(wav(0.4)), stream=stream)))
    source = Path(__file__).with_name("captions.java")
    done = subprocess.run(
        [program("java"), str(source), service.url + COMPATIBLE, KEY, str(body), "3"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    answers = done.stdout.splitlines()
    assert [answer.split(" ", 2)[:2] for answer in answers] == [["200", "HTTP_1_1"]] * 3
    for answer in answers:
        text = answer.split(" ", 2)[2]
        last = [json.loads(text)] if not stream else [event for event in events(text.replace("\\n", "\n")) if event]
        assert last[-1]["usage" if not stream else "choices"]


def test_no_request_is_left_in_progress(service: RunningService) -> None:
    """At the end no request is in progress."""
    service.settle()
    assert httpx.get(service.url + "/healthz").status_code == 200
