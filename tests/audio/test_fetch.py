"""Guarded downloads, against real servers on loopback that misbehave in every way we know.

Two loopback addresses stand for the two sides of the guard: 127.0.0.2 is allowed and acts as the public internet,
127.0.0.1 is not and acts as our own network.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gzip
import ipaddress
import socket
import ssl
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import psutil
import pytest

from serving import errors
from serving.audio import egress, fetch
from serving.audio.fetch import Fetcher
from serving.config import Settings
from serving.types import NO_TENANT, SchedulingClass

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

OUTSIDE, INSIDE = "127.0.0.2", "127.0.0.1"
BODY = bytes(range(256)) * 4
MIB = 1024 * 1024


class Site:
    """A server of raw responses by path; any other path is 404. `requests` are the request headers it received."""

    def __init__(self, address: str, answers: dict[str, Any]) -> None:
        self.address = address
        self.answers = answers
        self.requests: list[str] = []
        self._tasks: set[asyncio.Task[None] | None] = set()

    @property
    def connections(self) -> int:
        """Number of connections so far."""
        return len(self._tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.current_task())
        try:
            await self._answer(reader, writer)
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            headers = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.requests.append(headers)
            answer = self.answers.get(headers.split(" ")[1], response(b"", "404 Not Found"))
            if callable(answer):
                await answer(writer)
            else:
                writer.write(answer)
                await writer.drain()

    @contextlib.asynccontextmanager
    async def running(self, ssl_context: ssl.SSLContext | None = None) -> AsyncIterator[Site]:
        """Listen on a free port."""
        server = await asyncio.start_server(self._serve, self.address, 0, ssl=ssl_context)
        self.port = server.sockets[0].getsockname()[1]
        async with server:
            yield self
            for task in filter(None, self._tasks):
                task.cancel()
            await asyncio.gather(*filter(None, self._tasks), return_exceptions=True)

    def url(self, path: str = "/clip", host: str = "") -> str:
        """Return the URL of a response."""
        return f"http://{host or self.address}:{self.port}{path}"


def response(body: bytes, status: str = "200 OK", *headers: str, length: int | None = None) -> bytes:
    """Render an HTTP response with a (possibly lying) Content-Length."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def redirect(location: str, status: str = "302 Found") -> bytes:
    """Render a redirect."""
    return response(b"elsewhere", status, f"Location: {location}")


class Names:
    """A resolver: each name has a list of answers, one per question; the last one repeats. Records questions."""

    def __init__(self, **names: Sequence[Sequence[str]]) -> None:
        self._names = {name.replace("_", "."): list(answers) for name, answers in names.items()}
        self.questions: list[str] = []

    def __call__(self, host: str, port: int, **options: Any) -> list[Any]:
        self.questions.append(host)
        answers = self._names.get(host)
        if answers is None:
            return list(socket.getaddrinfo(host, port, flags=socket.AI_NUMERICHOST, **options))
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [info for address in addresses for info in socket.getaddrinfo(address, port, **options)]


@pytest.fixture
async def outside() -> AsyncIterator[Site]:
    """A site on the public internet."""
    async with Site(OUTSIDE, {"/clip": response(BODY)}).running() as site:
        yield site


@pytest.fixture
async def inside() -> AsyncIterator[Site]:
    """A site on our own network, to which nothing may ever connect."""
    async with Site(INSIDE, {"/clip": response(b"secret")}).running() as site:
        yield site
        assert site.connections == 0


def files(directory: Path) -> list[Path]:
    """Return every file below `directory`."""
    return [path for path in directory.rglob("*") if path.is_file()]


