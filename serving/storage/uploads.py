"""Uploaded files: the store that keeps files for `settings.upload_ttl_s` (PROTOCOL 6), and its form in a directory.

The form in a bucket is in `bucket_uploads`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import time
import uuid
from collections import Counter
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

from serving.errors import (
    AudioTooLarge,
    Overloaded,
    UploadEmpty,
    UploadExists,
    UploadNotFound,
    UploadTooLarge,
)
from serving.scheduling.shared_capacity import SharedCapacity
from serving.storage.private_directory import make_private
from serving.storage.upload_policies import UploadPolicies, owner_digest
from serving.types import SchedulingClass

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from contextlib import AbstractAsyncContextManager

    from serving.config import Settings
    from serving.scheduling.shared_capacity import Permit
    from serving.storage.upload_policies import UploadGrant, UploadPolicy

_SWEEP_S = 600.0
GRACE_S = 3600.0
"""Time that an expired file is kept for readers that have opened it, and an incomplete file for its writer."""

_ALPHA = 1.0
"""Ratio of an owner's files to the free space: an owner may use at most as much as is still free.

Files are kept for days, so other owners cannot wait until some are removed.
"""

READ_COPY = ".reading"
"""Suffix of a local copy of an object in a bucket, which exists while it is read."""

MIN_FILE_BYTES = 4096
"""Least disk that a file counts as: a block of the usual file systems, for its inode and its name."""

_TOO_MANY = "You have uploaded as many files as one caller may. They are removed when they expire."
_SHARE_FULL = "Your uploaded files take all the space that one caller's may take. They are removed when they expire."

log = logging.getLogger(__name__)


class UnusableBucket(Exception):  # noqa: N818 - as `UnusableDatabase`
    """The settings of the bucket cannot be used. The text says what to do."""


class Upload(Protocol):
    """A file while it is received."""

    async def write(self, chunk: bytes) -> None:
        """Append `chunk`. Raises `UploadTooLarge`, and `Overloaded` when there is no space."""
        ...


class UploadStore(Protocol):
    """A store of uploaded files.

    `used_bytes`: disk space of all files; `received_bytes`: bytes that this process has stored since its start.
    """

    @property
    def used_bytes(self) -> int: ...

    @property
    def received_bytes(self) -> int: ...

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def issue(self, owner: str, model: str, key_id: str = "") -> UploadPolicy:
        """Return a policy for uploads of this caller, who has this API key, for this model."""
        ...

    def check(self, *, policy: str, signature: str, key: str) -> UploadGrant:
        """Return what a policy allows for this key. Raises `PolicyInvalid`, `PolicyExpired` or `KeyNotAllowed`."""
        ...

    def receive(self, grant: UploadGrant) -> AbstractAsyncContextManager[Upload]:
        """Receive a file. It exists, complete, once the context is left; an exception discards it.

        Raises `UploadExists`, on entering or leaving: no file is overwritten. Raises `UploadEmpty` on leaving, and
        `Overloaded` when the owner's files or their bytes are as many as one owner may have. Raises
        `StorageUnavailable` when a bucket cannot be used.
        """
        ...

    def reading(self, key: str, *, owner: str, model: str) -> AbstractAsyncContextManager[Path]:
        """Yield the path of a stored file, which can be read until the context is left.

        Raises `UploadNotFound`: unknown, expired, another caller's or model's; `AudioTooLarge`; and, with a bucket,
        `StorageUnavailable` and `Overloaded`.
        """
        ...


def uploads_directory(settings: Settings) -> Path:
    """Return the directory of uploaded files: one for each user, below `uploads_dir` or in `data_dir`."""
    return (settings.uploads_dir or settings.data_dir / "uploads") / f"captioner-uploads-{os.geteuid()}"


def make_uploads_directory(settings: Settings) -> None:
    """Create the directory of uploaded files, or adopt it. Raises `OSError`, whose text says what to do."""
    make_private(uploads_directory(settings), "uploads_dir")


class DirectoryUploads(UploadPolicies):
    """An `UploadStore` in a directory, which replicas may share.

    A file's name is the hash of its owner, and the hash of its owner, model and key: no name that a client chose is
    used on the disk, and a request with another key or for another model finds no file. The age is the file's
    modification time. So there is no other state.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._directory = uploads_directory(settings)
        self._capacity = SharedCapacity(settings.max_uploads_bytes, reason="uploads", alpha=_ALPHA)
        self._files = Counter[str]()
        self.received_bytes = 0
        self._sweeping: asyncio.Task[None] | None = None

    @property
    def used_bytes(self) -> int:
        """Disk space of all files in bytes; those of other replicas as of the last sweep."""
        return self._capacity.used

    async def start(self) -> None:
        """Create the directory, or adopt it with its files. Raises `PermissionError` if it belongs to another user."""
        make_uploads_directory(self._settings)
        await self.sweep()
        self._sweeping = asyncio.create_task(self._sweep_forever())

    async def stop(self) -> None:
        """Stop sweeping. Stored files are kept. Idempotent."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.wait((self._sweeping,))
            self._sweeping = None

    @asynccontextmanager
    async def receive(self, grant: UploadGrant) -> AsyncIterator[Upload]:
        path = self._path(grant.key, grant.owner, grant.model)
        if path.exists():
            raise UploadExists
        name = f"{owner_digest(grant.owner)}.{uuid.uuid4().hex}.partial"
        with PartialFile(self, grant, self._directory / name) as partial:
            yield partial
            partial.publish(path)

    @asynccontextmanager
    async def reading(self, key: str, *, owner: str, model: str) -> AsyncIterator[Path]:
        yield await self.open(key, owner=owner, model=model)

    async def open(self, key: str, *, owner: str, model: str) -> Path:
        """Return the path of a stored file. Raises `UploadNotFound` and `AudioTooLarge`."""
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
        """Remove expired and abandoned incomplete files, and count the remaining files, other replicas' included."""
        before_bytes, before_files = self._capacity.used_by_tenant, Counter(self._files)
        found_bytes, found_files = await self._sweep_all()
        # By the difference, which keeps files received meanwhile.
        self._capacity.recount(before_bytes, found_bytes)
        self._files.update(found_files)
        self._files.subtract(before_files)
        self._files += Counter()  # drops owners without files

    def count_file(self, owner: str, files: int) -> None:
        """Count a file before it is created, or (-1) one that was not stored. Raises `Overloaded` past the bound."""
        if files > 0 and self._files[owner_digest(owner)] >= self._settings.max_uploads_per_tenant:
            raise Overloaded(_TOO_MANY, retry_after_s=60, reason="uploads")
        self._files[owner_digest(owner)] += files

    def permit(self, owner: str) -> Permit:
        """Return a permit for the disk space of one file of `owner`."""
        return self._capacity.permit(SchedulingClass(owner_digest(owner)))

    def grow(self, permit: Permit, nbytes: int) -> None:
        """Count bytes before a write. Raises `Overloaded` if all space, or the owner's share of it, is used."""
        try:
            permit.grow(nbytes)
        except Overloaded:
            used_bytes = self._capacity.used
            if used_bytes + nbytes <= self._capacity.size:
                raise Overloaded(_SHARE_FULL, retry_after_s=60, reason="uploads") from None
            log.warning("uploads directory full", extra={"used_bytes": used_bytes})
            raise

    def _path(self, key: str, owner: str, model: str) -> Path:
        return self._directory / f"{owner_digest(owner)}.{file_digest(key, owner, model)}"

    async def _sweep_all(self) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """Do what `_sweep` does, wherever files are kept."""
        return await asyncio.to_thread(self._sweep)

    def _sweep(self) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """Remove files; return the bytes and the number of those that remain, by the hash of their owner."""
        now, used, files = time.time(), Counter[str](), Counter[str]()
        for entry in os.scandir(self._directory):
            with suppress(FileNotFoundError):  # another replica has removed it
                info = entry.stat()
                ttl_s = 0 if entry.name.endswith((".partial", READ_COPY)) else self._settings.upload_ttl_s
                if now >= info.st_mtime + ttl_s + GRACE_S:
                    Path(entry).unlink()
                elif not entry.name.endswith(READ_COPY):
                    owner = entry.name.partition(".")[0]
                    used[owner] += max(info.st_size, MIN_FILE_BYTES)
                    files[owner] += 1
        return used, files

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            try:
                await self.sweep()
            except OSError:
                log.exception("uploads sweep failed")


