"""Bounds of what a server may send (headers, 1xx answers, tiny chunks, a slow body) and of a tenant's downloads."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from typing import TYPE_CHECKING

import pytest

from serving import errors
from serving.audio import fetch
from serving.types import SchedulingClass
from tests.audio.sites import BODY, MIB, Site, fetching, get, response

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
TOO_LONG = "Failed to download multimodal content. The server's headers are too long."
TOO_SMALL = "Failed to download multimodal content. The server sends the file in pieces that are too small."


def flood(first: bytes, piece: bytes) -> Answer:
    """Return an answer without end."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(first)
        while True:
            writer.write(piece)
            await writer.drain()

    return answer


def chunks(sizes: list[int]) -> bytes:
    """Return a complete answer in chunks of these sizes."""
    return CHUNKED + b"".join(b"%x\r\n%s\r\n" % (size, b"a" * size) for size in sizes) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("size", "more"),
    [(1, b""), (8, b""), (23, b""), (1, b";name=value"), (1, b";" + b"x" * 40), (100, b""), (255, b"")],
)
async def test_a_flood_of_tiny_chunks_is_refused_at_once(tmp_path: Path, outside: Site, size: int, more: bytes) -> None:
    """Chunks of a small mean size are refused after a few thousand, with their cause, long before the timeout."""
    outside.answers["/flood"] = flood(CHUNKED, (b"%x%s\r\n%s\r\n" % (size, more, b"a" * size)) * 1000)
    async with fetching(tmp_path, fetch_timeout_s=60) as fetcher:
        began = time.perf_counter()
        with pytest.raises(errors.DownloadFailed) as caught:
            await get(fetcher, outside.url("/flood"))
        assert time.perf_counter() - began < 20
        assert str(caught.value) == TOO_SMALL
        assert await get(fetcher, outside.url()) == BODY


@pytest.mark.parametrize(
    "sizes",
    [
        [1] * 4000,
        [32] * 32_000,  # a frame of AMR for each chunk, 10 minutes
        [300] * 50_000,
        [1, 65_536] * 40,
        [2 * MIB],
        [65_536] * 40 + [1] * 4000,
    ],
    ids=lambda sizes: f"{len(sizes)}x{sizes[-1]}",
)
async def test_chunks_that_servers_send_are_read(tmp_path: Path, outside: Site, sizes: list[int]) -> None:
    """A few tiny chunks, and many small ones, are an ordinary body."""
    outside.answers["/chunks"] = chunks(sizes)
    async with fetching(tmp_path) as fetcher:
        assert await get(fetcher, outside.url("/chunks")) == b"a" * sum(sizes)


async def test_a_body_of_line_ends_is_not_taken_for_chunks(tmp_path: Path, outside: Site) -> None:
    """The bytes of a body do not count, only its chunks: 16-bit silence around the value 2573 is line ends."""
    body = b"\r\n" * MIB
    outside.answers |= {"/plain": response(body), "/chunk": CHUNKED + b"200000\r\n" + body + b"\r\n0\r\n\r\n"}
    async with fetching(tmp_path) as fetcher:
        assert await get(fetcher, outside.url("/plain")) == body
        assert await get(fetcher, outside.url("/chunk")) == body


INTERIM = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n"

ENDLESS: dict[str, tuple[bytes, bytes]] = {
    "100": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    "102": (b"", b"HTTP/1.1 102 Processing\r\n\r\n" * 100),
    "103 with headers": (b"", INTERIM * 100),
    "one header": (b"HTTP/1.1 200 OK\r\nX: ", b"x" * 4096),
    "many headers": (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 1000),
    "status line": (b"HTTP/1.1 200 ", b"x" * 4096),
    "header name": (b"HTTP/1.1 200 OK\r\n", b"x" * 4096),
    "continued header": (b"HTTP/1.1 200 OK\r\nX: y", b"\r\n y" * 1000),
    "trailers": (CHUNKED + b"3\r\nabc\r\n0\r\n", b"X: y\r\n" * 1000),
    "chunk extension": (CHUNKED + b"3;", b"x" * 4096),
    "blank lines": (b"", b"\r\n" * 2048),
}


@pytest.mark.parametrize("name", ENDLESS)
async def test_answers_without_end_are_refused_at_once(tmp_path: Path, outside: Site, name: str) -> None:
    """1xx answers, status lines, headers, trailers and chunk extensions are bounded in number and in size."""
    outside.answers["/endless"] = flood(*ENDLESS[name])
    async with fetching(tmp_path, fetch_timeout_s=60) as fetcher:
        began = time.perf_counter()
        with pytest.raises(errors.DownloadFailed) as caught:
            await get(fetcher, outside.url("/endless"))
        assert time.perf_counter() - began < 20
        if name in ("100", "102", "103 with headers"):
            assert str(caught.value) == TOO_LONG