@contextlib.asynccontextmanager
async def fetching(
    tmp_path: Path, names: Callable[..., Any] | None = None, **changes: object
) -> AsyncIterator[Fetcher]:
    """Run a fetcher to which only OUTSIDE is public; nothing may be left in its directory."""
    values = {"download_dir": tmp_path, "fetch_allow": (f"{OUTSIDE}/32",), "fetch_timeout_s": 20, **changes}
    fetcher = Fetcher(Settings.model_validate(values), getaddrinfo=names or Names())
    await fetcher.start()
    try:
        yield fetcher
        assert not files(tmp_path)
        assert fetcher._downloads
        assert fetcher._downloads.used_bytes == 0
    finally:
        await fetcher.stop()
    assert not list(tmp_path.iterdir())  # noqa: ASYNC240 - not a server


async def get(fetcher: Fetcher, url: str, scheduling_class: SchedulingClass = NO_TENANT) -> bytes:
    """Download and read."""
    async with fetcher.fetch(url, scheduling_class) as path:
        return path.read_bytes()


# Reachable addresses


def words(text: str) -> list[str]:
    """Split a list that is written as text."""
    return text.split()


FORBIDDEN = words("""
    0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.100.100.200 100.127.255.255 127.0.0.1 127.255.255.254
    168.63.129.16 169.254.169.254 169.254.0.1 172.16.0.1 172.31.255.255 192.0.0.1 192.0.0.192 192.0.2.7 192.31.196.1
    192.52.193.1 192.88.99.1 192.168.0.1 192.175.48.1 198.18.0.1 198.19.255.255 198.51.100.1 203.0.113.9 224.0.0.1
    239.255.255.255 240.0.0.1 255.255.255.255 :: ::1 ::7f00:1 ::ffff:127.0.0.1 ::ffff:8.8.8.8 ::ffff:0:127.0.0.1
    64:ff9b::7f00:1 64:ff9b::808:808 64:ff9b:1::a00:1 100::1 100:0:0:1::1 2001::1
    2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:2::1 2001:10::1 2001:20::1 2001:db8::1 2002:7f00:1:: 2002:808:808::1
    2620:4f:8000::1 3ffe::1 3fff::1 4000::1 5f00::1 fc00::1 fd00:ec2::254 fd12:3456::1 fe80::1 fe80::1%1 fec0::1
    ff02::1 ff0e::1
""")
PUBLIC = words("""
    1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0 172.15.255.255
    172.32.0.0 192.0.1.0 192.167.255.255 192.169.0.0 198.17.255.255 198.20.0.0 223.255.255.255 2001:200::1
    2001:4860:4860::8888 2400:cb00::1 2606:4700::1111 2a00:1450:4001::1
""")


@pytest.mark.parametrize("address", FORBIDDEN)
async def test_addresses_that_are_not_public_are_refused(tmp_path: Path, address: str) -> None:
    """A name that resolves to any special-purpose address is refused, without a connection."""
    async with fetching(tmp_path, Names(clips_test=[[address]])) as fetcher:
        with pytest.raises(errors.DownloadFailed) as caught:
            await get(fetcher, "http://clips.test/clip")
    assert str(caught.value) == errors.DownloadFailed.message


@pytest.mark.parametrize("address", PUBLIC)
def test_addresses_next_to_the_special_ones_are_public(address: str) -> None:
    """The guard's networks end where the registries' networks end."""
    assert egress.is_public(ipaddress.ip_address(address))


