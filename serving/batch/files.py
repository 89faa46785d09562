"""Stored files of tenants: a row in the database for each, and its bytes in the storage.

The bytes are stored before the row, and deleted after it: every row has its bytes. Bytes without a row, which a killed
process may leave, are removed by the sweep.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from serving.batch.database_calls import in_database
from serving.errors import CaptionerError, InvalidRequest, NotFound
from serving.tenancy import schema
from serving.tenancy.batch_table import UNFINISHED
from serving.tenancy.ledger.usage_record import now_ms

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path
    from typing import Any

    from serving.config import Settings
    from serving.storage.files import FileBytes, PartialBytes

_SWEEP_S = 600.0
_GRACE_S = 3600
"""Age of bytes without a row that no upload can still be about to give one; and the time for readers of a file that
has expired."""
_SWEPT = 500
"""Most files that one transaction of the sweep removes."""

_FILES = schema.files.c

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a tenant; times are ms since the epoch."""

    id: str
    tenant_id: str
    purpose: str
    filename: str
    bytes: int
    sha256: str
    created_at: int
    expires_at: int


class Files:
    """Files of all tenants. A file that is unknown, expired or another tenant's is not found."""

    def __init__(self, settings: Settings, database: sa.Engine, stored: FileBytes) -> None:
        self._settings = settings
        self._database = database
        self._bytes = stored
        self._sweeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Open the storage, and begin to remove expired files."""
        await self._bytes.start()
        self._sweeping = asyncio.create_task(self._sweep_forever())

    async def stop(self) -> None:
        """Stop sweeping. Idempotent."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.wait((self._sweeping,))
            self._sweeping = None

    def receive(self, owner: str, *, max_bytes: int | None = None) -> PartialBytes:
        """Return an incomplete file, to write to and to `add`; by default of an upload's size. Raises `Overloaded`."""
        return self._bytes.receive(owner, max_bytes=max_bytes or self._settings.max_file_bytes)

    async def check_room(self, tenant_id: str) -> None:
        """Raise `InvalidRequest` if the tenant may store no further file."""

        def check() -> None:
            with self._database.connect() as connection:
                self._check_room(connection, tenant_id, more=1)

        await in_database(check)

    async def add(
        self,
        received: PartialBytes,
        *,
        tenant_id: str,
        purpose: str,
        filename: str,
        ttl_s: int | None = None,
        file_id: str = "",
        bounded: bool = True,
    ) -> StoredFile:
        """Store a complete file. Raises `InvalidRequest` past a bound of the tenant, unless it is not `bounded`.

        `ttl_s`: its retention, by default `file_ttl_s`. `file_id`: the id of a file that may have been stored before,
        with the same bytes. Raises `StorageUnavailable` and `Overloaded`.
        """
        at = now_ms()
        ttl_s = self._settings.file_ttl_s if ttl_s is None else ttl_s
        name = file_id or f"file-{secrets.token_hex(16)}"
        file = StoredFile(name, tenant_id, purpose, filename, received.size, received.sha256, at, at + 1000 * ttl_s)
        await self._bytes.publish(received, name)
        try:
            await in_database(partial(self._insert, file, bounded=bounded))
        except CaptionerError:
            if not file_id:
                await self._bytes.delete([name])
            raise
        return file

    async def get(self, tenant_id: str, file_id: str) -> StoredFile:
        """Return a file. Raises `NotFound`."""
        query = sa.select(schema.files).where(_FILES.id == file_id, _FILES.tenant_id == tenant_id)

        def read() -> Mapping[Any, Any] | None:
            with self._database.connect() as connection:
                return connection.execute(query.where(_FILES.expires_at > now_ms())).mappings().first()

        row = await in_database(read)
        if row is None:
            raise _not_found(file_id)
        return StoredFile(**row)

    async def page(
        self, tenant_id: str, *, purpose: str | None, after: str | None, limit: int, ascending: bool
    ) -> tuple[list[StoredFile], bool]:
        """Return files of a tenant, the latest first unless `ascending`, and whether there are more.

        Raises `NotFound` if `after` is no file.
        """
        keys = (_FILES.created_at, _FILES.id)
        query = sa.select(schema.files).where(_FILES.tenant_id == tenant_id, _FILES.expires_at > now_ms())
        if purpose is not None:
            query = query.where(_FILES.purpose == purpose)
        if after is not None:
            last = await self.get(tenant_id, after)
            place, edge = sa.tuple_(*keys), sa.tuple_(sa.literal(last.created_at), sa.literal(last.id))
            query = query.where(place > edge if ascending else place < edge)
        query = query.order_by(*(key.asc() if ascending else key.desc() for key in keys)).limit(limit + 1)

        def read() -> list[StoredFile]:
            with self._database.connect() as connection:
                return [StoredFile(**row) for row in connection.execute(query).mappings()]

        found = await in_database(read)
        return found[:limit], len(found) > limit

    async def delete(self, tenant_id: str, file_id: str) -> None:
        """Delete a file. Raises `NotFound`, and `InvalidRequest` while an unfinished batch reads it."""
        await self.get(tenant_id, file_id)
        await in_database(partial(self._delete, file_id))
        await self._bytes.delete([file_id])

    @asynccontextmanager
    async def reading(self, file_id: str, *, owner: str) -> AsyncIterator[Path]:
        """Yield the path of a tenant's file, until the context is left. Raises `NotFound`."""
        await self.get(owner, file_id)
        async with self._bytes.reading(file_id, owner=owner) as path:
            yield path

    @asynccontextmanager
    async def reading_input(self, file_id: str, *, owner: str) -> AsyncIterator[Path]:
        """Yield the path of the input file of an unfinished batch, which is kept although it may have expired."""
        async with self._bytes.reading(file_id, owner=owner) as path:
            yield path

    async def sweep(self) -> None:
        """Remove expired files, and bytes that have no row. Raises `StorageUnavailable`."""
        while expired := await in_database(self._take_expired):
            await self._bytes.delete(expired)
        named = [name for name in await self._bytes.older(_GRACE_S) if name.startswith("file-")]
        for start in range(0, len(named), _SWEPT):
            names = named[start : start + _SWEPT]
            known = await in_database(partial(self._known, names))
            if unknown := [name for name in names if name not in known]:
                await self._bytes.delete(unknown)

    def _insert(self, file: StoredFile, *, bounded: bool) -> None:
        row = {name: getattr(file, name) for name in _FILES.keys()}  # noqa: SIM118 - a collection of columns, no dict
        try:
            with self._database.begin() as connection:
                connection.execute(schema.files.insert(), row)
                if bounded:
                    self._check_room(connection, file.tenant_id)
        except IntegrityError:  # stored before, by a process that was killed after it
            log.info("file is stored already", extra={"file": file.id})

    def _check_room(self, connection: sa.Connection, tenant_id: str, *, more: int = 0) -> None:
        """Check the bounds, with the files of the open transaction and `more` files. Raises `InvalidRequest`."""
        settings = self._settings
        sums = sa.func.coalesce(sa.func.sum(_FILES.bytes), 0)
        own = connection.execute(sa.select(sa.func.count(), sums).where(_FILES.tenant_id == tenant_id)).one()
        if own[0] + more > settings.max_files_per_tenant:
            raise InvalidRequest(
                f"You have as many files as one caller may: {settings.max_files_per_tenant}. Delete some.", param="file"
            )
        used = int(connection.scalar(sa.select(sums)) or 0)
        # As for uploads: a tenant may use at most as much as is still free, since files are kept for days.
        if int(own[1]) > max(0, settings.max_files_bytes - used):
            raise InvalidRequest("Your files take all the space that one caller's may take. Delete some.", param="file")

    def _delete(self, file_id: str) -> None:
        with self._database.begin() as connection:
            connection.execute(schema.files.delete().where(_FILES.id == file_id))
            if connection.scalar(sa.select(schema.batches.c.id).where(_reads(file_id)).limit(1)):
                raise InvalidRequest(f"The file {file_id} is the input of a batch that has not ended.", param="file_id")

    def _take_expired(self) -> list[str]:
        batches = schema.batches.c
        in_use = sa.select(batches.input_file_id).where(batches.status.in_(UNFINISHED))
        expired = sa.select(_FILES.id).where(_FILES.expires_at < now_ms() - 1000 * _GRACE_S, _FILES.id.not_in(in_use))
        with self._database.connect() as connection:
            names = [*connection.scalars(expired.limit(_SWEPT))]
        if names:
            with self._database.begin() as connection:
                connection.execute(schema.files.delete().where(_FILES.id.in_(names)))
        return names

    def _known(self, names: list[str]) -> set[str]:
        with self._database.connect() as connection:
            return {*connection.scalars(sa.select(_FILES.id).where(_FILES.id.in_(names)))}

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            try:
                await self.sweep()
            except (OSError, CaptionerError) as error:
                log.warning("files sweep failed", extra={"error": type(error).__name__})


def _reads(file_id: str) -> sa.ColumnElement[bool]:
    batches = schema.batches.c
    return sa.and_(batches.input_file_id == file_id, batches.status.in_(UNFINISHED))


def _not_found(file_id: str) -> NotFound:
    return NotFound(f"No such File object: {file_id[:64]}")
