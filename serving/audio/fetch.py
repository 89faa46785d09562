"""Downloads of clips, behind the egress guard.

For every hop we resolve the host once, and the guard checks all of its addresses. The sockets then connect to exactly
those addresses: a name that resolves differently the next time (rebinding), or that another parser reads differently,
gains nothing. Source: PROTOCOL 7.3.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import re
import socket
import tempfile
from contextlib import asynccontextmanager, contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urljoin

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from serving.audio import content_coding
from serving.audio.bounded_http import BoundedConnector, bounded_session
from serving.audio.dns import Resolver
from serving.audio.download_directory import DownloadDirectory
from serving.audio.egress import EgressGuard, parse_url
from serving.errors import (
    AudioEmpty,
    AudioTooLarge,
    CaptionerError,
    DownloadFailed,
    DownloadTimeout,
    InvalidAudioUrl,
    Overloaded,
    SourceUnavailable,
)
from serving.scheduling.shared_capacity import SharedCapacity
from serving.types import NO_TENANT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

    from aiohttp import AddrInfoType
    from yarl import URL

    from serving.audio.download_directory import DownloadFile
    from serving.config import Settings
    from serving.types import SchedulingClass

MAX_REDIRECTS = 5

_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_HEADERS = {"User-Agent": "captioner", "Accept-Encoding": "identity"}
_CHUNK_BYTES = 256 * 1024
_RAW_BYTE = re.compile("[\udc80-\udcff]")
"""A byte of a header that is not UTF-8, as aiohttp decodes it (`surrogateescape`)."""

_UNAVAILABLE = frozenset((HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT))
_RETRY_DELAY_S, _MAX_RETRY_DELAY_S = 0.5, 5.0
"""Delay before the second attempt: the least, and the longest that a server may ask for by `Retry-After`."""

_RATE_WINDOW_S = 10.0
"""Time over which the least rate is averaged: longer than the pauses of TCP's retransmissions on a bad network."""

_ALPHA = 2.0
"""Ratio of a tenant's running downloads to the free ones: one tenant alone gets two thirds.

A download is held by the server that the tenant names, for up to `fetch_timeout_s`; less than the other capacities'
eight ninths, so that the next tenant finds free ones.
"""

TRANSLATION: Mapping[type[aiohttp.ClientError], type[CaptionerError]] = {
    aiohttp.ClientConnectionError: DownloadFailed,
    aiohttp.ClientOSError: SourceUnavailable,  # refused, reset, unreachable
    aiohttp.ClientPayloadError: SourceUnavailable,  # closed before the end of the body
    aiohttp.ClientResponseError: DownloadFailed,
    aiohttp.ClientSSLError: DownloadFailed,
    aiohttp.ConnectionTimeoutError: SourceUnavailable,
    aiohttp.InvalidURL: InvalidAudioUrl,
    aiohttp.NonHttpUrlClientError: InvalidAudioUrl,
    aiohttp.RedirectClientError: DownloadFailed,
    aiohttp.ServerDisconnectedError: SourceUnavailable,
    aiohttp.ServerTimeoutError: DownloadTimeout,
    aiohttp.UploadAbortedError: DownloadFailed,
}
"""Our exception for each exception of aiohttp. A class that is not listed has its nearest listed ancestor's."""

log = logging.getLogger(__name__)


