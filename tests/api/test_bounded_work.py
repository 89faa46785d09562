"""No request blocks the event loop, whatever it sends, and what is refused early counts against its caller's limits.

Bounds of time are ten times what is right, so that a busy machine passes; without the bounds these take seconds.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import httpx
import pytest

from serving.api.dialects.json_codec import MAX_VALUES, check_values, parse_object
from serving.config import Settings
from serving.errors import InvalidRequest, TooManyValues
from tests.api.ticking import TickingService, answers
from tests.support.wire import COMPATIBLE, NATIVE, compatible_body, data_url, wav
from tests.tenancy.test_usage_session import KEY, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 2**20
BLOCKED_S = 0.5
CLIP = data_url(wav(0.4))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TickingService]:
    """A service that knows one key."""
    directory = tmp_path_factory.mktemp("data")
    settings = Settings(
        engine="fake", audio_workers=1, data_dir=directory, uploads_dir=directory, api_keys="sk-one", host="127.0.0.1"
    )
    with TickingService(settings) as running:
        yield running


def repeated(unit: bytes, size: int) -> bytes:
    """Return a unit as often as it fits."""
    return unit * (size // len(unit))


def listed(unit: bytes, size: int) -> bytes:
    """Return a JSON object with a list of units."""
    return b'{"a":[' + repeated(unit + b",", size) + b"1]}"


REFUSED: dict[str, Callable[[], bytes]] = {
    "nested lists": lambda: listed(b"[" * 190 + b"]" * 190, MIB),
    "15 MiB of nested lists": lambda: listed(b"[" * 190 + b"]" * 190, 15 * MIB),
    "nested objects": lambda: listed(b'{"a":' * 190 + b"1" + b"}" * 190, 15 * MIB),
    "empty lists": lambda: listed(b"[]", 15 * MIB),
    "empty objects": lambda: listed(b"{}", 15 * MIB),
    "lists without commas": lambda: b'{"a":' + b"[" * (15 * MIB),
    "numbers": lambda: listed(b"1", 15 * MIB),
    "repeated keys": lambda: b"{" + repeated(b'"a":1,', 15 * MIB) + b'"a":1}',
    "keys": lambda: b"{" + b",".join(b'"%d":0' % number for number in range(1_200_000)) + b"}",
    "empty strings": lambda: listed(b'""', 15 * MIB),
    "quotes": lambda: b'"' * (15 * MIB),
    "quotes and commas": lambda: b'","' * (5 * MIB),
    "half in a string": lambda: b'{"a":"' + b"[" * (7 * MIB) + b'","b":' + b"[" * (7 * MIB),
    "escaped quotes before": lambda: b'{"a":"' + rb"\"" * (4 * MIB) + b'","b":[' + b"{}," * MIB + b"1]}",
    "a number of a million digits": lambda: b'{"a":' + b"1" * 10**6 + b"}",
    "an open string": lambda: b'{"a":"' + rb"\u00e9" * 10**6,
}
ACCEPTED: dict[str, Callable[[], bytes]] = {
    "commas and brackets in a string": lambda: b'{"a":"' + b"[{,:" * (15 * MIB // 4) + b'"}',
    "escaped quotes in a string": lambda: b'{"a":"' + rb"\",[" * (15 * MIB // 4) + b'"}',
    "escapes": lambda: b'{"a":"' + rb"\u00e9" * 10**6 + b'"}',
    "backslashes": lambda: b'{"a":"' + b"\\" * (15 * MIB) + b'"}',
    "backslashes and commas": lambda: b'{"a":"' + b"\\" * (10 * MIB) + b"," * MIB + b'"}',
    "characters": lambda: b'{"a":"' + "声é😀".encode() * MIB + b'"}',
    "long keys": lambda: b"{" + b",".join(b'"%s%d":0' % (b"k" * 700, number) for number in range(20_000)) + b"}",
    "long numbers": lambda: listed(b"1" * 4000, 15 * MIB),
    "huge numbers": lambda: listed(b"1e999999", 400_000),
    "blanks": lambda: b'{"a":' + b" " * (15 * MIB) + b"1}",
}


def post(body: bytes, path: str = COMPATIBLE, key: str = "sk-one") -> bytes:
    """Return a request as bytes for the wire."""
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\nconnection: close\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize("path", [COMPATIBLE, NATIVE], ids=["compatible", "native"])
@pytest.mark.parametrize("name", [*REFUSED, *ACCEPTED])
def test_json_of_every_kind_is_decoded_in_bounded_time(service: TickingService, name: str, path: str) -> None:
    """A body without model or messages is refused as such if it can be decoded, and the loop goes on meanwhile."""
    request = post((REFUSED | ACCEPTED)[name](), path)
    service.reset()
    answer = answers(service.port, request)
    assert service.longest_gap_s < BLOCKED_S
    assert answer.startswith(b"HTTP/1.1 400 ")
    if name in ACCEPTED:
        assert b'parameter \\"model\\"' in answer or b"is too short - 'messages'" in answer
    else:
        assert b"Required body invalid" in answer


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_long_ignored_text_is_accepted(service: TickingService, place: str) -> None:
    """A text with more commas, brackets and quotes than a request may have values is one value."""
    text = 'a, [b], {"c": "d"}, ' * 100_000
    body = compatible_body(CLIP)
    body = {"comment": text, **body} if place == "before" else {**body, "comment": text}
    service.reset()
    answer = httpx.post(service.url + COMPATIBLE, json=body, headers={"authorization": "Bearer sk-one"}, timeout=60)
    assert service.longest_gap_s < BLOCKED_S
    assert answer.status_code == 200, answer.text


def test_values_are_counted_exactly() -> None:
    """Exactly `MAX_VALUES` are accepted, whatever strings hold and wherever a chunk of the count ends."""
    for filler in (b"", b"\\" * 2, rb"\"", b",", rb"\\\",[", b"\\\\" * 70_000, rb"\"," * 50_000, b"," * 65_530):
        text = b'"' + filler + b'"'
        most = b'{"a":[' + text + b",1" * (MAX_VALUES - 3) + b"]}"
        assert parse_object(most)["a"][1:] == [1] * (MAX_VALUES - 3)
        with pytest.raises(TooManyValues):
            check_values(b'{"a":[' + text + b",1" * (MAX_VALUES - 2) + b"]}")
    with pytest.raises(InvalidRequest):
        parse_object(rb'{"a":1}\"' + b"[" * 10**6)


def test_requests_refused_before_decoding_count() -> None:
    """Requests that cannot be decoded use up the requests of a minute, and leave no record; then none is decoded."""
    limits = {"requests_per_minute": 8}
    with serving(limits=limits) as (service, ledger):
        bomb = REFUSED["nested lists"]()
        for left in reversed(range(6)):
            refused = httpx.post(service.url + COMPATIBLE, content=bomb, headers=KEY, timeout=60)
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_parameter_error")
            assert refused.headers["x-ratelimit-remaining-requests"] == str(left + 2)
        caption = httpx.post(service.url + COMPATIBLE, json=compatible_body(CLIP), headers=KEY, timeout=60)
        assert caption.status_code == 200
        assert httpx.post(service.url + NATIVE, content=b"{", headers=KEY).status_code == 400
        for content in (bomb, json.dumps(compatible_body(CLIP)).encode()):
            limited = httpx.post(service.url + COMPATIBLE, content=content, headers=KEY, timeout=60)
            assert (limited.status_code, limited.json()["error"]["code"]) == (429, "limit_requests")
        service.settle()
        counted = {
            code: service.metric("captioner_requests_total", code=code)
            for code in ("too_many_values", "invalid_request", "requests_limited", "stop")
        }
        assert counted == {"too_many_values": 6, "invalid_request": 1, "requests_limited": 2, "stop": 1}
        assert [row.ending for row in ledger()] == ["finished"]


def test_a_concurrent_request_that_cannot_be_decoded_is_released() -> None:
    """The one request that a tenant may have in progress is free again after each that was refused."""
    with serving(limits={"concurrent_requests": 1}) as (service, _):
        for content in (b"{", REFUSED["nested lists"](), b"[]") * 3:
            assert httpx.post(service.url + NATIVE, content=content, headers=KEY, timeout=60).status_code == 400
        answer = httpx.post(service.url + COMPATIBLE, json=compatible_body(CLIP), headers=KEY, timeout=60)
        assert answer.status_code == 200


def chunked(chunks: int, size: int, extension: bytes = b"") -> bytes:
    """Return a body in chunks."""
    return b"%x%s\r\n%s\r\n" % (size, extension, b" " * size) * chunks


HEAD = f"POST {COMPATIBLE} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer sk-one\r\n".encode()
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"

HEADS = {
    "fields": (431, HEAD + b"".join(b"x-%d: y\r\n" % number for number in range(200)) + b"\r\n"),
    "empty fields": (431, HEAD + b"a:\r\n" * 15_000 + b"\r\n"),
    "a query": (431, b"GET /api/v1/models?" + b"a=1&" * 2100 + b" HTTP/1.1\r\nhost: x\r\n\r\n"),
    "single bytes": (400, CHUNKED + chunked(200_000, 1)),
    "small chunks": (400, CHUNKED + chunked(5000, 16)),
    "chunks' extensions": (400, CHUNKED + chunked(1000, 16, b";" + b"e" * 1000)),
    "one extension": (431, CHUNKED + b"1;" + b"e" * 400_000),
    "trailers": (400, CHUNKED + b"1\r\n{\r\n0\r\n" + b"x: y\r\n" * 60_000),
    "requests in a row": (200, b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n" * 20_000),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_and_framing_are_bounded(service: TickingService, name: str) -> None:
    """Many fields, a long query, tiny chunks, extensions, trailers and pipelined requests end the connection."""
    status, request = HEADS[name]
    service.reset()
    answer = answers(service.port, request)
    assert service.longest_gap_s < BLOCKED_S
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer[:500]
    assert b"\r\nx-request-id: " in answer
    assert answer.count(b"HTTP/1.1 ") == (33 if status == 200 else 1)
    if status == 400:
        assert b"The chunks of the body" in answer


@pytest.mark.parametrize("size", [1000, 20_000], ids=["small", "large"])
def test_bodies_in_usual_chunks_are_read(service: TickingService, size: int) -> None:
    """A body of a few hundred chunks, or of larger ones, with short extensions, is read."""
    body = json.dumps(compatible_body(data_url(wav(10)))).encode()
    chunks = b"".join(
        b"%x;a=b\r\n%s\r\n" % (len(piece), piece)
        for piece in (body[start : start + size] for start in range(0, len(body), size))
    )
    head = CHUNKED.replace(b"host: x", b"host: x\r\nconnection: close")
    answer = answers(service.port, head + chunks + b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 "), answer[:500]


PART = b'--x\r\ncontent-disposition: form-data; name="field"\r\n\r\n\r\n'
FORMS = {
    "parts": PART * 200_000,
    "boundaries": b'--x\r\ncontent-disposition: form-data; name="a"\r\n\r\n' + b"\r\n-" * (4 * MIB),
    "fields": b'--x\r\ncontent-disposition: form-data; name="a"\r\n\r\n' + b"a" * (8 * MIB),
    "headers": b"--x\r\n" + b"a: b\r\n" * (2 * MIB),
    "preamble": b"\r\n" * (4 * MIB),
    "epilogue": b"--x--\r\n" + b"\r\n" * (4 * MIB),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_are_bounded(service: TickingService, name: str) -> None:
    """A form without a valid policy is refused after at most 320 KiB, and the loop goes on meanwhile."""
    body = FORMS[name]
    head = (
        "POST /oss-upload HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=x\r\nconnection: close\r\n"
    )
    service.reset()
    answer = answers(service.port, f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    assert service.longest_gap_s < BLOCKED_S
    assert answer.startswith(b"HTTP/1.1 400 "), answer[:500]
    assert b"<Code>" in answer
