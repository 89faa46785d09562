"""Servers on loopback for tests of downloads, and a fetcher to which one of them is public.

Two loopback addresses stand for the two sides of the guard: 127.0.0.2 is allowed and acts as the public internet,
127.0.0.1 is not and acts as our own network.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, Any

from serving.audio.fetch import Fetcher
from serving.config import Settings
from serving.types import NO_TENANT

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from serving.types import SchedulingClass

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
