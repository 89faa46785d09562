"""Uploaded files: signed policies that allow them, and the store that keeps them for a while (PROTOCOL 6).

A policy allows whoever holds it to store files under one directory of keys, for a few minutes; only the caller and for
the model it was issued to can they be used. What is stored may be read for `settings.upload_ttl_s`.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import tempfile
import time
import uuid
from collections import Counter
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

from serving.errors import (
    AudioTooLarge,
    KeyNotAllowed,
    Overloaded,
    PolicyExpired,
    PolicyInvalid,
    UploadExists,
    UploadNotFound,
    UploadTooLarge,
)
from serving.scheduling.shared_capacity import SharedCapacity
from serving.types import SchedulingClass

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from contextlib import AbstractAsyncContextManager

    from serving.config import Settings
    from serving.scheduling.shared_capacity import Permit

_FILE_NAME = re.compile(r"[^/\\\x00-\x1f\x7f]+")
_KEY_BYTES = 1023
"""The longest key of an object store."""

_SWEEP_S = 600.0
_GRACE_S = 3600.0
"""An expired file stays this long for those who had opened it, and a half-written one for its writer."""

_ALPHA = 1.0
"""One owner may have as much as it leaves free. Files stay for days, so others cannot wait until some are gone."""

_SHARE_FULL = "Your uploaded files take all the space that one caller's may take. They are removed when they expire."

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class UploadPolicy:
    """What a client needs to upload: it sends `policy` and `signature` with a key below `upload_dir`."""

    policy: str
    signature: str
    upload_dir: str
    expires_in_s: int
    max_bytes: int


@dataclass(frozen=True, slots=True)
class UploadGrant:
    """The right to store one file of at most `max_bytes`, for its owner to use with one model."""

    key: str
    owner: str
    model: str
    max_bytes: int


class Upload(Protocol):
    """A file that is being received."""

    async def write(self, chunk: bytes) -> None:
        """Append. Raises `UploadTooLarge`, and `Overloaded` when there is no room."""
        ...


class UploadStore(Protocol):
    """Where uploaded files are kept.

    `used_bytes`: disk that they take; `received_bytes`: what this process has stored so far.
    """

    @property
    def used_bytes(self) -> int: ...

    @property
    def received_bytes(self) -> int: ...

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def issue(self, owner: str, model: str) -> UploadPolicy:
        """Make a policy with which files can be uploaded for this caller and model."""
        ...

    def check(self, *, policy: str, signature: str, key: str) -> UploadGrant:
        """What a policy allows for this key. Raises `PolicyInvalid`, `PolicyExpired` or `KeyNotAllowed`."""
        ...

    def receive(self, grant: UploadGrant) -> AbstractAsyncContextManager[Upload]:
        """Take a file in. It is there, whole, once the context is left, and never if it is left by an exception.

        Raises `UploadExists`, on entering or leaving: nothing is overwritten.
        """
        ...

    async def open(self, key: str, *, owner: str, model: str) -> Path:
        """The path of a stored file. Raises `UploadNotFound`: unknown, expired, another caller's or model's."""
        ...


class UploadPolicies:
    """Issues policies, and checks what comes back. The same on every replica that has the same secret."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        secret = settings.upload_secret
        self._secret = secret.get_secret_value().encode() if secret else secrets.token_bytes(32)

    def issue(self, owner: str, model: str) -> UploadPolicy:
        settings, now = self._settings, time.time()
        upload_dir = f"dashscope-instant/{_digest(owner)}/{datetime.fromtimestamp(now, UTC):%Y-%m-%d}/{uuid.uuid4()}"
        terms = {
            "expires": now + settings.upload_policy_ttl_s,
            "upload_dir": upload_dir,
            "owner": owner,
            "model": model,
            "max_bytes": settings.max_upload_bytes,
        }
        policy = base64.b64encode(json.dumps(terms).encode()).decode()
        return UploadPolicy(
            policy, self._sign(policy), upload_dir, settings.upload_policy_ttl_s, settings.max_upload_bytes
        )

    def check(self, *, policy: str, signature: str, key: str) -> UploadGrant:
        if not hmac.compare_digest(self._sign(policy).encode(), signature.encode(errors="replace")):
            raise PolicyInvalid
        terms = json.loads(base64.b64decode(policy))
        if time.time() >= terms["expires"]:
            raise PolicyExpired
        directory, _, name = key.rpartition("/")
        if directory != terms["upload_dir"] or not _FILE_NAME.fullmatch(name) or name in (".", ".."):
            raise KeyNotAllowed
        if len(key.encode(errors="surrogatepass")) > _KEY_BYTES:
            raise KeyNotAllowed
        return UploadGrant(key, terms["owner"], terms["model"], terms["max_bytes"])

    def _sign(self, policy: str) -> str:
        digest = hmac.digest(self._secret, policy.encode(errors="surrogatepass"), "sha256")
        return base64.b64encode(digest).decode()


