"""Caption requests over HTTP: deadlines, heartbeats, overload, bodies, a graceful stop."""

from __future__ import annotations

import concurrent.futures
import json
import socket
import time
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.support.service import RunningService
from tests.support.wire import (
    COMPATIBLE,
    NATIVE,
    ask_compatible,
    ask_native,
    compatible_body,
    data_url,
    events,
    native_body,
    wav,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

CLIP = data_url(wav(1))


@pytest.fixture(scope="module")
def slow_start() -> Iterator[RunningService]:
    """The first token comes after 1.5 s; status lines wait 0.3 s, heartbeats 0.2 s, answers 1 s or (stream) 4 s."""
    flags = ("--first-byte-timeout-s=0.3", "--heartbeat-s=0.2", "--response-timeout-s=1", "--stream-timeout-s=4")
    with RunningService("--engine=fake", "--fake-ttft-s=1.5", *flags) as service:
        yield service


@pytest.fixture(scope="module")
def slow_tokens() -> Iterator[RunningService]:
    """A token each 0.2 s, for 24 tokens; answers end after 1 s, streams after 2 s; two requests at once."""
    flags = ("--response-timeout-s=1", "--stream-timeout-s=2", "--max-concurrent-requests=2")
    with RunningService("--engine=fake", "--fake-tpot-s=0.2", *flags) as service:
        yield service


def test_full_response_at_deadline_is_partial(slow_tokens: RunningService) -> None:
    """A non-streamed response at its deadline has the text so far, as `length`, and a header that says so."""
    for ask in (ask_native, ask_compatible):
        answer = ask(slow_tokens.url, CLIP)
        assert answer.finish_reason == "length"
        assert answer.text
        assert answer.headers["x-dashscope-partialresponse"] == "true"
    assert slow_tokens.metric("captioner_requests_total", code="partial") >= 2


def test_stream_at_deadline_ends_as_length(slow_tokens: RunningService) -> None:
    """A stream at its deadline ends with its epilogue, as `length`."""
    body = compatible_body(CLIP, stream=True, stream_options={"include_usage": True})
    response = httpx.post(slow_tokens.url + COMPATIBLE, json=body, timeout=30)
    chunks = events(response.text)
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert 1 <= chunks[-1]["usage"]["completion_tokens"] < 24
    assert response.text.endswith("data: [DONE]\n\n")


def test_nothing_generated_in_time(slow_start: RunningService) -> None:
    """A non-streamed response without any token at its deadline is an error that must not be retried."""
    native = httpx.post(slow_start.url + NATIVE, json=native_body(CLIP), timeout=30)
    assert (native.status_code, native.json()["code"]) == (500, "RequestTimeOut")
    assert native.headers["x-should-retry"] == "false"
    compatible = httpx.post(slow_start.url + COMPATIBLE, json=compatible_body(CLIP), timeout=30)
    assert (compatible.status_code, compatible.json()["error"]["code"]) == (500, "request_timeout")


@pytest.mark.parametrize("path", [NATIVE, COMPATIBLE])
def test_stream_beats_before_the_first_token(slow_start: RunningService, path: str) -> None:
    """A stream sends its status line after `first_byte_timeout_s`, and keep-alives until the first token."""
    body = native_body(CLIP) if path == NATIVE else compatible_body(CLIP, stream=True)
    began = time.monotonic()
    with httpx.stream(
        "POST", slow_start.url + path, json=body, headers={"x-dashscope-sse": "enable"}, timeout=30
    ) as response:
        opened_s = time.monotonic() - began
        text = "".join(response.iter_text())
    assert response.status_code == 200
    assert 0.25 < opened_s < 1.4
    before, _, after = text.partition("data:")
    assert before.count(": keep-alive\n\n") >= 3
    assert "keep-alive" in after or len(events(text)) > 1


def test_error_after_the_status_line_is_an_event() -> None:
    """An error after the first heartbeat ends the stream as the dialect's own error event."""
    flags = ("--fake-ttft-s=30", "--first-byte-timeout-s=0.1", "--stream-timeout-s=3")
    with RunningService("--engine=fake", *flags) as service:
        native = httpx.post(
            service.url + NATIVE, json=native_body(CLIP), headers={"x-dashscope-sse": "enable"}, timeout=30
        )
        compatible = httpx.post(service.url + COMPATIBLE, json=compatible_body(CLIP, stream=True), timeout=30)
    assert native.status_code == compatible.status_code == 200
    assert "event:error\nstatus:500\n:HTTP_STATUS/500\ndata:" in native.text
    assert events(native.text)[-1]["code"] == "RequestTimeOut"
    assert events(compatible.text)[-1]["error"]["code"] == "request_timeout"
    assert "[DONE]" not in native.text + compatible.text


def test_overload_has_retry_after(slow_tokens: RunningService) -> None:
    """A request over the limit of concurrent requests is refused at once, with the time of a retry."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = [pool.submit(ask_native, slow_tokens.url, CLIP) for _ in range(2)]
        while slow_tokens.metric("captioner_engine_running") < 2:
            time.sleep(0.02)
        refused = httpx.post(slow_tokens.url + NATIVE, json=native_body(CLIP), timeout=30)
        assert all(future.result().text for future in running)
    assert (refused.status_code, refused.json()["code"]) == (503, "ModelServingError")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert ask_native(slow_tokens.url, CLIP).text


def test_body_over_the_cap(fake_service: RunningService) -> None:
    """A body over the limit is read to its end and answered 413 in the dialect."""
    body = b'{"model":"' + b"x" * (17 * 1024 * 1024)
    native = httpx.post(fake_service.url + NATIVE, content=body, timeout=30)
    assert (native.status_code, native.json()["code"]) == (413, "BadRequest.TooLarge")
    compatible = httpx.post(fake_service.url + COMPATIBLE, content=body, timeout=30)
    assert (compatible.status_code, compatible.json()["error"]["code"]) == (413, "request_too_large")
    fake_service.settle()


def test_body_memory_is_bounded() -> None:
    """Bodies that together exceed the memory for bodies are refused as overload, and the memory is released."""
    with RunningService("--engine=fake", f"--max-body-memory-bytes={4 * 2**20}") as service:
        host, port = service.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as stuck:
            stuck.sendall(f"POST {NATIVE} HTTP/1.1\r\nhost: x\r\ncontent-length: 4000000\r\n\r\n".encode())
            stuck.sendall(b" " * 3_500_000)
            while service.metric("captioner_body_bytes") < 3_500_000:
                time.sleep(0.02)
            refused = httpx.post(service.url + NATIVE, content=b" " * 1_000_000, timeout=30)
            assert (refused.status_code, refused.json()["code"]) == (503, "ModelServingError")
        service.settle()
        assert ask_native(service.url, CLIP).text


def test_graceful_stop_finishes_requests_in_progress() -> None:
    """A stream in progress when the service is stopped runs to its end; then the service exits with 0."""
    with RunningService("--engine=fake", "--fake-tpot-s=0.1") as service:
        body = compatible_body(CLIP, stream=True)
        with httpx.stream("POST", service.url + COMPATIBLE, json=body, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            service.process.terminate()
            rest = list(lines)
        assert rest[-2] == "data: [DONE]"
        assert json.loads(rest[-4].removeprefix("data: "))["choices"][0]["finish_reason"] == "stop"
        assert service.process.wait(timeout=30) == 0
