"""Uploaded files in a bucket, for frontends that share no disk.

A file is received on the local disk, then copied into the bucket: the client is answered once the bucket has all of it.
To be read, it is copied back to the local disk. Nothing on that disk must survive.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
import uuid
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from serving.errors import AudioTooLarge, StorageUnavailable, UploadExists, UploadNotFound
from serving.scheduling.shared_capacity import SharedCapacity
from serving.storage.objects import Bucket, ObjectExistsError, ObjectNotFoundError
from serving.storage.upload_policies import owner_digest
from serving.storage.uploads import (
    GRACE_S,
    MIN_FILE_BYTES,
    READ_COPY,
    DirectoryUploads,
    PartialFile,
    file_digest,
    make_uploads_directory,
)
from serving.types import SchedulingClass

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from serving.config import Settings
    from serving.storage.objects import StoredObject
    from serving.storage.upload_policies import UploadGrant
    from serving.storage.uploads import Upload

_FOLDER = "uploads"
_NAME = re.compile(rf"{_FOLDER}/([0-9a-f]{{32}})/[0-9a-f]{{64}}")
"""Names of our objects, with the hash of the owner. Other objects of the bucket are neither counted nor deleted."""

_SWEEP_S, _FAILED_SWEEP_S = 600.0, 60.0

log = logging.getLogger(__name__)


class BucketUploads(DirectoryUploads):
    """An `UploadStore` in a bucket, which all frontends share.

    An object's name is the hash of its owner, a slash, and the hash of its owner, model and key. Its age is counted
    from its creation by the store's clock. So there is no other state.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._bucket = Bucket(settings)
        self._copies = SharedCapacity(settings.max_downloads_bytes, reason="downloads")
        self._swept = asyncio.Event()
        self._storing = Counter[str]()
        """Names of the objects that are being created."""
        self._counted = set[str]()
        """Names that the current sweep must not count: of objects that have been in `_storing` since its start."""

    async def start(self) -> None:
        """Create the local directory and count the files of the bucket, for at most `object_store_timeout_s`.

        A bucket that cannot be used fails uploads and captions of uploaded files, not the start.
        """
        make_uploads_directory(self._settings)
        self._sweeping = asyncio.create_task(self._sweep_forever())
        swept = asyncio.create_task(self._swept.wait())
        await asyncio.wait((swept,), timeout=self._settings.object_store_timeout_s)
        swept.cancel()

    @asynccontextmanager
    async def receive(self, grant: UploadGrant) -> AsyncIterator[Upload]:
        name = _name(grant.key, grant.owner, grant.model)
        if await self._bucket.exists(name):
            raise UploadExists
        path = self._directory / f"{owner_digest(grant.owner)}.{uuid.uuid4().hex}.partial"
        with _BucketFile(self, grant, path) as partial:
            yield partial
            self._storing[name] += 1
            self._counted.add(name)
            try:
                await partial.store(self._bucket, name)
            finally:
                self._storing[name] -= 1
                self._storing += Counter()  # drops names without a writer

    @asynccontextmanager
    async def reading(self, key: str, *, owner: str, model: str) -> AsyncIterator[Path]:
        path = self._directory / f"{owner_digest(owner)}.{uuid.uuid4().hex}{READ_COPY}"
        with self._copies.permit(SchedulingClass(owner_digest(owner))) as permit:

            def admit(found: StoredObject) -> None:
                if time.time() >= found.modified_s + self._settings.upload_ttl_s:
                    raise UploadNotFound
                if found.size > self._settings.max_upload_bytes:
                    raise AudioTooLarge
                permit.grow(found.size - permit.amount)

            try:
                try:
                    await self._bucket.read(_name(key, owner, model), path, admit=admit)
                except ObjectNotFoundError:
                    raise UploadNotFound from None
                yield path
            finally:
                path.unlink(missing_ok=True)

    async def _sweep_all(self) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """Delete expired objects; count the rest, and the files that are being received."""
        started_s, self._counted = time.time(), set(self._storing)
        used_here, files_here = await asyncio.to_thread(self._sweep)
        used, files, expired = Counter(used_here), Counter(files_here), list[str]()
        async for found in self._bucket.list(_FOLDER):
            if not (match := _NAME.fullmatch(found.name)):
                continue
            if started_s >= found.modified_s + self._settings.upload_ttl_s + GRACE_S:
                expired.append(found.name)
            elif found.name not in self._counted:
                used[match[1]] += max(found.size, MIN_FILE_BYTES)
                files[match[1]] += 1
        self._counted.clear()
        await self._bucket.delete(expired)
        return used, files

    async def _sweep_forever(self) -> None:
        while True:
            delay_s = _FAILED_SWEEP_S
            try:
                await self.sweep()
                delay_s = _SWEEP_S
            except (OSError, StorageUnavailable):
                log.exception("uploads sweep failed")
            self._swept.set()
            await asyncio.sleep(delay_s)


class _BucketFile(PartialFile):
    """A file that is received on the local disk, until `store`."""

    def __init__(self, store: BucketUploads, grant: UploadGrant, path: Path) -> None:
        super().__init__(store, grant, path)
        self._sha256 = hashlib.sha256()

    async def write(self, chunk: bytes) -> None:
        await super().write(chunk)
        self._sha256.update(chunk)

    async def store(self, bucket: Bucket, name: str) -> None:
        """Copy the complete file into the bucket. Raises `UploadExists`, `UploadEmpty` and `StorageUnavailable`."""
        self.finish()
        try:
            await bucket.create(name, self._path, size=self._size, sha256=self._sha256.hexdigest())
        except ObjectExistsError:
            raise UploadExists from None
        self.keep()


def _name(key: str, owner: str, model: str) -> str:
    return f"{_FOLDER}/{owner_digest(owner)}/{file_digest(key, owner, model)}"
