"""Downloads, from real servers on loopback that misbehave in every way we know (`sites.py`)."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from serving import errors
from serving.audio import fetch
from tests.audio.sites import BODY, MIB, OUTSIDE, Site, fetching, get, redirect, response

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path


# The request


async def test_only_the_request_is_sent(tmp_path: Path, outside: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """No credentials, cookies, referrer or proxy are used; a cookie that a server sets is not sent back."""
    (tmp_path / "netrc").write_text(f"machine {OUTSIDE} login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    outside.answers["/start"] = response(b"", "302 Found", "Location: /clip", "Set-Cookie: a=b; Path=/")
    async with fetching(tmp_path / "downloads") as fetcher:
        assert await get(fetcher, outside.url("/start")) == BODY
    for headers in outside.requests:
        names = {line.partition(":")[0].lower() for line in headers.split("\r\n")[1:] if line}
        assert names - {"connection"} == {"host", "accept", "accept-encoding", "user-agent"}
        assert "Accept-Encoding: identity\r\n" in headers
        assert f"Host: {OUTSIDE}:{outside.port}\r\n" in headers


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("/a%20b%2Fc%2fd%zz?x=%41&y=%E4%BD%A0+z;w", "/a%20b%2Fc%2fd%zz?x=%41&y=%E4%BD%A0+z;w"),
        ("/../a/./b//c", "/../a/./b//c"),
        ("/音 频.wav?名=值", "/%E9%9F%B3%20%E9%A2%91.wav?%E5%90%8D=%E5%80%BC"),
        ("/clip?a=\"<>|{}^`'[]", "/clip?a=\"<>|{}^`'[]"),
        ("/clip#fragment", "/clip"),
        ("?query", "/?query"),
        ("", "/"),
    ],
)
async def test_percent_escapes_are_untouched(tmp_path: Path, outside: Site, path: str, sent: str) -> None:
    """A signed URL arrives as it was written; only characters that are illegal in a request line are escaped."""
    outside.answers[sent] = response(BODY)
    async with fetching(tmp_path) as fetcher:
        assert await get(fetcher, outside.url(path)) == BODY
    assert outside.requests[0].split("\r\n")[0] == f"GET {sent} HTTP/1.1"


# The response


async def test_the_file_holds_the_body_while_the_context_lasts(tmp_path: Path, outside: Site) -> None:
    """The download is a private file that is removed when the context is left, also by an exception."""
    async with fetching(tmp_path) as fetcher:
        async with fetcher.fetch(outside.url()) as path:
            assert path.read_bytes() == BODY
            assert path.parent.stat().st_mode & 0o777 == 0o700
        assert not path.exists()
        with pytest.raises(ZeroDivisionError):
            async with fetcher.fetch(outside.url()) as path:
                raise ZeroDivisionError
        assert not path.exists()


@pytest.mark.parametrize(
    "status", ["400 Bad Request", "401 No", "403 Forbidden", "404 Not Found", "500 Oops", "503 No"]
)
async def test_an_error_status_is_reported(tmp_path: Path, outside: Site, status: str) -> None:
    """The error names the status of the response, and nothing of its body."""
    outside.answers["/error"] = response(b"a long story", status)
    async with fetching(tmp_path) as fetcher:
        with pytest.raises(errors.DownloadFailed, match=f"status {status[:3]}") as caught:
            await get(fetcher, outside.url("/error"))
    assert "story" not in str(caught.value)


async def test_an_empty_body_is_empty_audio(tmp_path: Path, outside: Site) -> None:
    """A response without a body is `AudioEmpty`, whatever its framing."""
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    outside.answers |= {"/empty": response(b""), "/none": response(b"", "204 No Content"), "/chunked": chunked}
    async with fetching(tmp_path) as fetcher:
        for path in ("/empty", "/none", "/chunked"):
            with pytest.raises(errors.AudioEmpty):
                await get(fetcher, outside.url(path))


async def test_the_size_is_limited_while_reading(tmp_path: Path, outside: Site) -> None:
    """A file of exactly the limit passes; one more byte, an endless body, and a false length do not."""

    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(bytes(65536))
            await writer.drain()

    async def endless_chunks(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"10000\r\n" + bytes(65536) + b"\r\n")
            await writer.drain()

    async def early(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1048577\r\n\r\n")
        await asyncio.sleep(60)

    outside.answers |= {
        "/most": response(bytes(MIB)),
        "/more": response(bytes(MIB + 1)),
        "/endless": endless,
        "/chunks": endless_chunks,
        "/early": early,
    }
    async with fetching(tmp_path, max_url_bytes=MIB) as fetcher:
        assert await get(fetcher, outside.url("/most")) == bytes(MIB)
        began = time.perf_counter()
        for path in ("/more", "/endless", "/chunks", "/early"):
            with pytest.raises(errors.AudioTooLarge):
                await get(fetcher, outside.url(path))
        assert time.perf_counter() - began < 10


async def test_a_length_that_lies_low_ends_the_body_there(tmp_path: Path, outside: Site) -> None:
    """Bytes past the announced length are not part of the body; aiohttp refuses them if they arrive with the body."""

    async def low(writer: asyncio.StreamWriter) -> None:
        writer.write(response(BODY[:100]))
        await writer.drain()
        await asyncio.sleep(0.1)
        writer.write(BODY[100:])

    outside.answers |= {"/low": low, "/at-once": response(BODY, length=100)}
    async with fetching(tmp_path) as fetcher:
        assert await get(fetcher, outside.url("/low")) == BODY[:100]
        with pytest.raises(errors.DownloadFailed):
            await get(fetcher, outside.url("/at-once"))


def _malformed() -> dict[str, bytes]:
    good = response(BODY)
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return {
        "cut": response(BODY, length=5000),
        "no-answer": b"",
        "half-head": good[:20],
        "not-http": b"SSH-2.0-OpenSSH_9.6\r\n" * 50,
        "zeros": bytes(100_000),
        "negative-length": response(BODY, length=-5),
        "two-lengths": response(BODY, "200 OK", "Content-Length: 7"),
        "length-in-words": good.replace(b"1024", b"lots"),
        "huge-header": response(BODY, "200 OK", "X: " + "x" * 1_000_000),
        "many-headers": response(BODY, "200 OK", *["X: y"] * 100_000),
        "bad-status": good.replace(b"200", b"abc"),
        "bad-chunk": chunked + b"zz\r\nabc",
        "negative-chunk": chunked + b"-5\r\nabc\r\n",
        "cut-chunk": chunked + b"400\r\nabc",
        "huge-chunk-line": chunked + b"5;" + b"x" * 1_000_000,
        "endless-100": b"HTTP/1.1 100 Continue\r\n\r\n" * 50_000,
        "nul-header": response(BODY, "200 OK", "X\0Y: z"),
        "gzip-bomb": response(gzip.compress(bytes(50 * MIB)), "200 OK", "Content-Encoding: gzip"),
        "two-codings": response(BODY, "200 OK", "Content-Encoding: identity, gzip"),
        "unknown-coding": response(BODY, "200 OK", "Content-Encoding: zstd"),
        "switching": response(b"", "101 Switching Protocols", "Upgrade: websocket", "Connection: upgrade"),
    }


@pytest.mark.parametrize("name", _malformed())
async def test_a_malformed_answer_is_a_failed_download(tmp_path: Path, outside: Site, name: str) -> None:
    """A body that is cut or malformed, or a bomb, is `DownloadFailed`, without a long wait."""
    outside.answers["/bad"] = _malformed()[name]
    async with fetching(tmp_path) as fetcher:
        with pytest.raises(errors.DownloadFailed):
            await get(fetcher, outside.url("/bad"))
        assert await get(fetcher, outside.url()) == BODY


async def test_slow_servers_meet_the_deadline(tmp_path: Path, outside: Site) -> None:
    """The total time is limited, however a server drips: before or in its headers, in its body, in redirects."""

    def drip(first: bytes, drop: bytes) -> Callable[[asyncio.StreamWriter], Awaitable[None]]:
        async def answer(writer: asyncio.StreamWriter) -> None:
            writer.write(first)
            while True:
                writer.write(drop)
                await writer.drain()
                await asyncio.sleep(0.02)

        return answer

    async def late(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.2)
        writer.write(redirect("/late"))

    outside.answers |= {
        "/silent": drip(b"", b""),
        "/head": drip(b"HTTP/1.1 200 OK\r\nX: ", b"x"),
        "/body": drip(b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
        "/chunks": drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        "/late": late,
    }
    async with fetching(tmp_path, fetch_timeout_s=0.5) as fetcher:
        for path in ("/silent", "/head", "/body", "/chunks", "/late"):
            began = time.perf_counter()
            with pytest.raises(errors.DownloadTimeout):
                await get(fetcher, outside.url(path))
            assert time.perf_counter() - began < 10


async def test_a_slow_resolver_meets_the_deadline(tmp_path: Path, outside: Site) -> None:
    """A name server that does not answer delays only the download that needs it."""
    answering = threading.Event()

    def stuck(host: str, port: int, **options: Any) -> list[Any]:
        if host == "slow.test":
            answering.wait()
        return list(socket.getaddrinfo(OUTSIDE, port, **options))

    async with fetching(tmp_path, stuck, fetch_timeout_s=1) as fetcher:
        slow = asyncio.create_task(get(fetcher, outside.url(host="slow.test")))
        assert await get(fetcher, outside.url(host="fast.test")) == BODY
        with pytest.raises(errors.DownloadTimeout):
            await slow
        answering.set()


async def test_connecting_has_its_own_limit(tmp_path: Path) -> None:
    """A host that drops packets is abandoned after the connect timeout, twice; a later request may reach it."""
    with socket.create_server((OUTSIDE, 0), backlog=0) as full, contextlib.ExitStack() as queued:
        address = full.getsockname()
        for _ in range(8):  # fill the backlog, so that further handshakes are not answered
            client = queued.enter_context(socket.socket())
            client.settimeout(0)
            client.connect_ex(address)
        async with fetching(tmp_path, fetch_connect_timeout_s=0.2) as fetcher:
            began = time.perf_counter()
            with pytest.raises(errors.SourceUnavailable):
                await get(fetcher, f"http://{OUTSIDE}:{address[1]}/clip")
            assert time.perf_counter() - began < 10


async def test_the_consumers_time_is_not_the_downloads(tmp_path: Path, outside: Site) -> None:
    """The deadline covers the download only, not the use of the file."""
    async with fetching(tmp_path, fetch_timeout_s=1) as fetcher, fetcher.fetch(outside.url()) as path:
        await asyncio.sleep(1.1)
        assert path.read_bytes() == BODY


# Translation of exceptions


def _client_errors() -> list[type[aiohttp.ClientError]]:
    kinds: list[type[aiohttp.ClientError]] = [aiohttp.ClientError]
    for kind in kinds:
        kinds += [
            child for child in kind.__subclasses__() if child.__module__.startswith("aiohttp.") and child not in kinds
        ]
    return kinds[1:]


@pytest.mark.parametrize("kind", _client_errors(), ids=lambda kind: kind.__name__)
def test_every_exception_of_aiohttp_has_a_translation(kind: type[aiohttp.ClientError]) -> None:
    """Every exception class of aiohttp has a translation; a new one upstream fails here until it is given one."""
    assert any(parent in fetch.TRANSLATION for parent in kind.__mro__)
    assert aiohttp.ClientError not in fetch.TRANSLATION
    if issubclass(kind, TimeoutError):
        connecting = kind.__name__ == "ConnectionTimeoutError"
        expected = errors.SourceUnavailable if connecting else errors.DownloadTimeout
        assert isinstance(fetch._translate(kind.__new__(kind)), expected)
