"""Raw answers, in the parts that no client reads: paths, methods, headers, and both shapes of errors."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx
import pytest

from tests.sdk.relay import Exchange
from tests.sdk.wire_rules import UUID, events, violations
from tests.support.wire import COMPATIBLE, MODEL, NATIVE, compatible_body, data_url, native_body, wav

if TYPE_CHECKING:
    from tests.sdk.tap import Tap
    from tests.support.service import RunningService

CLIP = data_url(wav(1))
TEXT_GENERATION = "/api/v1/services/aigc/text-generation/generation"
UPLOADS = "/api/v1/uploads"
SSE = {"x-dashscope-sse": "enable"}


class Ask(NamedTuple):
    """A request."""

    method: str
    path: str
    body: Any = None
    headers: dict[str, str] = {}  # noqa: RUF012


NOT_STREAMED = [
    Ask("POST", NATIVE, native_body(CLIP)),
    Ask("POST", NATIVE, {"model": MODEL, "input": native_body(CLIP)["input"]}),
    Ask("POST", NATIVE, native_body(CLIP, stream=True), {"content-type": "text/plain"}),
    Ask("POST", TEXT_GENERATION, native_body(CLIP)),
    Ask("POST", COMPATIBLE, compatible_body(CLIP)),
    Ask("POST", COMPATIBLE, compatible_body(CLIP), {"accept": "text/event-stream"}),
    Ask("POST", "/v1/chat/completions", compatible_body(CLIP)),
    Ask("GET", "/compatible-mode/v1/models"),
    Ask("GET", f"/compatible-mode/v1/models/{MODEL}"),
    Ask("GET", "/v1/models"),
    Ask("GET", f"/v1/models/{MODEL}"),
    Ask("GET", "/api/v1/models"),
    Ask("GET", "/api/v1/models?page_no=2&page_size=1"),
    Ask("GET", f"/api/v1/models/{MODEL}"),
    Ask("GET", f"{UPLOADS}?action=getPolicy&model={MODEL}"),
]
NATIVE_STREAMS = [
    Ask("POST", NATIVE, native_body(CLIP), SSE),
    Ask("POST", NATIVE, native_body(CLIP, incremental_output=True), {"accept": "text/event-stream"}),
    Ask("POST", TEXT_GENERATION, native_body(CLIP), SSE),
]
COMPATIBLE_STREAMS = [
    Ask("POST", COMPATIBLE, compatible_body(CLIP, stream=True), {"accept": "application/json"}),
    Ask("POST", "/v1/chat/completions", compatible_body(CLIP, stream=True, stream_options={"include_usage": True})),
]
REFUSED = [
    (400, Ask("POST", NATIVE)),
    (400, Ask("POST", NATIVE, [])),
    (400, Ask("POST", NATIVE, {"model": ""}, SSE)),
    (400, Ask("GET", NATIVE)),
    (403, Ask("POST", NATIVE, native_body(CLIP), {"x-dashscope-async": "enable"})),
    (400, Ask("POST", NATIVE, native_body(CLIP), {"x-dashscope-encryptionkey": "x"})),
    (400, Ask("POST", NATIVE, native_body("oss://no-header"))),
    (400, Ask("POST", COMPATIBLE)),
    (400, Ask("POST", COMPATIBLE, {"model": None, "stream": True})),
    (404, Ask("POST", COMPATIBLE, compatible_body(CLIP) | {"model": "none"})),
    (405, Ask("GET", COMPATIBLE)),
    (405, Ask("DELETE", "/v1/models")),
    (404, Ask("GET", "/v1/models/none")),
    (400, Ask("GET", "/api/v1/models/none")),
    (400, Ask("GET", "/api/v1/models?page_no=x")),
    (400, Ask("GET", UPLOADS)),
    (400, Ask("GET", f"{UPLOADS}?action=getPolicy&model=none")),
    (400, Ask("POST", "/oss-upload", {})),
    (404, Ask("GET", "/api/v1/public-keys/latest")),
    (404, Ask("GET", "/api/v1/tasks/1")),
    (404, Ask("POST", "/api/v1/tokenizer", {})),
    (404, Ask("GET", "/compatible-mode/v1/files/file-1")),
    (400, Ask("POST", "/v1/audio/transcriptions", {})),
    (404, Ask("GET", "/api-ws/v1/inference")),
    (404, Ask("GET", "/none")),
]


def send(tap: Tap, service: RunningService, ask: Ask) -> Exchange:
    """Send the request; return the recorded answer, which the tap checks against the rules of the wire."""
    content = None if ask.body is None else json.dumps(ask.body).encode()
    url = tap.relay(service).origin + ask.path
    httpx.request(ask.method, url, headers=ask.headers, content=content, timeout=30)
    return tap.exchanges()[-1]


def name(value: Any) -> str:
    """Return the name in test ids."""
    return f"{value.method} {value.path}" if isinstance(value, Ask) else str(value)


@pytest.mark.parametrize("ask", NOT_STREAMED, ids=name)
def test_not_streamed(ask: Ask, tap: Tap, fake_service: RunningService) -> None:
    """Every request for a response that is not streamed gets one."""
    answer = send(tap, fake_service, ask)
    assert (answer.status, answer.is_stream) == (200, False), answer.body


@pytest.mark.parametrize("ask", NATIVE_STREAMS, ids=name)
def test_native_stream(ask: Ask, tap: Tap, fake_service: RunningService) -> None:
    """Every request for a native stream gets one, which ends without `[DONE]`."""
    answer = send(tap, fake_service, ask)
    assert (answer.status, answer.is_stream) == (200, True), answer.body
    assert b"[DONE]" not in answer.body
    assert json.loads(events(answer)[-1]["data"])["output"]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("ask", COMPATIBLE_STREAMS, ids=name)
def test_compatible_stream(ask: Ask, tap: Tap, fake_service: RunningService) -> None:
    """Every request for a compatible stream gets one, which ends with one `[DONE]`."""
    answer = send(tap, fake_service, ask)
    assert (answer.status, answer.is_stream) == (200, True), answer.body
    assert answer.body.count(b"[DONE]") == 1
    assert answer.body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(("status", "ask"), REFUSED, ids=name)
def test_refused(status: int, ask: Ask, tap: Tap, fake_service: RunningService) -> None:
    """A refused request has its status, and the path's shape of errors."""
    answer = send(tap, fake_service, ask)
    assert answer.status == status, answer.body


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
def test_operators_paths(path: str, fake_service: RunningService) -> None:
    """Answers to operators have a request id, too."""
    response = httpx.get(fake_service.url + path)
    assert response.status_code == 200
    assert UUID.fullmatch(response.headers["x-request-id"])


