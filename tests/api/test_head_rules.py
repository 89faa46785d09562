"""Rules for the head of a request, and the complete response to one that breaks them."""

from __future__ import annotations

import json
import re

import pytest

from serving.api.request_head import HeadRefusals, check_fields, is_compatible, is_host
from serving.config import Settings
from serving.errors import MalformedHttp

HOST = (b"host", b"x")


@pytest.mark.parametrize(
    "name",
    [
        *("authorization", "content-type", "content-encoding", "x-actor", "x-dashscope-sse", "x-dashscope-async"),
        *("x-dashscope-ossresourceresolve", "x-dashscope-encryptionkey"),
    ],
)
def test_a_field_that_is_read_once_must_not_be_repeated(name: str) -> None:
    """One is accepted, two are not, whether they are equal or not."""
    field = name.encode()
    check_fields("1.1", [HOST, (field, b"a")])
    for second in (b"a", b"b", b""):
        with pytest.raises(MalformedHttp, match=f"^The header {name} must not be repeated.$"):
            check_fields("1.1", [(field, b"a"), HOST, (field, second)])


def test_two_hosts_are_refused() -> None:
    """The rule holds for equal hosts, and in HTTP/1.0 too."""
    for version in ("1.0", "1.1"):
        with pytest.raises(MalformedHttp, match=r"^The header host must not be repeated\.$"):
            check_fields(version, [HOST, HOST])


def test_other_fields_may_be_repeated() -> None:
    """Lists such as `accept` may come in several fields."""
    check_fields("1.1", [HOST, (b"accept", b"a"), (b"accept", b"b"), (b"x-host", b"a/b"), (b"cookie", b"a")])


def test_a_host_is_needed_from_http_1_1_on() -> None:
    """Without a host only HTTP/1.0 is accepted."""
    check_fields("1.0", [])
    check_fields("1.0", [(b"accept", b"a")])
    for version in ("1.1", "2"):
        with pytest.raises(MalformedHttp, match=r"^The header host is missing\.$"):
            check_fields(version, [(b"accept", b"a")])


@pytest.mark.parametrize(
    "host",
    [*(b"", b"a", b"a.example", b"a-b_c~d.example:8000", b"127.0.0.1:1", b"[::1]", b"[::1]:65535", b"[FE80::ABCd.1]")],
)
def test_hosts(host: bytes) -> None:
    """A name or an address with an optional port is a host, and so is nothing."""
    assert is_host(host)
    check_fields("1.1", [(b"host", host)])


@pytest.mark.parametrize(
    "host",
    [
        *(b"a,b", b"a/b", b"u@a", b"a b", b" a", b"a ", b"a:", b"a:b", b"a:123456", b"[::1", b"::1", b"[g]", b"a:1:2"),
        *(b":80", b"a\n", b"a?b", b"a#b", b"\xe9", b"http://a", b"[]"),
    ],
)
def test_what_is_no_host(host: bytes) -> None:
    """A list, a path, a user, a blank and a bad port are not one."""
    assert not is_host(host)
    with pytest.raises(MalformedHttp, match=r"^The header host is not a host\.$"):
        check_fields("1.0", [(b"accept", b"a"), (b"host", host)])


def test_paths_of_openais_dialect() -> None:
    """Its two prefixes, and nothing that only contains or resembles them."""
    compatible = ["/v1/", "/v1/models", "/compatible-mode/v1/chat/completions", "/compatible-mode/"]
    native = ["/v1", "/api/v1/models", "/x/v1/", "/compatible-mode", "/a/compatible-mode/", "/metrics", "/", "/V1/"]
    assert [is_compatible(path) for path in compatible] == [True] * 4
    assert [is_compatible(path) for path in native] == [False] * 8


@pytest.mark.parametrize(
    ("url", "native"),
    [
        (b"", False),
        (b"/v1/models", False),
        (b"/v1/models?x=/api/v1/", False),
        (b"/compatible-mode/v1/chat/completions", False),
        (b"/api/v1/models", True),
        (b"/api/v1/models?x=/v1/", True),
        (b"/?/v1/?", True),
        (b"/\xff", True),
        (b"?", False),
    ],
)
def test_a_refusal_is_a_complete_response_in_the_dialect_of_the_path(url: bytes, native: bool) -> None:  # noqa: FBT001
    """It has the default fields, its type and exact length, its own id, and ends the connection."""
    refusals = HeadRefusals(Settings(engine="fake"))
    sent = refusals.response(MalformedHttp("No."), url, [(b"server", b"s"), (b"date", b"d")])
    head, _, body = sent.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    assert status == "HTTP/1.1 400 Bad Request"
    content = json.loads(body)
    request_id = content["request_id"]
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", request_id)
    names = [line.partition(": ")[0] for line in lines]
    assert names[:4] == ["server", "date", "content-type", "content-length"]
    assert names[-1] == "connection"
    assert len(names) == len(set(names))
    values = {name: value for name, _, value in (line.partition(": ") for line in lines)}
    assert values["content-type"] == "application/json"
    assert values["content-length"] == str(len(body))
    assert (values["server"], values["date"], values["connection"]) == ("s", "d", "close")
    assert values["x-request-id"] == request_id
    error = content if native else content["error"]
    assert error["message"] == "No."
    assert error["code"] == ("InvalidParameter" if native else "invalid_parameter_error")
    assert ("error" in content) is not native
