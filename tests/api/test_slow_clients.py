"""Clients that send slowly, or not at all, keep no other client out, and a stop does not wait for them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import httpx
import pytest

from serving.api.connections import Connections
from serving.api.request_body import LEAST_RATE_BYTES_S, Body
from serving.config import Settings
from serving.errors import BodyTimeout
from tests.api.test_connections import connect, read_all, status, until
from tests.support.service import RunningService
from tests.support.wire import COMPATIBLE, NATIVE, compatible_body, data_url, wav

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.types import Message

KEY = "sk-one"
FLAGS = ("--engine=fake", "--audio-workers=1", f"--api-keys={KEY}")


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    """A service that requires a key."""
    with RunningService(*FLAGS) as running:
        yield running


def unfinished(path: str = COMPATIBLE, *, key: str = "", length: int = 16_000_000, fields: str = "") -> bytes:
    """Return a request whose body never ends."""
    key = f"authorization: Bearer {key}\r\n" if key else ""
    return f"POST {path} HTTP/1.1\r\nhost: x\r\n{key}{fields}content-length: {length}\r\n\r\n{{".encode()


@pytest.mark.parametrize(
    ("path", "fields", "expected"),
    [
        (COMPATIBLE, "", 401),
        (NATIVE, "", 401),
        (NATIVE, "connection: close\r\n", 401),
        (COMPATIBLE, "authorization: Bearer sk-wrong\r\n", 401),
        (COMPATIBLE, "expect: 100-continue\r\n", 401),
        ("/v1/models", "", 405),
        ("/nowhere", "", 404),
        ("/oss-upload", "content-type: text/plain\r\n", 400),
    ],
)
def test_strangers_are_answered_at_once(service: RunningService, path: str, fields: str, expected: int) -> None:
    """A body without a key is not waited for: the answer comes at once, and seconds later the connection is closed."""
    with connect(service) as client:
        began = time.monotonic()
        client.sendall(unfinished(path, fields=fields))
        assert status(client) == expected
        assert time.monotonic() - began < 1
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # it is closed although it goes on sending
            while time.monotonic() - began < 20:
                time.sleep(0.1)
                client.sendall(b" ")
        assert 1 < time.monotonic() - began < 10
    service.settle()


def test_a_large_body_with_a_wrong_key_is_answered(service: RunningService) -> None:
    """A client that sends ten megabytes before it reads gets its 401, and its connection stays usable."""
    body = compatible_body(data_url(bytes(7_000_000)))
    with httpx.Client(base_url=service.url, timeout=60) as client:
        for _ in range(3):
            answer = client.post(COMPATIBLE, json=body, headers={"authorization": "Bearer sk-wrong"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        body = compatible_body(data_url(wav(0.4)))
        assert client.post(COMPATIBLE, json=body, headers={"authorization": f"Bearer {KEY}"}).status_code == 200


def test_a_known_caller_has_a_deadline_that_grows() -> None:
    """A body at a byte each 50 ms is refused after `body_timeout_s`; one that is fast enough is read for longer."""
    with RunningService(*FLAGS, "--body-timeout-s=1") as service:
        body = json.dumps(compatible_body(data_url(wav(3)))).encode()
        head = f"POST {COMPATIBLE} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
        with connect(service) as slow, connect(service) as fair:
            began = time.monotonic()
            slow.sendall(unfinished(key=KEY))
            fair.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode())
            for start in range(0, len(body), 4096):  # 40 kB/s, for 3 s
                fair.sendall(body[start : start + 4096])
                time.sleep(0.1)
                if time.monotonic() - began < 1:
                    slow.sendall(b" ")
            assert time.monotonic() - began > 2
            assert status(fair) == 200
            answer = read_all(slow)
            assert answer.startswith(b"HTTP/1.1 400 ")
            assert b"did not arrive" in answer
        service.settle()
        assert service.metric("captioner_requests_total", code="body_timeout") == 1


async def test_each_byte_extends_the_deadline() -> None:
    """The deadline is `body_timeout_s`, and a second for each 8 KiB that has arrived."""
    settings = Settings(engine="fake", body_timeout_s=0.2)
    sent = 0

    async def receive() -> Message:
        nonlocal sent
        await asyncio.sleep(0.05)
        sent += 1
        return {"type": "http.request", "body": b"x" * size, "more_body": True}

    async def read_for(most_pieces: int) -> None:
        body = Body(receive, settings)
        async for _ in body:
            if sent >= most_pieces:
                return

    size = LEAST_RATE_BYTES_S // 10
    await read_for(20)  # twice the least rate, for five times the time that it would have without
    sent, size = 0, LEAST_RATE_BYTES_S // 100
    with pytest.raises(BodyTimeout):
        await read_for(20)
    assert sent < 10


def test_no_descriptor_is_left_for_nobody() -> None:
    """At the limit of descriptors new connections replace those without a complete request; one line says so."""
    with RunningService(*FLAGS, "--header-timeout-s=600", "--body-timeout-s=600") as service, ExitStack() as stack:
        resource.prlimit(service.process.pid, resource.RLIMIT_NOFILE, (300, 300))
        answered = json.dumps(compatible_body(data_url(wav(0.4)))).encode()
        head = f"POST {COMPATIBLE} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
        request = f"{head}content-length: {len(answered)}\r\n\r\n".encode() + answered
        for data in (b"", b"GET /", unfinished(), unfinished(key=KEY), b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"):
            for _ in range(280):
                client = stack.enter_context(connect(service))
                with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                    client.sendall(data)
            time.sleep(1)  # all of them are accepted
            with connect(service) as client:
                client.sendall(request)
                assert status(client) == 200
        assert service.metric("captioner_connections_refused_total", reason="evicted") > 500
        assert service.metric("captioner_connections_refused_total", reason="descriptors") == 0
        assert 100 < service.metric("captioner_connections") < 300
        assert service.metric("process_open_fds") < 300
        lines = [line for line in service.log().splitlines() if "connections refused" in line]
        assert len(lines) == 1
        assert json.loads(lines[0])["limit"] == 300


def test_connections_with_running_requests_are_not_closed() -> None:
    """A new connection is refused with 503 while all others have a running request, and those go on."""
    flags = ("--fake-tpot-s=0.05", "--fake-tokens=10000", "--max-num-seqs=400", "--max-concurrent-requests=400")
    with RunningService(*FLAGS, *flags) as service, ExitStack() as stack:
        resource.prlimit(service.process.pid, resource.RLIMIT_NOFILE, (160, 160))
        body = json.dumps(compatible_body(data_url(wav(0.4)), stream=True)).encode()
        head = f"POST {COMPATIBLE} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
        streams = []
        while True:
            client = stack.enter_context(connect(service))
            client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            if not client.recv(4096).startswith(b"HTTP/1.1 200"):
                break
            streams.append(client)
            assert len(streams) < 160
        assert len(streams) > 40
        with connect(service) as refused:
            assert b" 503 " in refused.recv(4096)[:20]
        for stream in streams:
            assert stream.recv(4096)


def test_addresses_have_a_limit() -> None:
    """An address, or an IPv6 network of one customer, has a number of connections; loopback and proxies have none."""
    settings = Settings(engine="fake", max_connections_per_address=3, trusted_proxies="127.0.0.0/8,10.1.0.0/16,fd00::1")
    connections = Connections(settings)

    class Opened:
        def evict(self) -> None:
            raise AssertionError

    def add(host: str | None) -> str | None:
        opened.append(Opened())
        return connections.add(opened[-1], host, 10)

    opened: list[Opened] = []
    for hosts in (
        ["192.0.2.1"] * 4,
        ["2001:db8::1", "2001:db8::2", "2001:db8:0:0:ffff::", "2001:db8::3"],
        ["::ffff:192.0.2.2", "192.0.2.2", "192.0.2.2", "192.0.2.2"],
    ):
        assert [add(host) for host in hosts] == [None, None, None, "address"], hosts
    for host in ("127.0.0.1", "::1", "10.1.2.3", "fd00::1", None, "::ffff:10.1.0.1"):
        assert {add(host) for _ in range(20)} == {None}, host
    assert connections.refused["address"] == 3
    connections.discard(opened[0])
    connections.discard(opened[0])
    connections.discard(opened[3])
    assert [add("192.0.2.1") for _ in range(2)] == [None, "address"]
    assert connections.open == len(opened) - 2
    default = Connections(Settings(engine="fake", max_concurrent_requests=4))
    assert [default.add(Opened(), "192.0.2.1", 10) for _ in range(9)] == [None] * 8 + ["address"]
    behind = Connections(settings, behind_proxy=True)
    assert {behind.add(Opened(), "192.0.2.9", 10) for _ in range(20)} == {None}


def test_a_refused_address_is_answered() -> None:
    """A connection over the limit of its address gets 503 in JSON; after another has closed, the next is served."""
    own = _own_address()
    if own is None:
        pytest.skip("this machine has no address but loopback")
    with RunningService(*FLAGS, "--host=0.0.0.0", "--max-connections-per-address=5") as service, ExitStack() as stack:
        port = int(service.url.rpartition(":")[2])
        held = [stack.enter_context(socket.create_connection((own, port), timeout=30)) for _ in range(5)]
        with socket.create_connection((own, port), timeout=30) as sixth:
            answer = read_all(sixth)
        assert answer.startswith(b"HTTP/1.1 503 ")
        fields, _, body = answer.partition(b"\r\n\r\n")
        assert b"retry-after: 5" in fields
        assert json.loads(body)["error"]["code"] == "service_unavailable"
        held[0].close()
        until(lambda: httpx.get(f"http://{own}:{port}/healthz").status_code == 200)


def _own_address() -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        host: str = probe.getsockname()[0]
    return None if host.startswith("127.") else host


def test_a_stop_does_not_wait_for_bodies() -> None:
    """Incomplete heads and bodies end at once when the service stops; a running caption is completed."""
    flags = ("--fake-tpot-s=0.02", "--fake-tokens=100", "--shutdown-grace-s=60")
    with RunningService(*FLAGS, *flags) as service, ExitStack() as stack:
        slow = [stack.enter_context(connect(service)) for _ in range(4)]
        for client, data in zip(slow, (unfinished(key=KEY), unfinished(), b"GET /heal", b""), strict=True):
            client.sendall(data)
        body = json.dumps(compatible_body(data_url(wav(0.4)), stream=True)).encode()
        running = stack.enter_context(connect(service))
        head = f"POST {COMPATIBLE} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
        running.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        assert running.recv(4096).startswith(b"HTTP/1.1 200")
        began = time.monotonic()
        service.process.terminate()
        assert b" 503 " in read_all(slow[0])[:20]
        for client in slow[1:]:
            read_all(client)
        assert time.monotonic() - began < 1.5
        assert read_all(running).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert service.process.wait(30) == 0
        assert time.monotonic() - began < 15