def test_expect_continue(tap: Tap, fake_service: RunningService) -> None:
    """A client that sends `expect: 100-continue` before a large body receives 100 and continues."""
    command = ["curl", "--silent", "--header", "expect: 100-continue", "--json", "@-"]
    body = json.dumps(compatible_body(data_url(wav(60))))
    url = tap.relay(fake_service).origin + COMPATIBLE
    done = subprocess.run([*command, url], input=body, capture_output=True, text=True, check=True)
    assert "60.00 seconds" in json.loads(done.stdout)["choices"][0]["message"]["content"]


ID = "d532f72c-e75b-4ffb-a1ef-d2465e758958"
NATIVE_EVENT = (
    f'id:1\nevent:result\ndata:{{"output":{{"choices":[{{"finish_reason":"stop"}}]}},"request_id":"{ID}"}}\n\n'
)
CHUNK = f'data: {{"choices":[{{"delta":{{"content":""}}}}],"id":"chatcmpl-{ID}"}}\n\n'
ERROR = f'{{"code":"a","message":"b","request_id":"{ID}"}}'


@pytest.mark.parametrize(
    ("status", "path", "body", "rule"),
    [
        (200, NATIVE, NATIVE_EVENT, ""),
        (200, NATIVE, NATIVE_EVENT + "data:[DONE]\n\n", "the stream announces its end"),
        (200, NATIVE, NATIVE_EVENT.replace("id:1", "id:2"), "ids do not count from 1"),
        (200, NATIVE, NATIVE_EVENT.replace('"stop"', '"null"'), "wrong finish_reason"),
        (200, NATIVE, NATIVE_EVENT.replace('{"output"', '{"code":null,"output"'), "code is null"),
        (200, NATIVE, NATIVE_EVENT.replace(ID, ID[::-1]), "another request_id"),
        (200, NATIVE, NATIVE_EVENT.replace("result", "error"), "cannot read the error event"),
        (200, NATIVE, NATIVE_EVENT.replace("stop", "st\u00f6p"), "not plain ASCII"),
        (200, NATIVE, NATIVE_EVENT.replace('"stop"', '"stop"' + " " * 131_072), "a line has 131"),
        (200, COMPATIBLE, CHUNK + "data: [DONE]\n\n", ""),
        (200, COMPATIBLE, CHUNK, "[DONE] is at []"),
        (200, COMPATIBLE, CHUNK + "data: [DONE]\n\ndata: [DONE]\n\n", "[DONE] is at [1, 2]"),
        (200, COMPATIBLE, "event: x\n" + CHUNK + "data: [DONE]\n\n", "other fields than data"),
        (200, COMPATIBLE, CHUNK.replace('""', "null") + "data: [DONE]\n\n", "a delta has no content"),
        (400, NATIVE, ERROR, ""),
        (400, NATIVE, ERROR.replace('"b"', "null"), "message is null"),
        (400, NATIVE, '{"error":{}}', "the error has"),
        (200, NATIVE, f'{{"request_id":"{ID}"}}', "there is no output"),
        (400, COMPATIBLE, ERROR, "the error has"),
    ],
)
def test_the_rules_can_be_broken(status: int, path: str, body: str, rule: str) -> None:
    """The rules of the wire detect each kind of wrong answer."""
    kind = "text/event-stream" if body.startswith(("id:", "data:", "event:")) else "application/json"
    headers = {"x-request-id": ID, "content-type": kind, "transfer-encoding": "chunked"}
    headers |= {"cache-control": "no-cache", "x-accel-buffering": "no"}
    broken = violations(Exchange("POST", path, {}, status, list(headers.items()), body.encode(), complete=True))
    assert rule in " ".join(broken) if rule else broken == []


@pytest.mark.parametrize("missing", ["x-request-id", "content-type", "transfer-encoding", "cache-control"])
def test_a_header_can_be_missed(missing: str) -> None:
    """The rules of the wire detect each missing header."""
    headers = {"x-request-id": ID, "content-type": "text/event-stream", "transfer-encoding": "chunked"}
    headers |= {"cache-control": "no-cache", "x-accel-buffering": "no"}
    kept = [(name, value) for name, value in headers.items() if name != missing]
    broken = violations(Exchange("POST", NATIVE, {}, 200, kept, NATIVE_EVENT.encode(), complete=True))
    assert any(missing in rule for rule in broken)