def test_the_guard_is_no_laxer_than_the_standard_library() -> None:
    """Over a sample of all addresses, none that Python calls non-global is public to the guard."""
    sample: list[egress.Address] = [ipaddress.IPv4Address(number) for number in range(0, 2**32, 2**32 // 30_011)]
    sample += [ipaddress.IPv6Address(number) for number in range(0, 2**128, 2**128 // 30_011)]
    assert not [address for address in sample if egress.is_public(address) and not address.is_global]


ODD = words("""
    http://localhost:{port}/clip http://LOCALHOST:{port}/clip http://localhost.:{port}/clip http://127.1:{port}/clip
    http://2130706433:{port}/clip http://0x7f.1:{port}/clip http://0x7f000001:{port}/clip
    http://0177.0.0.1:{port}/clip http://017700000001:{port}/clip http://127.0.0.1.:{port}/clip
    http://[::1]:{port}/clip http://[::]:{port}/clip http://[::ffff:127.0.0.1]:{port}/clip
    http://[::ffff:7f00:1]:{port}/clip http://[0:0:0:0:0:ffff:127.0.0.1]:{port}/ http://[::127.0.0.1]:{port}/clip
    http://[64:ff9b::7f00:1]:{port}/clip http://[fe80::1%251]:{port}/clip http://0:{port}/clip
    http://0.0.0.0:{port}/clip http://①②⑦.⓪.⓪.①:{port}/clip http://１２７.０.０.１:{port}/clip
    http://127。0。0。1:{port}/clip http://%31%32%37.0.0.1:{port}/clip http://ⓛocalhost:{port}/clip
    http://127.0.0.1:{port}/clip#@127.0.0.2 http://127.0.0.1:{port}/clip?@127.0.0.2 http:\\\\127.0.0.1:{port}/clip
    http://127.0.0.2#@127.0.0.1:{port}/clip http://127.0.0.2\\@127.0.0.1:{port}/clip
    http://[::ffff:0:127.0.0.1]:{port}/
""")  # noqa: RUF001 - the ambiguous characters are the point


@pytest.mark.parametrize("url", ODD)
async def test_our_network_is_not_reached_by_any_spelling(tmp_path: Path, inside: Site, url: str) -> None:
    """Every way to write loopback is refused or does not resolve; the inside is never connected to."""
    changes: dict[str, object] = {"fetch_ports": (80, inside.port)}

    def system(host: str, port: int, **options: Any) -> Any:
        return socket.getaddrinfo(host, port, **options) if "local" in host else Names()(host, port, **options)

    values = {"download_dir": tmp_path, **changes}
    fetcher = Fetcher(Settings.model_validate(values), getaddrinfo=system)
    await fetcher.start()
    with pytest.raises((errors.DownloadFailed, errors.InvalidAudioUrl)):
        await get(fetcher, url.format(port=inside.port))
    await fetcher.stop()


@pytest.mark.parametrize(
    "url",
    """
    ftp://127.0.0.2/clip file:///etc/passwd data:audio/wav;base64,AAAA gopher://127.0.0.2/ //127.0.0.2/clip /clip clip
    http:/127.0.0.2/clip http:///clip http:// http://: http://[::1 http://[]/ http://127.0.0.2:99999/clip
    http://127.0.0.2:port/clip http://127.0.0.2:-1/ http://user@127.0.0.2/clip http://user:pass@127.0.0.2/clip
    http://@127.0.0.2/clip http://127.0.0.2/a\tb http://127.0.0.2/a\nb http://127.0.0.2/\x00 http://127.0.0.2/\x7f
    http://127.0.0.2/\udc80 oss://bucket/clip HTTPX://127.0.0.2/ javascript:alert(1)
    """.replace("\n    ", " ").split(" ")[1:],
)
async def test_anything_but_an_http_url_is_refused(tmp_path: Path, url: str) -> None:
    """Other schemes, malformed URLs, credentials and control characters are the caller's mistake."""
    async with fetching(tmp_path) as fetcher:
        with pytest.raises(errors.InvalidAudioUrl):
            await get(fetcher, url)


async def test_one_forbidden_address_among_many_refuses_the_host(tmp_path: Path, outside: Site, inside: Site) -> None:
    """A name with a public and a private address is refused, in either order."""
    names = Names(a_test=[[OUTSIDE, INSIDE]], b_test=[[INSIDE, OUTSIDE]], c_test=[[OUTSIDE, "::1"]])
    async with fetching(tmp_path, names) as fetcher:
        for name in ("a.test", "b.test", "c.test"):
            with pytest.raises(errors.DownloadFailed):
                await get(fetcher, outside.url(host=name))
    assert outside.connections == 0


async def test_rebinding_gains_nothing(tmp_path: Path, outside: Site, inside: Site) -> None:
    """The name is resolved once per hop, and the connection goes to the address that was checked."""
    names = Names(rebind_test=[[OUTSIDE], [INSIDE]])
    async with fetching(tmp_path, names) as fetcher:
        assert await get(fetcher, outside.url(host="rebind.test")) == BODY
        assert names.questions == ["rebind.test"]
        with pytest.raises(errors.DownloadFailed):
            await get(fetcher, outside.url(host="rebind.test"))


async def test_rebinding_between_hops_gains_nothing(tmp_path: Path, outside: Site, inside: Site) -> None:
    """A redirect to the same name is resolved and checked again."""
    outside.answers["/away"] = redirect(f"http://rebind.test:{inside.port}/clip")
    async with fetching(tmp_path, Names(rebind_test=[[OUTSIDE], [INSIDE]])) as fetcher:
        with pytest.raises(errors.DownloadFailed):
            await get(fetcher, outside.url("/away", host="rebind.test"))


async def test_sockets_connect_to_checked_addresses_only(
    tmp_path: Path, inside: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No connection is made even if aiohttp obtains another address than the guard."""

    async def elsewhere(_: object, host: str, port: int = 0, **__: object) -> list[Any]:
        return [{"hostname": host, "host": INSIDE, "port": port, "family": 2, "proto": 6, "flags": 0}]

    monkeypatch.setattr(fetch._Pinned, "resolve", elsewhere)
    async with fetching(tmp_path, Names(clips_test=[[OUTSIDE]])) as fetcher:
        with pytest.raises(errors.DownloadFailed):
            await get(fetcher, inside.url(host="clips.test"))


def test_ports_are_limited_except_for_allowed_hosts() -> None:
    """A public host is reached on the usual ports only; an allowed host or network on any port, or on the named one."""
    assert Settings().fetch_ports == (80, 443, 8000, 8080, 8443)
    guard = egress.EgressGuard(
        Settings.model_validate(
            {"fetch_allow": "media.internal files.internal:9000 10.1.0.0/16 [fd00::1]:9000 fd11::/16"}
        )
    )
    public, private, allowed = (ipaddress.ip_address(a) for a in ("8.8.8.8", "10.2.0.1", "10.1.0.1"))
    guard.check("example.com", 80, [public])
    with pytest.raises(errors.DownloadFailed, match="Port 22 is not allowed"):
        guard.check("example.com", 22, [public])
    guard.check("example.com", 22, [allowed])
    with pytest.raises(errors.DownloadFailed, match="Port 22"):
        guard.check("example.com", 22, [public, allowed])
    guard.check("media.internal", 22, [private])
    guard.check("Media.Internal.", 22, [private])
    with pytest.raises(errors.DownloadFailed):
        guard.check("not.media.internal", 80, [private])
    guard.check("files.internal", 9000, [private])
    with pytest.raises(errors.DownloadFailed):
        guard.check("files.internal", 80, [private])
    guard.check("fd00::1", 9000, [ipaddress.ip_address("fd00::1")])
    guard.check("example.com", 1, [ipaddress.ip_address("fd11::5")])
    with pytest.raises(errors.DownloadFailed):
        guard.check("example.com", 80, [ipaddress.ip_address("::ffff:10.1.0.1")])
    for mistake in ("10.1.0.0/99", "media.internal/16", "media.internal:port"):
        with pytest.raises(ValueError, match=r"."):
            egress.EgressGuard(Settings.model_validate({"fetch_allow": mistake}))


async def test_a_refusal_reveals_nothing_about_our_network(tmp_path: Path, inside: Site) -> None:
    """Unknown, forbidden and unreachable look alike from outside."""
    unused = socket.create_server((OUTSIDE, 0))
    port = unused.getsockname()[1]
    unused.close()
    messages = set()
    async with fetching(tmp_path, Names(inside_test=[[INSIDE]])) as fetcher:
        for url in (inside.url(host="inside.test"), inside.url(), "http://no.such.test/", f"http://{OUTSIDE}:{port}/"):
            with pytest.raises(errors.DownloadFailed) as caught:
                await get(fetcher, url)
            messages.add(str(caught.value))
            assert caught.value.__cause__ is None
    assert messages == {errors.DownloadFailed.message}


# Redirects


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
async def test_redirects_are_followed(tmp_path: Path, outside: Site, status: str) -> None:
    """Absolute, relative and scheme-relative locations are followed for every redirecting status."""
    outside.answers |= {
        "/a/1": redirect(outside.url("/a/2"), status),
        "/a/2": redirect("3", status),
        "/a/3": redirect(f"//{OUTSIDE}:{outside.port}/a/4", status),
        "/a/4": redirect("/clip", status),
    }
    async with fetching(tmp_path) as fetcher:
        assert await get(fetcher, outside.url("/a/1")) == BODY
    assert len(outside.requests) == 5


async def test_five_redirects_are_followed_and_no_sixth(tmp_path: Path, outside: Site) -> None:
    """A chain ends after five, and a loop with it."""
    outside.answers |= {f"/{number}": redirect(f"/{number - 1}") for number in range(1, 7)} | {"/0": response(BODY)}
    outside.answers["/loop"] = redirect("/loop")
    async with fetching(tmp_path) as fetcher:
        assert await get(fetcher, outside.url("/5")) == BODY
        for path in ("/6", "/loop"):
            with pytest.raises(errors.DownloadFailed, match="more than 5"):
                await get(fetcher, outside.url(path))


async def test_a_redirect_inside_is_refused(tmp_path: Path, outside: Site, inside: Site) -> None:
    """A redirect is checked like the first URL, whatever spelling or scheme it uses."""
    locations = [
        inside.url(),
        f"//{INSIDE}:{inside.port}/clip",
        f"http://2130706433:{inside.port}/clip",
        f"http://[::ffff:127.0.0.1]:{inside.port}/clip",
        "http://169.254.169.254/latest/meta-data/",
        f"http://user:pass@{OUTSIDE}:{outside.port}/clip",
        "file:///etc/passwd",
        "ftp://127.0.0.2/clip",
        "http://[::1",
        "http://127.0.0.2:99999/",
        "",
    ]
    outside.answers |= {f"/{number}": redirect(location) for number, location in enumerate(locations)}
    outside.answers["/none"] = response(b"", "302 Found")
    outside.answers["/latin"] = response(b"", "302 Found").replace(
        b"\r\n\r\n", b"\r\nLocation: http://h/\xe4\xff\r\n\r\n"
    )
    outside.answers["/other"] = response(BODY, "300 Multiple Choices", "Location: /clip")
    async with fetching(tmp_path) as fetcher:
        for path in (*map(str, range(len(locations))), "none", "latin", "other"):
            with pytest.raises((errors.DownloadFailed, errors.InvalidAudioUrl)):
                await get(fetcher, outside.url(f"/{path}"))


@pytest.mark.parametrize(
    ("origin", "location", "allowed"),
    [
        ("http://h/", "https://h/x", True),
        ("https://h/", "https://other/x", True),
        ("https://h/", "//other/x", True),
        ("https://h/", "http://h/x", False),
        ("https://h/", "HTTP://h/x", False),
    ],
)
def test_https_is_not_left_for_http(origin: str, location: str, *, allowed: bool) -> None:
    """A redirect may raise the protection of a download, never lower it."""
    with contextlib.nullcontext() if allowed else pytest.raises(errors.DownloadFailed, match="https to http"):
        assert fetch._next_hop(egress.parse_url(origin), location).scheme == "https"


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
        "gzip": response(gzip.compress(BODY), "200 OK", "Content-Encoding: gzip"),
        "gzip-bomb": response(gzip.compress(bytes(50 * MIB)), "200 OK", "Content-Encoding: gzip"),
        "two-codings": response(BODY, "200 OK", "Content-Encoding: identity, gzip"),
        "unknown-coding": response(BODY, "200 OK", "Content-Encoding: zstd"),
        "switching": response(b"", "101 Switching Protocols", "Upgrade: websocket", "Connection: upgrade"),
    }


@pytest.mark.parametrize("name", _malformed())
async def test_a_malformed_answer_is_a_failed_download(tmp_path: Path, outside: Site, name: str) -> None:
    """A body that is cut, compressed or malformed is `DownloadFailed`, without a long wait."""
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
    """A host that drops packets is abandoned after the connect timeout."""
    with socket.create_server((OUTSIDE, 0), backlog=0) as full, contextlib.ExitStack() as queued:
        address = full.getsockname()
        for _ in range(8):  # fill the backlog, so that further handshakes are not answered
            client = queued.enter_context(socket.socket())
            client.settimeout(0)
            client.connect_ex(address)
        async with fetching(tmp_path, fetch_connect_timeout_s=0.2) as fetcher:
            began = time.perf_counter()
            with pytest.raises(errors.DownloadTimeout):
                await get(fetcher, f"http://{OUTSIDE}:{address[1]}/clip")
            assert time.perf_counter() - began < 10


async def test_the_consumers_time_is_not_the_downloads(tmp_path: Path, outside: Site) -> None:
    """The deadline covers the download only, not the use of the file."""
    async with fetching(tmp_path, fetch_timeout_s=1) as fetcher, fetcher.fetch(outside.url()) as path:
        await asyncio.sleep(1.1)
        assert path.read_bytes() == BODY


async def test_downloads_share_a_bounded_disk(tmp_path: Path, outside: Site) -> None:
    """A download is refused while others fill the disk that downloads may use, and fits later."""
    outside.answers |= {"/half": response(bytes(MIB // 2)), "/more": response(bytes(MIB // 2 + 1))}
    async with fetching(tmp_path, max_downloads_bytes=MIB) as fetcher:
        async with fetcher.fetch(outside.url("/half")):
            with pytest.raises(errors.Overloaded):
                await get(fetcher, outside.url("/more"))
            assert len(await get(fetcher, outside.url("/half"))) == MIB // 2
        assert len(await get(fetcher, outside.url("/more"))) == MIB // 2 + 1


async def test_no_tenant_fills_the_disk_of_downloads(tmp_path: Path, outside: Site) -> None:
    """One tenant's downloads leave disk for those of another; without tenants, downloads may fill all of it."""
    outside.answers |= {"/part": response(bytes(MIB)), "/small": response(bytes(MIB // 8))}
    async with fetching(tmp_path, max_downloads_bytes=8 * MIB) as fetcher, contextlib.AsyncExitStack() as under_way:
        for _ in range(7):
            await under_way.enter_async_context(fetcher.fetch(outside.url("/part"), SchedulingClass("greedy")))
        with pytest.raises(errors.Overloaded) as caught:
            await get(fetcher, outside.url("/part"), SchedulingClass("greedy"))
        assert caught.value.reason == "downloads"
        async with fetcher.fetch(outside.url("/small"), SchedulingClass("other")) as path:
            assert path.stat().st_size == MIB // 8
    async with fetching(tmp_path, max_downloads_bytes=8 * MIB) as fetcher, contextlib.AsyncExitStack() as under_way:
        for _ in range(8):
            await under_way.enter_async_context(fetcher.fetch(outside.url("/part")))


class SlowNames:
    """A resolver that answers the names `slow…` only once `go` is set."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.asked: list[str] = []

    def __call__(self, host: str, port: int, **options: Any) -> list[Any]:
        self.asked.append(host)
        if host.startswith("slow"):
            self.go.wait(60)
            raise OSError
        return list(socket.getaddrinfo(OUTSIDE, port, **options))


async def test_one_tenants_slow_names_hold_up_no_other_tenant(tmp_path: Path, outside: Site) -> None:
    """Lookups outlive their requests and keep their tenant's part of the threads; that tenant's requests time out."""
    names = SlowNames()
    fast = f"http://fast.test:{outside.port}/clip"
    async with fetching(tmp_path, names, fetch_timeout_s=1) as fetcher:
        slow = (get(fetcher, f"http://slow{number}.test/clip", SchedulingClass("greedy")) for number in range(40))
        outcomes = await asyncio.gather(*slow, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {errors.DownloadTimeout}
        assert len(names.asked) == 16, "half of the threads"
        others = (get(fetcher, f"http://slow{number}.test/clip", SchedulingClass("second")) for number in range(40))
        await asyncio.gather(*others, return_exceptions=True)
        with pytest.raises(errors.DownloadTimeout):
            await get(fetcher, fast, SchedulingClass("greedy"))
        fetcher._settings = fetcher._settings.model_copy(update={"fetch_timeout_s": 30})
        assert await get(fetcher, fast, SchedulingClass("other")) == BODY
        waiting = asyncio.create_task(get(fetcher, fast, SchedulingClass("greedy")))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        names.go.set()
        assert await waiting == BODY, "queued lookups start as soon as threads are free"
        assert "slow39.test" not in names.asked, "its request had timed out in the queue"


async def test_many_lookups_of_one_tenant_are_all_served(tmp_path: Path, outside: Site) -> None:
    """Lookups in excess of the threads are queued, not refused."""
    async with fetching(tmp_path, SlowNames()) as fetcher:
        url = f"http://fast.test:{outside.port}/clip"
        assert await asyncio.gather(*(get(fetcher, url, SchedulingClass("one")) for _ in range(100))) == [BODY] * 100


@pytest.mark.parametrize("when", ["write", "close"])
async def test_a_full_disk_is_overload(
    tmp_path: Path, outside: Site, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """A full disk is `Overloaded`, whether a write or the final flush finds it full."""
    outside.answers["/big"] = response(bytes(MIB if when == "write" else 1000))
    real = Path.open

    def full(path: Path, mode: str, **options: Any) -> Any:
        real(path, mode).close()
        return real(Path("/dev/full") if tmp_path in path.parents else path, mode.replace("x", "w"), **options)

    async with fetching(tmp_path) as fetcher:
        monkeypatch.setattr(Path, "open", full)
        with pytest.raises(errors.Overloaded):
            await get(fetcher, outside.url("/big"))


async def test_a_file_that_cannot_be_created_is_overload(
    tmp_path: Path, outside: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running out of descriptors for the file is `Overloaded`."""

    def full(*_: object, **__: object) -> Any:
        raise OSError(errno.EMFILE, "too many open files")

    async with fetching(tmp_path) as fetcher:
        monkeypatch.setattr(Path, "open", full)
        with pytest.raises(errors.Overloaded):
            await get(fetcher, outside.url())


async def test_two_hundred_cancelled_downloads_leave_nothing(tmp_path: Path, outside: Site) -> None:
    """Cancelled at any moment, a download leaves no file, no descriptor, and no counted byte."""

    async def slow(writer: asyncio.StreamWriter) -> None:
        for piece in range(0, len(BODY), 64):
            writer.write(response(BODY)[:-1024] * (not piece) + BODY[piece : piece + 64])
            await writer.drain()
            await asyncio.sleep(0.01)

    outside.answers["/slow"] = slow
    process = psutil.Process()
    async with fetching(tmp_path) as fetcher:
        await get(fetcher, outside.url())
        before = process.num_fds()

        async def cancelled(number: int) -> None:
            task = asyncio.create_task(get(fetcher, outside.url("/slow")))
            await asyncio.sleep(number / 1000)
            task.cancel()
            await asyncio.wait((task,))

        await asyncio.gather(*(cancelled(number) for number in range(200)))
        async with asyncio.timeout(10):
            while process.num_fds() > before:  # noqa: ASYNC110 - the server's ends close in their own time
                await asyncio.sleep(0.02)


# The directory of downloads


ABANDON = """
import asyncio, os, signal, sys
from pathlib import Path
from serving.audio.fetch import Fetcher
from serving.config import Settings

async def main():
    fetcher = Fetcher(Settings(download_dir=Path(sys.argv[1])))
    await fetcher.start()
    (fetcher._downloads._directory / "left").write_text("over")
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_directories_of_killed_services_are_removed_and_those_in_use_are_kept(
    tmp_path: Path, outside: Site
) -> None:
    """A starting service removes the downloads of a killed service, and keeps those of a running one."""
    dead = await asyncio.create_subprocess_exec(sys.executable, "-c", ABANDON, str(tmp_path))
    await dead.wait()
    (left,) = files(tmp_path)
    first, second = (Fetcher(Settings(download_dir=tmp_path, fetch_allow=(OUTSIDE,))) for _ in range(2))
    await first.start()
    assert not left.parent.exists()
    async with first.fetch(outside.url()) as path:
        await second.start()
        assert path.read_bytes() == BODY
        await second.stop()
        assert path.read_bytes() == BODY
    await first.stop()
    await first.stop()
    assert not list(tmp_path.iterdir())  # noqa: ASYNC240 - not a server


# TLS

KEY = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgulGdecrfiEFoyEXX
CQxWg29PVSEYQKXSLdWoE0qqJRKhRANCAASQYWP9BnmtxyU86sviAHPS0DML81D+
SLfu8VTi6ZTAZk1QovggzlgcL29mclPOjqdnhMKP/coEo1ImTOwXz/7G
-----END PRIVATE KEY-----
"""
CERTIFICATE = """-----BEGIN CERTIFICATE-----
MIIBlzCCAT6gAwIBAgIUUBtczv+7A4XlI23QhoY+DqruAiEwCgYIKoZIzj0EAwIw
FTETMBEGA1UEAwwKY2xpcHMudGVzdDAgFw0yNjExMjIyMDAzNDZaGA8yMTI2MTAy
OTIwMDM0NlowFTETMBEGA1UEAwwKY2xpcHMudGVzdDBZMBMGByqGSM49AgEGCCqG
SM49AwEHA0IABJBhY/0Gea3HJTzqy+IAc9LQMwvzUP5It+7xVOLplMBmTVCi+CDO
WBwvb2ZyU86Op2eEwo/9ygSjUiZM7BfP/sajajBoMB0GA1UdDgQWBBSfCuOj5bbO
zBkcxDNTzapfgvvKBjAfBgNVHSMEGDAWgBSfCuOj5bbOzBkcxDNTzapfgvvKBjAP
BgNVHRMBAf8EBTADAQH/MBUGA1UdEQQOMAyCCmNsaXBzLnRlc3QwCgYIKoZIzj0E
AwIDRwAwRAIgcSk/DBErndpwhq12bpt93WFiYV3YDLvja+7hZzjixHgCIA540QeN
5/laH67m92JSHPeO1Jn+usg6yQj0KzyHxw0U
-----END CERTIFICATE-----
"""
"""Self-signed for clips.test, made for this test and used for nothing else."""


@pytest.mark.parametrize(("trusted", "host"), [(True, "clips.test"), (True, "other.test"), (False, "clips.test")])
async def test_https_is_verified_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, trusted: bool, host: str
) -> None:
    """The certificate must be trusted and name the host, though the connection goes to a pinned address."""
    (tmp_path / "pem").write_text(KEY + CERTIFICATE)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "pem")
    client = ssl.create_default_context(cadata=CERTIFICATE) if trusted else ssl.create_default_context()
    monkeypatch.setattr(aiohttp.connector, "_SSL_CONTEXT_VERIFIED", client)
    names = Names(clips_test=[[OUTSIDE]], other_test=[[OUTSIDE]])
    site = Site(OUTSIDE, {"/clip": response(BODY)})
    good = trusted and host == "clips.test"
    async with site.running(server), fetching(tmp_path / "downloads", names) as fetcher:
        with contextlib.nullcontext() if good else pytest.raises(errors.DownloadFailed):
            assert await get(fetcher, f"https://{host}:{site.port}/clip") == BODY
    assert len(site.requests) == good


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
        assert isinstance(fetch._translate(kind.__new__(kind)), errors.DownloadTimeout)