class PartialFile:
    """An incomplete file in the directory, under a temporary name until `publish`."""

    def __init__(self, store: DirectoryUploads, grant: UploadGrant, path: Path) -> None:
        self._store = store
        self._grant = grant
        self._permit = store.permit(grant.owner)
        self._path = path
        self._size = 0
        self._published = False

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            self._store.count_file(self._grant.owner, 1)
            undo.callback(self._store.count_file, self._grant.owner, -1)
            undo.callback(self._permit.release)
            self._store.grow(self._permit, MIN_FILE_BYTES)
            try:
                descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            except OSError:
                log.exception("upload create failed")
                raise Overloaded from None
            self._file = open(descriptor, "wb")  # noqa: PTH123 - a descriptor, closed by `__exit__`
            undo.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        with suppress(OSError):
            self._file.close()
        self._path.unlink(missing_ok=True)
        self._permit.release()
        if not self._published:
            self._store.count_file(self._grant.owner, -1)

    async def write(self, chunk: bytes) -> None:
        size = self._size + len(chunk)
        if size > self._grant.max_bytes:
            raise UploadTooLarge
        if size > self._permit.amount:
            self._store.grow(self._permit, size - self._permit.amount)
        self._size = size
        try:
            self._file.write(chunk)
        except OSError:
            log.exception("upload write failed")
            raise Overloaded from None

    def publish(self, path: Path) -> None:
        """Give the complete file its name. Raises `UploadExists` if the name is taken: a link is created atomically.

        Raises `UploadEmpty` for a file without a byte.
        """
        self.finish()
        try:
            os.link(self._path, path)
        except FileExistsError:
            raise UploadExists from None
        except OSError:
            log.exception("upload publish failed")
            raise Overloaded from None
        self.keep()

    def finish(self) -> None:
        """Close the complete file, which may write its last bytes. Raises `UploadEmpty` and `Overloaded`."""
        if not self._size:
            raise UploadEmpty
        try:
            self._file.close()
        except OSError:
            log.exception("upload publish failed")
            raise Overloaded from None

    def keep(self) -> None:
        """Count the file as stored when the context is left."""
        self._store.received_bytes += self._size
        self._published = True
        self._permit.keep()


def file_digest(key: str, owner: str, model: str) -> str:
    """Return the name of a file among its owner's: a request with another key or for another model finds no file."""
    return hashlib.sha256(json.dumps([owner, model, key]).encode()).hexdigest()
