"""Downloads of clips, behind the egress guard.

For every hop we resolve the host once, and the guard checks all of its addresses. The sockets then connect to exactly
those addresses: a name that resolves differently the next time (rebinding), or that another parser reads differently,
gains nothing. Source: PROTOCOL 7.3.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import ipaddress
import logging
import os
import shutil
import socket
import tempfile
import uuid
from contextlib import asynccontextmanager, contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urljoin

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from serving.audio.dns import Resolver
from serving.audio.egress import EgressGuard, parse_url
from serving.errors import (
    AudioEmpty,
    AudioTooLarge,
    CaptionerError,
    DownloadFailed,
    DownloadTimeout,
    InvalidAudioUrl,
    Overloaded,
)
from serving.scheduling.shared_capacity import SharedCapacity
from serving.types import NO_TENANT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
    from typing import BinaryIO

    from aiohttp import AddrInfoType
    from yarl import URL

    from serving.config import Settings
    from serving.scheduling.shared_capacity import Permit
    from serving.types import SchedulingClass

MAX_REDIRECTS = 5

_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_HEADERS = {"User-Agent": "captioner", "Accept-Encoding": "identity"}
_CHUNK_BYTES = 256 * 1024
_DOWNLOADS_PREFIX = "captioner-downloads-"

TRANSLATION: Mapping[type[aiohttp.ClientError], type[CaptionerError]] = {
    aiohttp.ClientConnectionError: DownloadFailed,
    aiohttp.ClientPayloadError: DownloadFailed,
    aiohttp.ClientResponseError: DownloadFailed,
    aiohttp.InvalidURL: InvalidAudioUrl,
    aiohttp.NonHttpUrlClientError: InvalidAudioUrl,
    aiohttp.RedirectClientError: DownloadFailed,
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
        self._downloads: _DownloadDirectory | None = None

    @property
    def used_bytes(self) -> int:
        """Disk used by downloads, in bytes."""
        return self._downloads.used_bytes if self._downloads else 0

    async def start(self) -> None:
        """Create the directory for downloads, and remove those that killed services left behind."""
        self._resolver = Resolver(self._getaddrinfo, patience_s=self._settings.fetch_timeout_s / 2)
        self._downloads = _DownloadDirectory(
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

        Follows up to 5 redirects, but none from https to http. Sends no credentials, cookies or referrer, uses no
        proxy, and refuses a compressed body.

        Raises `InvalidAudioUrl`, `DownloadFailed`, `DownloadTimeout`, `AudioTooLarge`, `AudioEmpty`, and `Overloaded`
        when downloads fill the disk that they may use, or the tenant's downloads fill its part of that disk.
        """
        hop = parse_url(url)
        if self._downloads is None:
            raise RuntimeError("the fetcher is not running")
        async with self._downloads.file(scheduling_class) as file:
            with _translated():
                async with asyncio.timeout(self._settings.fetch_timeout_s):
                    await self._download(hop, file, scheduling_class)
                file.close()
            if not file.permit.amount:
                raise AudioEmpty
            yield file.path

    async def _download(self, hop: URL, file: _DownloadFile, scheduling_class: SchedulingClass) -> None:
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
        connector = aiohttp.TCPConnector(resolver=pinned, socket_factory=pinned.socket, use_dns_cache=False)
        session = aiohttp.ClientSession(
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
        """Return every address of the host, literal or name. Raises `DownloadFailed` unless all of them are allowed."""
        try:
            found = await self._resolver.resolve(host, port, scheduling_class)
        except (OSError, UnicodeError) as error:
            log.info("cannot resolve host", extra={"host": host, "reason": str(error)})
            raise DownloadFailed from None
        self._guard.check(host, port, (ipaddress.ip_address(info[4][0]) for info in found))
        return found

    async def _read(self, response: aiohttp.ClientResponse, file: _DownloadFile) -> None:
        if response.status // 100 != HTTPStatus.OK // 100:
            raise DownloadFailed(f"{DownloadFailed.message} The server answered with status {response.status}.")
        if response.headers.get("Content-Encoding", "identity").lower() not in ("identity", ""):
            raise DownloadFailed(f"{DownloadFailed.message} The server sent a compressed body.")
        limit = self._settings.max_url_bytes
        if (response.content_length or 0) > limit:
            raise AudioTooLarge
        async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
            if file.permit.amount + len(chunk) > limit:
                raise AudioTooLarge
            file.write(chunk)


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


class _DownloadDirectory:
    """A private directory for the downloads under way, and the bound on their total size.

    The directory is locked. A killed service leaves its directory but not its lock, so the next service recognises the
    directory as abandoned and removes it.
    """

    def __init__(self, parent: Path, max_bytes: int) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        for other in parent.glob(f"{_DOWNLOADS_PREFIX}*"):
            with suppress(OSError):  # its owner is running, or is another user
                os.close(_lock(other))
                shutil.rmtree(other)
        # Locked before it gets a name that other services sweep.
        new = Path(tempfile.mkdtemp(prefix=f".{_DOWNLOADS_PREFIX}", dir=parent))
        self._lock = _lock(new)
        self._directory = new.rename(parent / new.name.removeprefix("."))
        self._capacity = SharedCapacity(max_bytes, reason="downloads")

    @property
    def used_bytes(self) -> int:
        """Disk used by downloads, in bytes."""
        return self._capacity.used

    @asynccontextmanager
    async def file(self, scheduling_class: SchedulingClass) -> AsyncIterator[_DownloadFile]:
        """Create a file that is removed when the context is left. Raises `Overloaded` if it cannot be created."""
        path = self._directory / uuid.uuid4().hex
        try:
            file = _DownloadFile(self._capacity.permit(scheduling_class), path)
        except OSError:
            log.exception("cannot create a download file")
            raise Overloaded(reason="downloads") from None
        try:
            yield file
        finally:
            with suppress(OSError):
                file.close()
            try:
                # A write is not worth a thread (8 ms at worst for 256 KiB), but removing a GiB takes the disk 100 ms.
                await asyncio.shield(asyncio.to_thread(path.unlink))
            finally:
                file.permit.release()

    def remove(self) -> None:
        """Remove the directory."""
        shutil.rmtree(self._directory, ignore_errors=True)
        os.close(self._lock)


class _DownloadFile:
    """A download on its way to disk."""

    def __init__(self, permit: Permit, path: Path) -> None:
        self.path = path
        self.permit = permit
        self._file: BinaryIO = path.open("xb", buffering=_CHUNK_BYTES)

    def write(self, chunk: bytes) -> None:
        """Append `chunk`. Raises `Overloaded` if downloads use all the disk they may, `OSError` if the disk is full."""
        self.permit.grow(len(chunk))
        self._file.write(chunk)

    def close(self) -> None:
        """Flush and close the file. Raises `OSError`."""
        self._file.close()


def _lock(directory: Path) -> int:
    """Lock a directory until the returned descriptor is closed. Raises `OSError` if it is locked already."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _next_hop(url: URL, location: str | None) -> URL:
    try:
        hop = parse_url(urljoin(str(url), location or ""))
    except (InvalidAudioUrl, ValueError):
        raise DownloadFailed(f"{DownloadFailed.message} It redirects to an invalid URL.") from None
    if (url.scheme, hop.scheme) == ("https", "http"):
        raise DownloadFailed(f"{DownloadFailed.message} It redirects from https to http.")
    return hop


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
    if isinstance(error, aiohttp.ClientError):
        return next((TRANSLATION[kind] for kind in type(error).__mro__ if kind in TRANSLATION), DownloadFailed)()
    if isinstance(error, TimeoutError):
        return DownloadTimeout()
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Overloaded(reason="downloads")
    return DownloadFailed()
