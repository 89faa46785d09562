"""Clients that hold a connection and do not cooperate are disconnected, and hold nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from contextlib import asynccontextmanager
from http.client import HTTPResponse
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import psutil
import pytest
from sqlalchemy import create_engine

from serving.api.caption_endpoint import CaptionEndpoint
from serving.api.dialects.dashscope import DashScopeCodec
from serving.config import Settings
from serving.engine.admission_control import AdmissionControl
from serving.engine.fake import FakeEngine
from serving.observability.metrics import Metrics
from serving.pipeline import CaptionPipeline
from serving.scheduling.shared_capacity import SharedCapacity
from serving.tenancy.idempotency import IdempotentAnswers
from serving.tenancy.usage_session import UsageSessions
from serving.timeline.captions import Timelines
from serving.types import Caller, Features, SchedulingClass
from tests.support.service import RunningService
from tests.support.wire import COMPATIBLE, ask_native, compatible_body, data_url, native_body, wav

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from starlette.types import Message

CLIP = data_url(wav(1))


def connect(service: RunningService, *, receive_buffer: int | None = None) -> socket.socket:
    """Connect to the service, with a small receive buffer here if `receive_buffer` is given."""
    host, port = service.url.removeprefix("http://").split(":")
    client = socket.socket()
    if receive_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.settimeout(60)
    client.connect((host, int(port)))
    return client


def status(client: socket.socket) -> int:
    """Read one response to its end; return its status."""
    with HTTPResponse(client) as answer:
        answer.begin()
        answer.read()
        return answer.status


def until(condition: Any, *, within_s: float = 60) -> None:
    """Wait for the condition."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# Clients that do not complete their request headers


def test_incomplete_headers_end_the_connection() -> None:
    """Silence and partial headers, first or second, end the connection; a slow body or an idle pause does not."""
    with RunningService("--engine=fake", "--header-timeout-s=1") as service:
        headers = b"GET /healthz HTTP/1.1\r\nhost: x\r\n"
        with connect(service) as silent, connect(service) as slow, connect(service) as second, connect(service) as fair:
            slow.sendall(headers)
            second.sendall(headers + b"\r\n")
            assert status(second) == 200
            second.sendall(headers)
            began = time.monotonic()
            fair.sendall(f"POST {COMPATIBLE} HTTP/1.1\r\nhost: x\r\ncontent-length: 20\r\n\r\n".encode())
            for client in (silent, slow, second):
                with contextlib.suppress(ConnectionResetError):
                    assert client.recv(4096) == b""
            assert 0.5 < time.monotonic() - began < 30
            for _ in range(20):
                time.sleep(0.1)
                fair.sendall(b" ")
            assert status(fair) == 400
            time.sleep(1.5)
            fair.sendall(headers + b"\r\n")
            assert status(fair) == 200


# Clients that do not read


def test_a_client_that_stops_reading_is_disconnected() -> None:
    """A stream that the client does not read ends as after a disconnect, and its connection is closed; others go on."""
    flags = ("--fake-tpot-s=0.001", "--fake-tokens=30000", f"--fake-text={'x' * 4000}", "--write-timeout-s=1")
    with RunningService("--engine=fake", *flags) as service:
        process = psutil.Process(service.process.pid)
        body = json.dumps(compatible_body(CLIP, stream=True)).encode()
        headers = f"POST {COMPATIBLE} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        with connect(service, receive_buffer=4096) as stalled:
            stalled.sendall(headers + body)
            assert stalled.recv(4096).startswith(b"HTTP/1.1 200")
            port = stalled.getsockname()[1]
            until(lambda: service.metric("captioner_requests_total", outcome="disconnected"))
            until(lambda: port not in {peer.raddr.port for peer in process.net_connections() if peer.raddr})
            service.settle()
        assert service.metric("captioner_requests_total", code="disconnected") == 1
        assert "without completing response" not in service.log()
        assert ask_native(service.url, CLIP, max_tokens=5).text


class _Workers:
    """Audio workers that need no audio."""

    @asynccontextmanager
    async def prepare(self, _clip: object, _share: SchedulingClass) -> AsyncIterator[SimpleNamespace]:
        features = Features(np.zeros((128, 100), np.float32), 16_000)
        yield SimpleNamespace(features=features, queue_s=0, decode_s=0, features_s=0)


