"""Heads of requests that contradict themselves are refused in the dialect, and proxies are believed if trusted."""

from __future__ import annotations

import json
import re
from http.client import HTTPResponse
from typing import TYPE_CHECKING, Any

import pytest
from starlette.requests import Request

from serving.api.forwarding import Origins
from serving.config import Settings
from tests.api.test_connections import connect, read_all
from tests.support.service import RunningService
from tests.support.wire import COMPATIBLE, MODEL, NATIVE, compatible_body, data_url, native_body, wav

if TYPE_CHECKING:
    from collections.abc import Iterator

KEY = "sk-one"
CLIP = data_url(wav(0.4))


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    """A service with two keys of one tenant."""
    with RunningService("--engine=fake", "--audio-workers=1", f"--api-keys={KEY},sk-two") as running:
        yield running


def post(path: str, *fields: str, version: str = "1.1", body: dict[str, object] | None = None) -> bytes:
    """Return a request with a key, which ends its connection, with these fields in addition."""
    body = body or (native_body(CLIP) if path == NATIVE else compatible_body(CLIP))
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/{version}", f"authorization: Bearer {KEY}", *fields, f"content-length: {len(content)}"]
    return "\r\n".join([*lines, "connection: close", "", ""]).encode("latin-1") + content


def answer(service: RunningService, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers and body of the response."""
    with connect(service) as client:
        client.sendall(request)
        with HTTPResponse(client) as response:
            response.begin()
            headers = {name.lower(): value for name, value in response.getheaders()}
            return response.status, headers, response.read()


def assert_refused(service: RunningService, request: bytes, message: str, *, native: bool, status: int = 400) -> None:
    """Assert that the request is refused with this message in the dialect, with a request id."""
    code, headers, content = answer(service, request)
    assert code == status, content
    assert headers["content-type"] == "application/json"
    assert headers["connection"] == "close"
    body = json.loads(content)
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", headers["x-request-id"])
    assert body["request_id"] == headers["x-request-id"]
    error = body if native else body["error"]
    assert (error["message"], error["code"]) == (
        message,
        "InvalidParameter" if native else "invalid_parameter_error",
    )


@pytest.mark.parametrize("path", [COMPATIBLE, "/v1/chat/completions", NATIVE])
@pytest.mark.parametrize(
    "field",
    [
        "authorization: Bearer sk-two",
        f"Authorization: Bearer {KEY}",
        "AUTHORIZATION:",
        "content-type: a\r\ncontent-type: b",
        "x-dashscope-sse: enable\r\nx-dashscope-sse: disable",
        "x-dashscope-ossresourceresolve: enable\r\nX-DashScope-OssResourceResolve: enable",
        "content-encoding: identity\r\ncontent-encoding: gzip",
    ],
)
def test_repeated_fields_are_refused(service: RunningService, path: str, field: str) -> None:
    """Fields that are read once must not be repeated, on caption paths as on others."""
    name = field.partition(":")[0].lower()
    assert_refused(
        service, post(path, "host: x", field), f"The header {name} must not be repeated.", native=path == NATIVE
    )


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models",
        "/api/v1/models",
        f"/api/v1/uploads?action=getPolicy&model={MODEL}",
        "/metrics",
        "/healthz",
        "/none",
    ],
)
def test_two_keys_are_refused_on_every_path(service: RunningService, path: str) -> None:
    """Nowhere does the first or the last of two keys count."""
    for keys in ((KEY, "sk-wrong"), ("sk-wrong", KEY), (KEY, KEY)):
        fields = "".join(f"authorization: Bearer {key}\r\n" for key in keys)
        assert_refused(
            service,
            f"GET {path} HTTP/1.1\r\nhost: x\r\n{fields}\r\n".encode(),
            "The header authorization must not be repeated.",
            native=not path.startswith("/v1/"),
        )


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(
    ("fields", "version", "message"),
    [
        (("transfer-encoding: gzip, chunked",), "1.1", "The only transfer-encoding is chunked."),
        (("transfer-encoding: gzip",), "1.1", "The only transfer-encoding is chunked."),
        (("transfer-encoding: chunked, chunked",), "1.1", "Invalid HTTP request received."),
        (("transfer-encoding: chunked;q=1",), "1.1", "The only transfer-encoding is chunked."),
        (("transfer-encoding: identity",), "1.1", "The only transfer-encoding is chunked."),
        (("transfer-encoding: chunked",), "1.0", "HTTP/1.0 has no transfer-encoding."),
        (("transfer-encoding: chunked",) * 2, "1.1", "Invalid HTTP request received."),
    ],
)
def test_chunked_is_the_only_transfer_encoding(
    service: RunningService, fields: tuple[str, ...], version: str, message: str, *, native: bool
) -> None:
    """A body in another coding is refused instead of read as if it had none, and none of it is the next request."""
    path = NATIVE if native else COMPATIBLE
    head = "".join(f"{field}\r\n" for field in (f"POST {path} HTTP/{version}", "host: x", *fields))
    chunk = b"1c\r\nGET /v1/models HTTP/1.1\r\n\r\n\r\n0\r\n\r\n"
    with connect(service) as client:
        client.sendall(f"{head}\r\n".encode() + chunk)
        answered = read_all(client)
    assert answered.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert answered.count(b"HTTP/1.1 ") == 1
    assert message.encode() in answered
    assert b"\r\nconnection: close\r\n" in answered


def test_trailers_are_no_headers(service: RunningService) -> None:
    """A key or a parameter after the body does not count, nor does it make a field repeated."""
    body = json.dumps(compatible_body(CLIP)).encode()
    head = f"POST {COMPATIBLE} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n"
    chunks = b"%x\r\n%s\r\n0\r\nauthorization: Bearer %s\r\nhost: y\r\n\r\n" % (len(body), body, KEY.encode())
    assert answer(service, f"{head}\r\n".encode() + chunks)[0] == 401
    assert answer(service, f"{head}authorization: Bearer {KEY}\r\n\r\n".encode() + chunks)[0] == 200


@pytest.mark.parametrize("path", [COMPATIBLE, NATIVE])
def test_hosts(service: RunningService, path: str) -> None:
    """HTTP/1.1 requires one host that is a host; HTTP/1.0 requires none, and has no second one either."""
    native = path == NATIVE
    missing, repeated = "The header host is missing.", "The header host must not be repeated."
    assert_refused(service, post(path), missing, native=native)
    assert_refused(service, post(path, "host: a", "host: a"), repeated, native=native)
    assert_refused(service, post(path, "host: a", "Host: b", version="1.0"), repeated, native=native)
    for host in (
        "[",
        "a, b",
        "a/b",
        "user@a",
        "a b",
        "a?b",
        "a#b",
        "\xff",
        "a:b",
        "a:123456",
        "http://a",
        "[::1",
        'a"',
    ):
        assert_refused(service, post(path, f"host: {host}"), "The header host is not a host.", native=native)
    for host in ("a", "a.b-c_d:80", "[::1]", "[::1]:8000", "127.0.0.1", "x:"[:1], ""):
        assert answer(service, post(path, f"host: {host}"))[0] == 200, host
    assert answer(service, post(path, version="1.0"))[0] == 200


def test_http_1_0_has_no_chunks(service: RunningService) -> None:
    """A stream for HTTP/1.0 is its events until the connection ends, and no `100 Continue` comes before it."""
    for path, fields, body in (
        (COMPATIBLE, (), compatible_body(CLIP, stream=True, max_tokens=5)),
        (NATIVE, ("x-dashscope-sse: enable",), native_body(CLIP, max_tokens=5)),
    ):
        with connect(service) as client:
            client.sendall(post(path, "expect: 100-continue", *fields, version="1.0", body=body))
            head, _, events = read_all(client).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"transfer-encoding" not in head
        assert b"content-length" not in head
        assert b"\r\nconnection: close" in head
        assert events.startswith((b"data: {", b"id:1\n"))
        assert events.endswith(b"}\n\n" if path == NATIVE else b"data: [DONE]\n\n")
    status, headers, content = answer(service, post(COMPATIBLE, version="1.0"))
    assert (status, headers["content-length"]) == (200, str(len(content)))
    assert json.loads(content)["choices"]


@pytest.mark.parametrize(
    ("request_", "native", "status"),
    [
        (b"\x16\x03\x01\x00\xa5\r\n\r\n", False, 400),
        (b"GET\r\n\r\n", False, 400),
        (b"GET /v1/models HTTP/9.9\r\nhost: x\r\n\r\n", False, 400),
        (b"GET /v1/models HTTP/1.1\r\nhost: x\r\na b: c\r\n\r\n", False, 400),
        (b"GET /api/v1/models HTTP/1.1\r\nhost: x\r\na: b\x00\r\n\r\n", True, 400),
        (b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n", False, 400),
        (f"POST {NATIVE} HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n".encode(), True, 400),
        (f"POST {NATIVE} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n".encode(), True, 400),
        (b"GET /v1/\xff HTTP/1.1\r\nhost: x\r\n\r\n", False, 400),
        (b"CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n", True, 400),
    ],
)
def test_what_is_no_request_is_refused_in_json(
    service: RunningService, request_: bytes, status: int, *, native: bool
) -> None:
    """Errors of the parser are JSON in the dialect of the path, as far as it is known, with a request id."""
    code, headers, content = answer(service, request_)
    body = json.loads(content)
    assert (code, headers["content-type"]) == (status, "application/json")
    assert body["request_id"] == headers["x-request-id"]
    assert ("error" in body) is not native
    assert "Invalid HTTP request received." in content.decode()


# Proxies

UPLOADS = f"/api/v1/uploads?action=getPolicy&model={MODEL}"

TRUSTED: list[tuple[dict[str, str], str]] = [
    ({}, "http://own:8000"),
    ({"x-forwarded-proto": "https,http", "x-forwarded-host": "a.example, b"}, "https://a.example"),
    ({"x-forwarded-proto": " HTTPS ", "x-forwarded-host": "a:8443"}, "https://a:8443"),
    ({"x-forwarded-proto": "javascript"}, "http://own:8000"),
    ({"x-forwarded-proto": "wss"}, "http://own:8000"),
    ({"x-forwarded-proto": ""}, "http://own:8000"),
    ({"x-forwarded-proto": ", https"}, "http://own:8000"),
    ({"x-forwarded-host": "user@a"}, "http://own:8000"),
    ({"x-forwarded-host": "a/b"}, "http://own:8000"),
    ({"x-forwarded-host": 'a"<x>'}, "http://own:8000"),
    ({"x-forwarded-host": "\xff"}, "http://own:8000"),
    ({"x-forwarded-host": "a b"}, "http://own:8000"),
    ({"x-forwarded-host": "[2001:db8::1]:443", "x-forwarded-proto": "https"}, "https://[2001:db8::1]:443"),
    ({"x-forwarded-prefix": "/captions"}, "http://own:8000/captions"),
    ({"x-forwarded-prefix": "/a/b/, /c"}, "http://own:8000/a/b"),
    ({"x-forwarded-prefix": "//evil.example"}, "http://own:8000"),
    ({"x-forwarded-prefix": "/a?b"}, "http://own:8000"),
    ({"x-forwarded-prefix": "a"}, "http://own:8000"),
    ({"x-forwarded-prefix": "/" + "a" * 300}, "http://own:8000"),
    ({"forwarded": "proto=https;host=a.example"}, "https://a.example"),
    ({"forwarded": 'for="[2001:db8::1]:99";Proto=HTTPS;Host="a:1", host=b;proto=http'}, "https://a:1"),
    ({"forwarded": "for=192.0.2.1, proto=https;host=b"}, "http://own:8000"),
    ({"forwarded": 'host="a, b"'}, "http://own:8000"),
    ({"forwarded": 'host="a\\"b"'}, "http://own:8000"),
    ({"forwarded": "host=a/b;proto=https"}, "https://own:8000"),
    ({"forwarded": "host=a;;;=;proto"}, "http://own:8000"),
    ({"forwarded": 'host="a'}, "http://own:8000"),
    ({"forwarded": "proto=https", "x-forwarded-host": "a"}, "https://a"),
    ({"forwarded": "proto=https;host=a", "x-forwarded-proto": "http", "x-forwarded-host": "b"}, "https://a"),
]


def origin(peer: str | None, headers: dict[str, str], host: str = "own:8000", **settings: object) -> str:
    """Return the origin for a request of this peer."""
    fields = [(name.encode(), value.encode("latin-1")) for name, value in {"host": host, **headers}.items()]
    scope: dict[str, Any] = {"type": "http", "scheme": "http", "path": "/", "headers": fields, "state": {"peer": peer}}
    # A server that reads `X-Forwarded-For` itself reports a client that it does not know.
    scope |= {"client": ("127.0.0.1", 1), "server": ("10.0.0.1", 8000), "query_string": b""}
    return Origins(Settings(engine="fake", **settings)).of(Request(scope))  # type: ignore[arg-type]


@pytest.mark.parametrize(("headers", "expected"), TRUSTED)
def test_trusted_proxies_are_believed(headers: dict[str, str], expected: str) -> None:
    """The first valid values of a trusted proxy make the origin; of any other peer none does."""
    assert origin("127.0.0.1", headers) == expected
    assert origin("::1", headers) == expected
    assert origin("10.1.2.3", headers, trusted_proxies="10.1.0.0/16") == expected
    for peer in ("192.0.2.1", "10.2.0.1", None, "unix"):
        assert origin(peer, headers, trusted_proxies="10.1.0.0/16") == "http://own:8000"
    assert origin("127.0.0.1", headers, public_url="https://public.example/x/") == "https://public.example/x"


def test_a_request_without_a_host() -> None:
    """The listener's own address is the origin of a request that names none."""
    assert origin("192.0.2.1", {}, host="") == "http://10.0.0.1:8000"


def test_upload_addresses_follow_the_proxy(service: RunningService) -> None:
    """Over HTTP, the headers count from loopback by default, and not once another network is trusted."""
    forwarded = "x-forwarded-proto: https,http\r\nx-forwarded-host: a.example, b\r\nx-forwarded-for: 127.0.0.1\r\n"
    request = f"GET {UPLOADS} HTTP/1.1\r\nhost: own\r\nauthorization: Bearer {KEY}\r\n{forwarded}\r\n".encode()
    assert json.loads(answer(service, request)[2])["data"]["upload_host"] == "https://a.example/oss-upload"
    flags = ("--engine=fake", "--audio-workers=1", f"--api-keys={KEY}", "--trusted-proxies=192.0.2.0/24")
    with RunningService(*flags) as other:
        assert json.loads(answer(other, request)[2])["data"]["upload_host"] == "http://own/oss-upload"