async def test_headers_that_servers_send_are_accepted(tmp_path: Path, outside: Site) -> None:
    """A few 1xx answers, a long cookie, a policy of 40 kB and 300 headers are ordinary."""
    outside.answers |= {
        "/early": INTERIM * 10 + b"HTTP/1.1 100 Continue\r\n\r\n" + response(BODY),
        "/cookie": response(BODY, "200 OK", "Set-Cookie: a=" + "x" * 9000),
        "/policy": response(BODY, "200 OK", "Content-Security-Policy: " + "x" * 40_000),
        "/many": response(BODY, "200 OK", *[f"X-{number}: {'y' * 60}" for number in range(300)]),
    }
    async with fetching(tmp_path) as fetcher:
        for path in ("/early", "/cookie", "/policy", "/many"):
            assert await get(fetcher, outside.url(path)) == BODY


def dripping(first: bytes, drop: bytes, interval_s: float) -> Answer:
    """Return an answer that sends `drop` at intervals."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(first)
        for number in itertools.count():
            writer.write(drop * bool(number))
            await writer.drain()
            await asyncio.sleep(interval_s)

    return answer


@pytest.mark.parametrize(
    ("first", "drop"),
    [
        (response(b"", length=100_000), b"a"),
        (CHUNKED, b"1\r\na\r\n"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"a" * 10),
        (response(b"a" * 5000, length=100_000), b""),
    ],
)
async def test_a_slow_body_is_given_up(
    tmp_path: Path, outside: Site, monkeypatch: pytest.MonkeyPatch, first: bytes, drop: bytes
) -> None:
    """A body below the least rate is given up within two windows, however it began, and the error names the rate."""
    monkeypatch.setattr(fetch, "_RATE_WINDOW_S", 0.5)
    outside.answers["/drip"] = dripping(first, drop, 0.02)
    async with fetching(tmp_path, fetch_timeout_s=60) as fetcher:
        began = time.perf_counter()
        with pytest.raises(errors.DownloadTimeout) as caught:
            await get(fetcher, outside.url("/drip"))
        assert time.perf_counter() - began < 10
    assert str(caught.value) == (
        "Download the media resource timed out during the data inspection process. "
        "The server sends fewer than 1000 bytes per second."
    )


async def test_a_body_at_the_least_rate_is_read(tmp_path: Path, outside: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate is averaged: a body that comes in bursts, and one after long silence before it, are read."""
    monkeypatch.setattr(fetch, "_RATE_WINDOW_S", 0.5)

    async def bursts(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(1.5)
        writer.write(response(b"", length=5000))
        for _ in range(5):
            writer.write(b"a" * 1000)
            await writer.drain()
            await asyncio.sleep(0.35)

    outside.answers["/bursts"] = bursts
    async with fetching(tmp_path, fetch_min_bytes_per_s=1000) as fetcher:
        assert await get(fetcher, outside.url("/bursts")) == b"a" * 5000
    outside.answers["/drip"] = dripping(response(b"", length=50), b"a", 0.02)
    async with fetching(tmp_path, fetch_min_bytes_per_s=0) as fetcher:
        assert await get(fetcher, outside.url("/drip")) == b"a" * 50


async def test_a_tenant_runs_its_share_of_downloads(tmp_path: Path, outside: Site) -> None:
    """One tenant runs at most two thirds of all downloads; they are free when they end; the next tenant finds some."""
    outside.answers["/silent"] = dripping(b"", b"", 1)
    greedy, other = SchedulingClass("greedy"), SchedulingClass("other")
    async with fetching(tmp_path, max_downloads=9) as fetcher:
        held = [asyncio.create_task(get(fetcher, outside.url("/silent"), greedy)) for _ in range(9)]
        await asyncio.sleep(0.5)
        refused = [task for task in held if task.done()]
        assert [type(task.exception()) for task in refused] == [errors.Overloaded] * 3
        assert fetcher.running == 6
        assert await get(fetcher, outside.url(), other) == BODY
        with pytest.raises(errors.Overloaded) as caught:
            await get(fetcher, outside.url(), greedy)
        assert caught.value.reason == "downloads"
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        assert fetcher.running == 0
        assert await get(fetcher, outside.url(), greedy) == BODY


async def test_a_finished_download_is_not_a_running_one(tmp_path: Path, outside: Site) -> None:
    """A file that waits for an audio worker holds disk, and no slot of the running downloads."""
    async with fetching(tmp_path, max_downloads=2) as fetcher, contextlib.AsyncExitStack() as used:
        for _ in range(5):
            await used.enter_async_context(fetcher.fetch(outside.url(), SchedulingClass("one")))
        assert fetcher.running == 0