@pytest.mark.parametrize("silent_engine", [False, True], ids=["events", "heartbeats"])
async def test_slots_are_released_under_any_server(tmp_path: Path, *, silent_engine: bool) -> None:
    """Under a server whose `send` never returns, neither events nor keep-alives hold a slot in the engine."""
    settings = Settings(
        data_dir=tmp_path,
        engine="fake",
        fake_tokens=1000,
        fake_tpot_s=60 if silent_engine else 0.001,
        stream_flush_interval_s=0,
        heartbeat_s=0.05,
        first_byte_timeout_s=0.05,
        write_timeout_s=0.2,
    )
    engine, metrics = AdmissionControl(FakeEngine(settings), settings), Metrics()
    pipeline: Any = CaptionPipeline(settings, engine, _Workers(), None, None)  # type: ignore[arg-type]
    keys: Any = SimpleNamespace(authenticate=lambda _: Caller("someone", "key"))
    usage_sessions: Any = UsageSessions(None, None, None, metering=False)  # type: ignore[arg-type]
    codec = DashScopeCodec(settings)
    timelines = Timelines(pipeline, settings)
    bodies, answers = SharedCapacity(10**9), IdempotentAnswers(create_engine("sqlite://"))
    endpoint = CaptionEndpoint(codec, pipeline, timelines, keys, usage_sessions, metrics, bodies, settings, answers)
    body = [json.dumps(native_body(CLIP)).encode()]
    sent: list[Message] = []

    async def receive() -> Message:
        if body:
            return {"type": "http.request", "body": body.pop(), "more_body": False}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)
        if len(sent) > 2:
            await asyncio.Event().wait()

    scope = {"type": "http", "headers": [(b"x-dashscope-sse", b"enable")], "state": {"request_id": "r"}}
    await engine.start()
    try:
        async with asyncio.timeout(30):
            await endpoint(scope, receive, send)
        assert (engine.load.running, engine.load.kv_tokens, pipeline.in_flight) == (0, 0, 0)
    finally:
        await engine.stop()
    exposed, _ = await metrics.expose(engine.check_health, "")
    assert b'captioner_requests_total{code="disconnected",dialect="dashscope",outcome="disconnected"} 1.0' in exposed


# Header limits


def read_all(client: socket.socket) -> bytes:
    """Read everything until the service closes."""
    received = b""
    while piece := client.recv(65_536):
        received += piece
    return received


@pytest.mark.parametrize(
    "headers",
    [
        b"GET /healthz?" + b"x" * 70_000,
        b"GET /healthz HTTP/1.1\r\nx: " + b"x" * 70_000,
        b"GET /healthz HTTP/1.1\r\nx: " + b"x" * 70_000 + b"\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n" + b"x: y\r\n" * 30_000 + b"\r\n",
    ],
    ids=["url", "header", "one piece", "headers"],
)
def test_headers_are_bounded(fake_service: RunningService, headers: bytes) -> None:
    """A request line or headers over 64 KiB are refused, whether they ever end or not, and other clients are served."""
    with connect(fake_service) as client:
        client.sendall(headers)
        ended = headers.endswith(b"\r\n\r\n")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(0 if ended else 200):
                client.sendall(b"x" * 4096)
        answer = read_all(client)
    assert answer.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
    fields, _, body = answer.partition(b"\r\n\r\n")
    assert b"\r\nconnection: close" in fields
    error = json.loads(body)
    assert error["message"] == "Request line and header fields are too large."
    assert f"x-request-id: {error['request_id']}" in fields.decode()
    assert httpx.get(fake_service.url + "/healthz").status_code == 200


def test_trailers_are_bounded(fake_service: RunningService) -> None:
    """An endless trailer ends the connection, as its request can never be complete."""
    with connect(fake_service) as client:
        client.sendall(
            f"POST {COMPATIBLE} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{{\r\n0\r\nx: ".encode()
        )
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            client.sendall(b"x" * (64 * 2**20))
    fake_service.settle()


def test_large_headers_and_bodies_pass_on_one_connection(fake_service: RunningService) -> None:
    """Headers just below the limit pass, in one piece or in many, one after the other, with bodies far beyond it."""
    body = json.dumps(compatible_body(data_url(wav(60)))).encode()
    assert len(body) > 2_000_000
    padding = b"x" * 60_000
    headers = b"POST %s HTTP/1.1\r\nhost: x\r\nx-padding: %s\r\ncontent-length: %d\r\n\r\n"
    request = headers % (COMPATIBLE.encode(), padding, len(body)) + body
    chunk = b"%x\r\n%s\r\n" % (len(body), body)
    chunked = headers.replace(b"content-length: %d", b"transfer-encoding: chunked") % (COMPATIBLE.encode(), padding)
    last = b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    with connect(fake_service) as client:
        for start in range(0, 60_000, 5000):  # the headers in pieces
            client.sendall(request[start : start + 5000])
            time.sleep(0.01)
        client.sendall(request[60_000:] + request + chunked + chunk + b"0\r\n\r\n" + last)  # the others in a pipeline
        answer = read_all(client)
    assert answer.count(b"HTTP/1.1 200 OK\r\n") == 4
    assert answer.count(b"HTTP/1.1") == 4


def test_a_response_in_progress_is_completed(fake_service: RunningService) -> None:
    """Endless headers behind a request in progress end the connection, but only after that request's response."""
    body = json.dumps(compatible_body(CLIP)).encode()
    headers = f"POST {COMPATIBLE} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with connect(fake_service) as client:
        client.sendall(headers + body + b"GET /healthz HTTP/1.1\r\nx: " + b"x" * 200_000)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(b"x" * 400_000)
        answer = read_all(client)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b'"finish_reason":"stop"' in answer