class Fetcher:
    """A downloader of clips into temporary files. `getaddrinfo` is the resolver, with the signature of `socket`'s."""

    def __init__(self, settings: Settings, *, getaddrinfo: Callable[..., Any] = socket.getaddrinfo) -> None:
        self._settings = settings
        self._getaddrinfo = getaddrinfo
        self._guard = EgressGuard(settings)
        self._downloads: DownloadDirectory | None = None
        self._running = SharedCapacity(settings.max_downloads, reason="downloads", alpha=_ALPHA)

    @property
    def used_bytes(self) -> int:
        """Disk used by downloads, in bytes."""
        return self._downloads.used_bytes if self._downloads else 0

    @property
    def running(self) -> int:
        """Downloads that are not finished."""
        return self._running.used

    async def start(self) -> None:
        """Create the directory for downloads, and remove those that killed services left behind."""
        self._resolver = Resolver(self._getaddrinfo, patience_s=self._settings.fetch_timeout_s / 2)
        self._downloads = DownloadDirectory(
            self._settings.download_dir or Path(tempfile.gettempdir()), self._settings.max_downloads_bytes
        )

    async def stop(self) -> None:
        """Remove the directory. Idempotent."""
        if self._downloads is not None:
            self._resolver.stop()
            self._downloads.remove()
            self._downloads = None

    @asynccontextmanager
    async def fetch(self, url: str, scheduling_class: SchedulingClass = NO_TENANT) -> AsyncIterator[Path]:
        """Download the file behind an http(s) URL for a tenant. The file exists until the context is left.

        Follows up to 5 redirects, but none from https to http. Sends no credentials, cookies or referrer, and uses no
        proxy. A server that cannot be reached or is not available is asked once more.

        Raises `InvalidAudioUrl`, `DownloadFailed`, `SourceUnavailable`, `DownloadTimeout`, `AudioTooLarge`,
        `AudioEmpty`, and `Overloaded` when downloads fill the disk that they may use or all of their number, or the
        tenant's downloads fill its part of either.
        """
        hop = parse_url(url)
        if self._downloads is None:
            raise RuntimeError("the fetcher is not running")
        async with self._downloads.file(scheduling_class) as file:
            with self._running.acquire(scheduling_class):
                await self._attempt_twice(hop, file, scheduling_class)
            if not file.permit.amount:
                raise AudioEmpty
            yield file.path

    async def _attempt_twice(self, hop: URL, file: DownloadFile, scheduling_class: SchedulingClass) -> None:
        first: SourceUnavailable | None = None
        try:
            with _translated():
                async with asyncio.timeout(self._settings.fetch_timeout_s):
                    try:
                        with _translated():
                            await self._download(hop, file, scheduling_class)
                    except SourceUnavailable as error:
                        first = error
                        await asyncio.sleep(min(max(error.retry_after_s, _RETRY_DELAY_S), _MAX_RETRY_DELAY_S))
                        file.restart()
                        await self._download(hop, file, scheduling_class)
                file.close()
        except DownloadTimeout:
            if first is not None:
                raise first from None
            raise

    async def _download(self, hop: URL, file: DownloadFile, scheduling_class: SchedulingClass) -> None:
        for _ in range(MAX_REDIRECTS + 1):
            async with self._get(hop, scheduling_class) as response:
                if response.status not in _REDIRECTS:
                    await self._read(response, file)
                    return
                hop = _next_hop(hop, response.headers.get("Location"))
        raise DownloadFailed(f"{DownloadFailed.message} It redirects more than {MAX_REDIRECTS} times.")

    @asynccontextmanager
    async def _get(self, url: URL, scheduling_class: SchedulingClass) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send one request over a new connection: callers share nothing."""
        pinned = _Pinned(await self._resolve(cast("str", url.raw_host), cast("int", url.port), scheduling_class))
        connector = BoundedConnector(resolver=pinned, socket_factory=pinned.socket, use_dns_cache=False)
        session = bounded_session(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=_HEADERS,
            auto_decompress=False,
            trust_env=False,
            read_bufsize=_CHUNK_BYTES,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._settings.fetch_connect_timeout_s),
        )
        async with session, session.get(url, allow_redirects=False) as response:
            yield response

    async def _resolve(self, host: str, port: int, scheduling_class: SchedulingClass) -> list[AddrInfoType]:
        """Return every address of the host, literal or name. Raises `DownloadFailed` unless all of them are allowed.

        A failed lookup is not retried here: the system's resolver has retried, and the answer is the one for a
        forbidden address.
        """
        try:
            found = await self._resolver.resolve(host, port, scheduling_class)
        except (OSError, UnicodeError) as error:
            log.info("cannot resolve host", extra={"host": host, "reason": str(error)})
            raise DownloadFailed from None
        self._guard.check(host, port, (ipaddress.ip_address(info[4][0]) for info in found))
        return found

    async def _read(self, response: aiohttp.ClientResponse, file: DownloadFile) -> None:
        if response.status in _UNAVAILABLE:
            raise SourceUnavailable(
                f"{DownloadFailed.message} The server answered with status {response.status}.",
                retry_after_s=_retry_after_s(response.headers.get("Retry-After", "")),
            )
        if response.status // 100 != HTTPStatus.OK // 100:
            raise DownloadFailed(f"{DownloadFailed.message} The server answered with status {response.status}.")
        headers, limit = response.headers, self._settings.max_url_bytes
        inflater = content_coding.decoder(
            (*headers.getall("Content-Encoding", ()), *headers.getall("Transfer-Encoding", ()))
        )
        if (response.content_length or 0) > limit:
            raise AudioTooLarge
        pace = _Pace(self._settings.fetch_min_bytes_per_s)
        async with pace.enforced():
            async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
                pace.received_bytes += len(chunk)
                for piece in inflater.feed(chunk) if inflater else (chunk,):
                    if file.permit.amount + len(piece) > limit:
                        raise AudioTooLarge
                    file.write(piece)
        if inflater:
            inflater.finish()


class _Pace:
    """The least rate of one body: a server that sends less in `_RATE_WINDOW_S` is given up."""

    def __init__(self, min_bytes_per_s: int) -> None:
        self.received_bytes = 0
        self._min_bytes_per_s = min_bytes_per_s

    @asynccontextmanager
    async def enforced(self) -> AsyncIterator[None]:
        """Bound the time of the body within. Raises `DownloadTimeout`, which names the rate."""
        try:
            async with asyncio.timeout(None) as limit:
                self._check(limit, -1)
                try:
                    yield
                finally:
                    self._timer.cancel()
        except TimeoutError:
            if not limit.expired():
                raise
            rate = f"The server sends fewer than {self._min_bytes_per_s} bytes per second."
            raise DownloadTimeout(f"{DownloadTimeout.message} {rate}") from None

    def _check(self, limit: asyncio.Timeout, before_bytes: int) -> None:
        """Check the bytes of a window, and start the next. `before_bytes`: those before the window, -1 at the start."""
        loop = asyncio.get_running_loop()
        if before_bytes >= 0 and self.received_bytes - before_bytes < self._min_bytes_per_s * _RATE_WINDOW_S:
            limit.reschedule(loop.time())
        else:
            self._timer = loop.call_later(_RATE_WINDOW_S, self._check, limit, self.received_bytes)


class _Pinned(AbstractResolver):
    """A resolver that returns the checked addresses, and a factory of sockets for those addresses only."""

    def __init__(self, checked: Sequence[AddrInfoType]) -> None:
        self._checked = checked
        self._addresses = {ipaddress.ip_address(info[4][0]) for info in checked}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        del family
        return [
            ResolveResult(
                hostname=host,
                host=cast("str", info[4][0]),
                port=port,
                family=info[0],
                proto=info[2],
                flags=socket.AI_NUMERICHOST,
            )
            for info in self._checked
        ]

    async def close(self) -> None:
        """Nothing to close."""

    def socket(self, info: AddrInfoType) -> socket.socket:
        family, kind, protocol, _, address = info
        # aiohttp calls no resolver for a host that it takes for a literal, but it calls this for every connection.
        if ipaddress.ip_address(address[0]) not in self._addresses:
            raise OSError(errno.EACCES, "not an address that was checked")
        return socket.socket(family, kind, protocol)


def _next_hop(url: URL, location: str | None) -> URL:
    # Bytes that are not UTF-8 (a name in GBK or Latin-1) are escaped as they are, as browsers and curl do.
    target = _RAW_BYTE.sub(lambda raw: f"%{ord(raw[0]) - 0xDC00:02X}", location or "")
    try:
        hop = parse_url(urljoin(str(url), target))
    except (InvalidAudioUrl, ValueError):
        raise DownloadFailed(f"{DownloadFailed.message} It redirects to an invalid URL.") from None
    if (url.scheme, hop.scheme) == ("https", "http"):
        raise DownloadFailed(f"{DownloadFailed.message} It redirects from https to http.")
    return hop


def _retry_after_s(value: str) -> float:
    """Return the seconds of a `Retry-After` header; 0 for none and for a date."""
    return float(value) if re.fullmatch(r"[0-9]{1,6}", value.strip(), re.ASCII) else 0.0


@contextmanager
def _translated() -> Iterator[None]:
    """Translate the exceptions of a download into our tree; the peer's and the network's words stay in our log."""
    try:
        yield
    except CaptionerError:
        raise
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        log.info("download failed", extra={"reason": repr(error)})
        raise _translate(error) from None


def _translate(error: aiohttp.ClientError | OSError) -> CaptionerError:
    if isinstance(error, aiohttp.ClientConnectorError) and error.errno == errno.EACCES:
        return DownloadFailed()  # `_Pinned.socket`
    if isinstance(error, aiohttp.ClientError):
        return next((TRANSLATION[kind] for kind in type(error).__mro__ if kind in TRANSLATION), DownloadFailed)()
    if isinstance(error, TimeoutError):
        return DownloadTimeout()
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Overloaded(reason="downloads")
    return DownloadFailed()
