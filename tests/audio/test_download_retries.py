"""Second attempts of downloads, and redirects as servers write them."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from typing import TYPE_CHECKING

import pytest

from serving import errors
from tests.audio.sites import BODY, OUTSIDE, Site, fetching, get, redirect, response

if TYPE_CHECKING:
    from pathlib import Path


class Flaky:
    """An answer that is bad a number of times, then good."""

    def __init__(self, bad: bytes | None, *, times: int = 1) -> None:
        self.bad = bad
        self.left = times
        self.asked_s: list[float] = []

    async def __call__(self, writer: asyncio.StreamWriter) -> None:
        """Answer once; `None` resets the connection."""
        self.asked_s.append(time.monotonic())
        self.left -= 1
        if self.left < 0:
            writer.write(response(BODY))
        elif self.bad is None:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        else:
            writer.write(self.bad)
        await writer.drain()


TRANSIENT = {
    "502": response(b"", "502 Bad Gateway"),
    "503": response(b"slow down", "503 Slow Down"),
    "504": response(b"", "504 Gateway Timeout"),
    "no answer": b"",
    "half an answer": b"HTTP/1.1 200",
    "reset": None,
}


@pytest.mark.parametrize("name", TRANSIENT)
async def test_a_server_that_is_not_available_is_asked_once_more(tmp_path: Path, outside: Site, name: str) -> None:
    """One transient failure is not the caller's; two are an error that clients retry."""
    once, twice = Flaky(TRANSIENT[name]), Flaky(TRANSIENT[name], times=2)
    outside.answers |= {"/once": once, "/twice": twice}
    async with fetching(tmp_path) as fetcher:
        assert await get(fetcher, outside.url("/once")) == BODY
        with pytest.raises(errors.SourceUnavailable) as caught:
            await get(fetcher, outside.url("/twice"))
    assert (len(once.asked_s), len(twice.asked_s)) == (2, 2)
    assert once.asked_s[1] - once.asked_s[0] >= 0.5
    status = f" The server answered with status {name}." if name.isdigit() else ""
    assert str(caught.value) == f"Failed to download multimodal content.{status}"


async def test_a_reset_in_the_body_restarts_the_file(tmp_path: Path, outside: Site) -> None:
    """The bytes of the first attempt are discarded, from the file and from the count."""
    attempts = 0

    async def cut(writer: asyncio.StreamWriter) -> None:
        nonlocal attempts
        attempts += 1
        writer.write(response(BODY)[: -512 if attempts == 1 else None])
        await writer.drain()
        if attempts == 1:
            await asyncio.sleep(0.2)
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    outside.answers["/cut"] = cut
    async with fetching(tmp_path) as fetcher, fetcher.fetch(outside.url("/cut")) as path:
        assert path.read_bytes() == BODY
        assert fetcher.used_bytes == len(BODY)
    assert attempts == 2


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
CUT = {
    "of a length": response(BODY[:-1], length=len(BODY)),
    "before its first byte": response(b"", length=len(BODY)),
    "within a chunk": CHUNKED + b"400\r\nabc",
    "between two chunks": CHUNKED + b"3\r\nabc\r\n",
    "within a chunk's size": CHUNKED + b"3\r\nabc\r\n4",
    "before the last line": CHUNKED + b"3\r\nabc\r\n0\r\n",
}


@pytest.mark.parametrize("name", CUT)
async def test_a_body_that_is_cut_is_asked_for_once_more(tmp_path: Path, outside: Site, name: str) -> None:
    """A connection closed without a reset, before the end of the body, is as transient as a reset."""
    once, twice = Flaky(CUT[name]), Flaky(CUT[name], times=2)
    outside.answers |= {"/once": once, "/twice": twice}
    async with fetching(tmp_path) as fetcher:
        async with fetcher.fetch(outside.url("/once")) as path:
            assert path.read_bytes() == BODY
            assert fetcher.used_bytes == len(BODY)
        with pytest.raises(errors.SourceUnavailable):
            await get(fetcher, outside.url("/twice"))
    assert (len(once.asked_s), len(twice.asked_s)) == (2, 2)


@pytest.mark.parametrize("bad", [b"3\r\nabc\r\nzz\r\n", b"3\r\nabcdef\r\n", b"-5\r\nabc\r\n"])
async def test_a_malformed_body_is_not_asked_for_again(tmp_path: Path, outside: Site, bad: bytes) -> None:
    """Framing that is no HTTP is the caller's error, after one request."""
    flaky = outside.answers["/bad"] = Flaky(CHUNKED + bad)
    async with fetching(tmp_path) as fetcher:
        with pytest.raises(errors.DownloadFailed) as caught:
            await get(fetcher, outside.url("/bad"))
    assert type(caught.value) is errors.DownloadFailed
    assert len(flaky.asked_s) == 1