class DirectoryUploads(UploadPolicies):
    """An `UploadStore` in a directory, which replicas may share.

    A file's name is the hash of its owner, and that of its owner, model and key: no name of a client's touches the
    disk, and who asks with another key or for another model finds nothing. Its age is the file's own. So there is
    nothing else to keep.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        parent = settings.uploads_dir or Path(tempfile.gettempdir())
        self._directory = parent / f"captioner-uploads-{os.geteuid()}"
        self._capacity = SharedCapacity(settings.max_uploads_bytes, reason="uploads", alpha=_ALPHA)
        self.received_bytes = 0
        self._sweeping: asyncio.Task[None] | None = None

    @property
    def used_bytes(self) -> int:
        """Disk that files take, other replicas' as of the last sweep."""
        return self._capacity.used

    async def start(self) -> None:
        """Make the directory, or take it over with what it holds. Raises `PermissionError` if it is another user's."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._directory.lstat().st_uid != os.geteuid():
            raise PermissionError(f"{self._directory} belongs to another user")
        self._directory.chmod(0o700)
        await self.sweep()
        self._sweeping = asyncio.create_task(self._sweep_forever())

    async def stop(self) -> None:
        """Stop sweeping. What is stored stays. Idempotent."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.wait((self._sweeping,))
            self._sweeping = None

    @asynccontextmanager
    async def receive(self, grant: UploadGrant) -> AsyncIterator[Upload]:
        path = self._path(grant.key, grant.owner, grant.model)
        if path.exists():
            raise UploadExists
        name = f"{_digest(grant.owner)}.{uuid.uuid4().hex}.partial"
        with _Partial(self, self.permit(grant.owner), self._directory / name, grant.max_bytes) as partial:
            yield partial
            partial.publish(path)

    async def open(self, key: str, *, owner: str, model: str) -> Path:
        path = self._path(key, owner, model)
        try:
            info = path.stat()
        except FileNotFoundError:
            raise UploadNotFound from None
        if time.time() >= info.st_mtime + self._settings.upload_ttl_s:
            raise UploadNotFound
        if info.st_size > self._settings.max_upload_bytes:
            raise AudioTooLarge
        return path

    async def sweep(self) -> None:
        """Remove what is expired or was left half-written, and count what remains, other replicas' files included."""
        before = self._capacity.used_by_tenant
        found = await asyncio.to_thread(self._sweep)
        self._capacity.recount(before, found)  # by the difference, which keeps what was received meanwhile

    def permit(self, owner: str) -> Permit:
        """Return a permit for the disk that one file of `owner` takes."""
        return self._capacity.permit(SchedulingClass(_digest(owner)))

    def grow(self, permit: Permit, nbytes: int) -> None:
        """Count bytes that go to disk. Raises `Overloaded` if the disk we may use is full, or the owner's share is."""
        try:
            permit.grow(nbytes)
        except Overloaded:
            used_bytes = self._capacity.used
            if used_bytes + nbytes <= self._capacity.size:
                raise Overloaded(_SHARE_FULL, retry_after_s=60, reason="uploads") from None
            log.warning("the uploads directory is full", extra={"used_bytes": used_bytes})
            raise

    def _path(self, key: str, owner: str, model: str) -> Path:
        digest = hashlib.sha256(json.dumps([owner, model, key]).encode()).hexdigest()
        return self._directory / f"{_digest(owner)}.{digest}"

    def _sweep(self) -> Mapping[str, int]:
        """Bytes that remain, by the hash of their owner."""
        now, used = time.time(), Counter[str]()
        for entry in os.scandir(self._directory):
            with suppress(FileNotFoundError):  # another replica was faster
                info = entry.stat()
                ttl_s = 0 if entry.name.endswith(".partial") else self._settings.upload_ttl_s
                if now >= info.st_mtime + ttl_s + _GRACE_S:
                    Path(entry).unlink()
                else:
                    used[entry.name.partition(".")[0]] += info.st_size
        return used

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            try:
                await self.sweep()
            except OSError:
                log.exception("expired uploads could not be removed")


class _Partial:
    """A file on its way into the directory: under a name of its own until it is whole."""

    def __init__(self, store: DirectoryUploads, permit: Permit, path: Path, max_bytes: int) -> None:
        self._store = store
        self._permit = permit
        self._path = path
        self._max_bytes = max_bytes

    def __enter__(self) -> Self:
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError:
            log.exception("an upload could not be begun")
            raise Overloaded from None
        self._file = open(descriptor, "wb")  # noqa: PTH123 - a descriptor, and closed on leaving
        return self

    def __exit__(self, *exc_info: object) -> None:
        with suppress(OSError):
            self._file.close()
        self._path.unlink(missing_ok=True)
        self._permit.release()

    async def write(self, chunk: bytes) -> None:
        if self._permit.amount + len(chunk) > self._max_bytes:
            raise UploadTooLarge
        self._store.grow(self._permit, len(chunk))
        try:
            self._file.write(chunk)
        except OSError:
            log.exception("an upload could not be written")
            raise Overloaded from None

    def publish(self, path: Path) -> None:
        """Give the whole file its name, unless that is taken: a link is made at once or not at all."""
        try:
            self._file.close()
            os.link(self._path, path)
        except FileExistsError:
            raise UploadExists from None
        except OSError:
            log.exception("an upload could not be stored")
            raise Overloaded from None
        self._store.received_bytes += self._permit.amount
        self._permit.keep()


def _digest(owner: str) -> str:
    return hashlib.sha256(owner.encode()).hexdigest()[:32]
