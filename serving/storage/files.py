"""Bytes of stored files (`/v1/files`): in a directory that replicas share, or in the bucket of `object_store_url`.

A file is received on the local disk and named once it is complete. Owners, limits and expiry are in the database
(`serving.batch.files`); here is only what a name's bytes are.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import logging
import os
import time
import uuid
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Protocol, Self

from serving.errors import NotFound, Overloaded, UploadTooLarge
from serving.scheduling.shared_capacity import SharedCapacity
from serving.storage.private_directory import make_private
from serving.storage.upload_policies import owner_digest
from serving.types import SchedulingClass

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from serving.config import Settings
    from serving.storage.objects import Bucket

log = logging.getLogger(__name__)

_FOLDER = "files"
_PARTIAL = ".partial"
_PARTIAL_S = 24 * 3600.0
"""Age of an incomplete file, or of a copy of an object, whose process is gone for certain."""


class FileBytes(Protocol):
    """A store of bytes by name. Names are ids of files, which the service makes."""

    async def start(self) -> None: ...

    def receive(self, owner: str, *, max_bytes: int) -> PartialBytes:
        """Return an incomplete file of this owner, to write to. Raises `Overloaded`."""
        ...

    async def publish(self, partial: PartialBytes, name: str) -> None:
        """Name the complete file; a name that exists has the same bytes. Raises `Overloaded`, `StorageUnavailable`."""
        ...

    def reading(self, name: str, *, owner: str) -> AbstractAsyncContextManager[Path]:
        """Yield the path of a file. Raises `NotFound`, `Overloaded` and `StorageUnavailable`."""
        ...

    async def delete(self, names: list[str]) -> None:
        """Delete files; unknown names are passed over. Raises `StorageUnavailable`."""
        ...

    async def older(self, age_s: float) -> list[str]:
        """Return the names of files of at least that age. Raises `StorageUnavailable`."""
        ...


def files_directory(settings: Settings) -> Path:
    """Return the directory of files, next to that of uploads: one for each user."""
    return (settings.uploads_dir or settings.data_dir / "uploads") / f"captioner-files-{os.geteuid()}"


def open_files(settings: Settings) -> FileBytes:
    """Return the store that the settings name."""
    if settings.object_store_url is None:
        return DirectoryFiles(settings)
    # Import obstore only if it is used.
    bucket: Bucket = importlib.import_module("serving.storage.objects").Bucket(settings)
    return BucketFiles(settings, bucket)


class PartialBytes:
    """An incomplete file on the local disk, hashed as it is written. A context: what is not published is removed."""

    def __init__(self, path: Path, capacity: SharedCapacity, owner: str, *, max_bytes: int) -> None:
        self.path = path
        self.size = 0
        self._max_bytes = max_bytes
        self._permit = capacity.permit(SchedulingClass(owner_digest(owner)))
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Hash of the bytes so far, in hexadecimal digits."""
        return self._digest.hexdigest()

    def __enter__(self) -> Self:
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError:
            log.exception("file create failed")
            raise Overloaded(reason="uploads") from None
        self._file = open(descriptor, "wb")  # noqa: PTH123 - a descriptor, closed by `__exit__`
        return self

    def __exit__(self, *exc_info: object) -> None:
        with suppress(OSError):
            self._file.close()
        self.path.unlink(missing_ok=True)
        self._permit.release()

    def write(self, chunk: bytes) -> None:
        """Append `chunk`. Raises `UploadTooLarge` past the largest file, and `Overloaded` if there is no space."""
        if self.size + len(chunk) > self._max_bytes:
            raise UploadTooLarge
        self._permit.grow(len(chunk))
        self.size += len(chunk)
        self._digest.update(chunk)
        try:
            self._file.write(chunk)
        except OSError:
            log.exception("file write failed")
            raise Overloaded(reason="uploads") from None

    def finish(self) -> None:
        """Write everything to the disk. Blocking. Raises `Overloaded`."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError:
            log.exception("file write failed")
            raise Overloaded(reason="uploads") from None


class DirectoryFiles:
    """`FileBytes` in a directory."""

    def __init__(self, settings: Settings) -> None:
        self._directory = files_directory(settings)
        self._receiving = SharedCapacity(settings.max_files_bytes, reason="uploads")

    async def start(self) -> None:
        """Create the directory, or adopt it; remove incomplete files that dead processes have left."""
        make_private(self._directory, "uploads_dir")
        await asyncio.to_thread(self._remove_abandoned)

    def receive(self, owner: str, *, max_bytes: int) -> PartialBytes:
        path = self._directory / f"{uuid.uuid4().hex}{_PARTIAL}"
        return PartialBytes(path, self._receiving, owner, max_bytes=max_bytes)

    async def publish(self, partial: PartialBytes, name: str) -> None:
        await asyncio.to_thread(self._publish, partial, name)

    @asynccontextmanager
    async def reading(self, name: str, *, owner: str) -> AsyncIterator[Path]:
        del owner
        path = self._directory / name
        if not path.exists():
            raise NotFound
        yield path

    async def delete(self, names: list[str]) -> None:
        await asyncio.to_thread(self._delete, names)

    async def older(self, age_s: float) -> list[str]:
        return await asyncio.to_thread(self._older, age_s)

    def _older(self, age_s: float) -> list[str]:
        before_s, found = time.time() - age_s, []
        for entry in os.scandir(self._directory):
            with suppress(FileNotFoundError):
                if not entry.name.endswith(_PARTIAL) and entry.stat().st_mtime <= before_s:
                    found.append(entry.name)
        return found

    def _publish(self, partial: PartialBytes, name: str) -> None:
        partial.finish()
        try:
            partial.path.replace(self._directory / name)
        except OSError:
            log.exception("file publish failed")
            raise Overloaded(reason="uploads") from None

    def _delete(self, names: list[str]) -> None:
        for name in names:
            (self._directory / name).unlink(missing_ok=True)

    def _remove_abandoned(self) -> None:
        for path in self._partial():
            with suppress(FileNotFoundError):
                if time.time() > path.stat().st_mtime + _PARTIAL_S:
                    path.unlink()

    def _partial(self) -> Iterator[Path]:
        return self._directory.glob(f"*{_PARTIAL}")


class BucketFiles(DirectoryFiles):
    """`FileBytes` in a bucket. A file is copied to the local disk to be read."""

    def __init__(self, settings: Settings, bucket: Bucket) -> None:
        super().__init__(settings)
        self._bucket = bucket

    async def publish(self, partial: PartialBytes, name: str) -> None:
        await asyncio.to_thread(partial.finish)
        try:
            await self._bucket.create(_object(name), partial.path, size=partial.size, sha256=partial.sha256)
        except importlib.import_module("serving.storage.objects").ObjectExistsError:
            log.info("file is in the bucket already", extra={"file": name})  # of a process that was killed after it

    @asynccontextmanager
    async def reading(self, name: str, *, owner: str) -> AsyncIterator[Path]:
        path = self._directory / f"{uuid.uuid4().hex}{_PARTIAL}"
        with self._receiving.permit(SchedulingClass(owner_digest(owner))) as permit:
            try:
                try:
                    await self._bucket.read(
                        _object(name), path, admit=lambda found: permit.grow(found.size - permit.amount)
                    )
                except importlib.import_module("serving.storage.objects").ObjectNotFoundError:
                    raise NotFound from None
                yield path
            finally:
                path.unlink(missing_ok=True)

    async def delete(self, names: list[str]) -> None:
        await self._bucket.delete([_object(name) for name in names])

    async def older(self, age_s: float) -> list[str]:
        before_s = time.time() - age_s
        found = [each async for each in self._bucket.list(_FOLDER) if each.modified_s <= before_s]
        return [each.name.removeprefix(f"{_FOLDER}/") for each in found if each.name.startswith(f"{_FOLDER}/file-")]


def _object(name: str) -> str:
    return f"{_FOLDER}/{name}"