async def test_a_refused_connection_is_tried_once_more(tmp_path: Path, outside: Site) -> None:
    """A server that restarts is found by the second attempt; one that is down is `SourceUnavailable`."""
    with socket.socket() as free:
        free.bind((OUTSIDE, 0))
        port = free.getsockname()[1]
    async with fetching(tmp_path) as fetcher:
        with pytest.raises(errors.SourceUnavailable):
            await get(fetcher, f"http://{OUTSIDE}:{port}/clip")
        starting = asyncio.create_task(get(fetcher, f"http://{OUTSIDE}:{port}/clip"))
        await asyncio.sleep(0.2)
        server = await asyncio.start_server(outside._serve, OUTSIDE, port)
        async with server:
            assert await starting == BODY


@pytest.mark.parametrize("status", ["400 Bad", "403 Forbidden", "404 Not Found", "429 Slow", "500 Oops", "501 No"])
async def test_other_answers_are_not_asked_for_again(tmp_path: Path, outside: Site, status: str) -> None:
    """A status that another request would not change is the caller's error, after one request."""
    flaky = outside.answers["/no"] = Flaky(response(b"", status))
    async with fetching(tmp_path) as fetcher:
        with pytest.raises(errors.DownloadFailed) as caught:
            await get(fetcher, outside.url("/no"))
    assert type(caught.value) is errors.DownloadFailed
    assert len(flaky.asked_s) == 1


async def test_forbidden_addresses_are_not_asked_for_again(tmp_path: Path, inside: Site, outside: Site) -> None:
    """A refusal of the guard is the caller's error, also on the way of a second attempt."""
    flaky = outside.answers["/away"] = Flaky(TRANSIENT["503"])
    async with fetching(tmp_path) as fetcher:
        with pytest.raises(errors.DownloadFailed) as caught:
            await get(fetcher, inside.url())
        assert type(caught.value) is errors.DownloadFailed
        pointing = asyncio.create_task(get(fetcher, outside.url("/away")))
        await asyncio.sleep(0.2)
        flaky.left, flaky.bad = 1, redirect(inside.url())
        with pytest.raises(errors.DownloadFailed) as caught:
            await pointing
        assert type(caught.value) is errors.DownloadFailed
    assert inside.connections == 0


@pytest.mark.parametrize(("wish", "least_s", "most_s"), [("2", 2.0, 4.5), ("9999", 5.0, 8.0), ("soon", 0.5, 3.0)])
async def test_the_servers_wish_for_a_delay_is_followed_within_bounds(
    tmp_path: Path, outside: Site, wish: str, least_s: float, most_s: float
) -> None:
    """`Retry-After` in seconds delays the second attempt, by 5 s at most; anything else does not."""
    flaky = outside.answers["/wish"] = Flaky(response(b"", "503 No", f"Retry-After: {wish}"))
    async with fetching(tmp_path) as fetcher:
        assert await get(fetcher, outside.url("/wish")) == BODY
    assert least_s <= flaky.asked_s[1] - flaky.asked_s[0] < most_s


async def test_the_second_attempt_is_within_the_deadline(tmp_path: Path, outside: Site) -> None:
    """Both attempts share one timeout; when it ends the second, the first failure is the answer."""
    flaky = Flaky(TRANSIENT["503"])

    async def answer(writer: asyncio.StreamWriter) -> None:
        if flaky.left == 0:
            await asyncio.sleep(60)
        await flaky(writer)

    outside.answers["/slow"] = answer
    async with fetching(tmp_path, fetch_timeout_s=1.5) as fetcher:
        began = time.perf_counter()
        with pytest.raises(errors.SourceUnavailable, match="status 503"):
            await get(fetcher, outside.url("/slow"))
        assert time.perf_counter() - began < 10


# Redirects


@pytest.mark.parametrize(
    ("location", "path"),
    [
        ("/录音.wav".encode(), "/%E5%BD%95%E9%9F%B3.wav"),
        ("/录音.wav".encode("gbk"), "/%C2%BC%D2%F4.wav"),
        ("/caf\u00e9.wav".encode("latin-1"), "/caf%E9.wav"),
        (b"/a?name=\xff\xfe&x=%41", "/a?name=%FF%FE&x=%41"),
        ("/录 音.wav".encode(), "/%E5%BD%95%20%E9%9F%B3.wav"),
        (b"  /my clip.wav ", "/my%20clip.wav"),
        (b"/clip#\xff", "/clip"),
    ],
)
async def test_raw_bytes_in_a_redirect_are_escaped(tmp_path: Path, outside: Site, location: bytes, path: str) -> None:
    """A `Location` in UTF-8, GBK or Latin-1 is followed with its bytes escaped, as browsers and curl do."""
    outside.answers |= {
        "/start": b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + location + b"\r\n\r\n",
        path: response(BODY),
    }
    async with fetching(tmp_path) as fetcher:
        assert await get(fetcher, outside.url("/start")) == BODY


@pytest.mark.parametrize("location", [b"http://127.0.0.1\xff/", b"http://\xe9vil/", b"//\xff@127.0.0.1/", b"\xff://x/"])
async def test_raw_bytes_in_a_host_are_no_host(tmp_path: Path, outside: Site, location: bytes) -> None:
    """Bytes that are not UTF-8 in the host of a redirect reach no host."""
    outside.answers["/start"] = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + location + b"\r\n\r\n"
    async with fetching(tmp_path) as fetcher:
        with pytest.raises(errors.DownloadFailed):
            await get(fetcher, outside.url("/start"))
