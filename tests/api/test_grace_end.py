"""Requests that still run when the grace of a stop is over end with their dialect's error, and are not billed."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from contextlib import ExitStack

from tests.api.test_connections import connect, read_all
from tests.support.service import RunningService
from tests.support.wire import COMPATIBLE, NATIVE, compatible_body, data_url, native_body, wav

CLIP = data_url(wav(0.4))


def post(path: str, body: dict[str, object], *fields: str) -> bytes:
    """Return a request as bytes for the wire."""
    content = json.dumps(body).encode()
    head = "".join(f"{field}\r\n" for field in (f"POST {path} HTTP/1.1", "host: x", *fields))
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


def test_requests_past_the_grace_end_with_an_error() -> None:
    """Streams of both dialects end with their error event, full answers with 503; all are recorded as cancelled."""
    flags = ("--engine=fake", "--audio-workers=1", "--fake-tpot-s=0.02", "--fake-tokens=30000")
    with RunningService(*flags, "--shutdown-grace-s=0.5") as service, ExitStack() as stack:
        requests = [
            post(COMPATIBLE, compatible_body(CLIP, stream=True)),
            post(NATIVE, native_body(CLIP, incremental_output=True), "x-dashscope-sse: enable"),
            post(NATIVE, native_body(CLIP), "x-dashscope-sse: enable"),
            post(COMPATIBLE, compatible_body(CLIP)),
            post(NATIVE, native_body(CLIP)),
        ]
        clients = [stack.enter_context(connect(service)) for _ in requests]
        for client, request in zip(clients, requests, strict=True):
            client.sendall(request)
        for client in clients[:3]:
            assert client.recv(4096).startswith(b"HTTP/1.1 200")
        time.sleep(0.5)
        began = time.monotonic()
        service.process.terminate()
        answers = [read_all(client).decode() for client in clients]
        assert service.process.wait(30) == 0
        assert time.monotonic() - began < 15
        log = service.log()
        with contextlib.closing(sqlite3.connect(service.data / "captioner.db")) as database:
            records = database.execute("select ending, billed, amount_nanos from usage_records").fetchall()
    for answer in answers[:3]:
        assert answer.endswith("\r\n0\r\n\r\n"), answer[-500:]
    error = '"message":"Model is unavailable, please try again later."'
    assert (
        f'data: {{"error":{{{error},"type":"service_unavailable","param":null,"code":"model_unavailable"}}}}\n\n'
        in answers[0]
    )
    for answer in answers[1:3]:
        assert "\nevent:error\nstatus:503\n:HTTP_STATUS/503\n" in answer
        assert f'data:{{"code":"ModelUnavailable",{error},' in answer
    for answer in answers[3:]:
        assert answer.startswith("HTTP/1.1 503 ")
        assert "retry-after: 10" in answer
        assert error in answer
    assert sorted(records) == [("cancelled", 0, 0)] * 5
    assert "Traceback" not in log
