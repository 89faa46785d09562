"""Objects in a bucket: S3 and what is compatible with it (Alibaba OSS too), Google Cloud Storage, Azure.

An uploaded object is created once and never overwritten. It carries the SHA-256 of its bytes, which every read checks.
Each operation has a deadline and is retried within it; any fault of the store is a `StorageUnavailable`.

Only this module and `journal_copies.py` use obstore. They are imported only where a bucket is configured.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import uuid
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import AzureStore, GCSStore, S3Store

from serving.errors import Overloaded, StorageUnavailable
from serving.settings.types import MIB
from serving.storage.uploads import UnusableBucket

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from obstore.store import AzureConfig, ClientConfig, GCSConfig, RetryConfig, S3Config
    from pydantic import SecretStr

    from serving.config import Settings

_RETRIES = 3
_BACKOFF_S, _MAX_BACKOFF_S = 0.1, 2.0
_CONNECT_TIMEOUT_S = 5.0
_WRITES = 4
"""Objects that are written at the same time.

Each takes up to `_SINGLE_PUT_BYTES` of memory, so all of them 64 MiB. Measured: 60 to 92 MiB more while 16 files of 10
or 16 MiB were written, 72 MiB with 8 of 40 MiB.
"""
_SINGLE_PUT_BYTES = 16 * MIB
"""Largest object that is written by one conditional request; larger ones are written in parts."""
_PART_BYTES, _PARTS_AT_ONCE = 8 * MIB, 1
_CHUNK_BYTES = 256 * 1024
PAGE = 1000
"""Objects of one page of a listing, and of one request that deletes: S3's limits."""
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "bucket does not exist")
"""Texts in errors by which S3, Azure and GCS tell a missing bucket from a missing object."""
_REASON_CHARS = 300
FAULTS = (BaseError, FileNotFoundError, TimeoutError, ValueError)
"""Exceptions of obstore, and that of a deadline."""

log = logging.getLogger(__name__)


class ObjectExistsError(Exception):
    """An object of this name exists already."""


class ObjectNotFoundError(Exception):
    """No object has this name."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object without its bytes. `modified_s`: time of its creation in seconds since 1970, by the store's clock."""

    name: str
    size: int
    modified_s: float


class Bucket:
    """The bucket of `object_store_url`; names are below its prefix. Raises `UnusableBucket`, without a request."""

    def __init__(self, settings: Settings) -> None:
        self._timeout_s = settings.object_store_timeout_s
        try:
            self._store = open_store(settings)
        except FAULTS as error:
            remedy = "check object_store_url and object_store_secret_key"
            raise UnusableBucket(
                f"{settings.object_store_url} cannot be used: {fault_reason(error)}; {remedy}"
            ) from None
        self._writes = asyncio.Semaphore(_WRITES)
        self._conditional = True
        """False once the store has answered that it has no conditional writes, as Alibaba OSS does (501)."""

    async def exists(self, name: str) -> bool:
        """Return whether an object has this name."""
        async with self._operation("head"):
            return await self._attributes(name) is not None

    async def create(self, name: str, path: Path, *, size: int, sha256: str) -> None:
        """Copy a file into a new object. Raises `ObjectExistsError` and `StorageUnavailable`.

        Two writers of one name: one of them fails. Only if the file is larger than 16 MiB, or the store has no
        conditional writes, and both write at the same time, the last one's object stays.
        """
        attributes = {"sha256": sha256, "upload": uuid.uuid4().hex}
        async with self._operation("create", size=size), self._writes:
            if size > _SINGLE_PUT_BYTES:
                await self._create_in_parts(name, path, attributes)
            else:
                await self._create(name, await asyncio.to_thread(path.read_bytes), attributes)

    async def read(self, name: str, path: Path, *, admit: Callable[[StoredObject], None]) -> None:
        """Copy an object into a file. `admit` is called before its bytes are read; what it raises ends the read.

        Raises `ObjectNotFoundError`; `StorageUnavailable`, also if the bytes do not match the checksum twice; and
        `Overloaded` if the file cannot be written.
        """
        async with self._operation("read") as timeout:
            for last in (False, True):
                try:
                    result = await obstore.get_async(self._store, name)
                except FileNotFoundError as error:
                    if any(text in str(error) for text in _NO_BUCKET):
                        raise
                    raise ObjectNotFoundError from None
                meta = result.meta
                admit(StoredObject(name, meta["size"], meta["last_modified"].timestamp()))
                timeout.reschedule(self._deadline(meta["size"]))
                try:
                    sha256 = await _copy(result, path)
                except BaseError:
                    if last:
                        raise
                    continue
                if sha256 == result.attributes.get("sha256"):
                    return
                log.error("object checksum mismatch", extra={"object_name": name})
            raise StorageUnavailable

    async def list(self, prefix: str) -> AsyncIterator[StoredObject]:
        """Yield all objects below `prefix`. Raises `StorageUnavailable`."""
        pages = obstore.list(self._store, prefix, chunk_size=PAGE)
        while True:
            async with self._operation("list"):
                page = await anext(pages, None)
            if page is None:
                return
            for meta in page:
                yield StoredObject(meta["path"], meta["size"], meta["last_modified"].timestamp())

    async def delete(self, names: Sequence[str]) -> None:
        """Delete objects; another process may have deleted some before. Raises `StorageUnavailable`."""
        for start in range(0, len(names), PAGE):
            async with self._operation("delete"):
                with suppress(FileNotFoundError):  # the rest of this page is deleted by a later call
                    await obstore.delete_async(self._store, names[start : start + PAGE])

    async def problem(self, timeout_s: float) -> str | None:
        """Return the reason why the bucket cannot be listed now, `None` if it can be. Changes nothing."""
        try:
            async with asyncio.timeout(timeout_s):
                await anext(obstore.list(self._store), None)
        except FAULTS as error:
            return fault_reason(error)
        return None

    async def _create(self, name: str, data: bytes, attributes: dict[str, str]) -> None:
        if self._conditional:
            try:
                await obstore.put_async(
                    self._store, name, data, attributes=attributes, mode="create", use_multipart=False
                )
            except AlreadyExistsError:
                # A retry of a request whose response was lost finds its own object.
                if ((await self._attributes(name)) or {}).get("upload") == attributes["upload"]:
                    return
                raise ObjectExistsError from None
            except BaseError as error:
                if "NotImplemented" not in str(error):
                    raise
                log.warning("object store without conditional writes", extra={"reason": fault_reason(error)})
                self._conditional = False
            else:
                return
        if await self._attributes(name) is not None:
            raise ObjectExistsError
        await obstore.put_async(self._store, name, data, attributes=attributes, use_multipart=False)

    async def _create_in_parts(self, name: str, path: Path, attributes: dict[str, str]) -> None:
        if await self._attributes(name) is not None:
            raise ObjectExistsError
        await obstore.put_async(
            self._store,
            name,
            path,
            attributes=attributes,
            use_multipart=True,
            chunk_size=_PART_BYTES,
            max_concurrency=_PARTS_AT_ONCE,
        )

    async def _attributes(self, name: str) -> dict[str, str] | None:
        """Return the attributes of an object, `None` if there is none."""
        try:
            return (await obstore.get_async(self._store, name, options={"head": True})).attributes
        except FileNotFoundError:
            return None

    def _deadline(self, size: int) -> float:
        return asyncio.get_running_loop().time() + self._timeout_s + size / MIB

    @asynccontextmanager
    async def _operation(self, name: str, *, size: int = 0) -> AsyncIterator[asyncio.Timeout]:
        """Bound the time of an operation, and translate the store's faults; its words stay in our log."""
        try:
            async with asyncio.timeout_at(self._deadline(size)) as timeout:
                yield timeout
        except FAULTS as error:
            log.warning("object store failed", extra={"operation": name, "reason": fault_reason(error)})
            raise StorageUnavailable from None


async def _copy(result: obstore.GetResult, path: Path) -> str:
    """Copy the bytes of an object to a file; return their SHA-256."""
    digest = hashlib.sha256()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb") as file:  # noqa: ASYNC230, PTH123 - a descriptor, whose mode is not the umask's
            async for chunk in result.stream(min_chunk_size=_CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
    except OSError:
        log.exception("upload read failed")
        raise Overloaded(reason="uploads") from None
    return digest.hexdigest()


def open_store(settings: Settings) -> S3Store | GCSStore | AzureStore:
    """Return the client of the bucket. No request is made."""
    url, endpoint = urlsplit(settings.object_store_url or ""), settings.object_store_endpoint
    client: ClientConfig = {
        "allow_http": (endpoint or "").startswith("http:"),
        "connect_timeout": timedelta(seconds=min(_CONNECT_TIMEOUT_S, settings.object_store_timeout_s)),
        "read_timeout": timedelta(seconds=settings.object_store_timeout_s),
        # For the largest file; `Bucket._operation` bounds the time of each one.
        "timeout": timedelta(
            seconds=settings.object_store_timeout_s + max(settings.max_upload_bytes, settings.max_file_bytes) / MIB
        ),
    }
    retry: RetryConfig = {
        "max_retries": _RETRIES,
        "retry_timeout": timedelta(seconds=settings.object_store_timeout_s),
        "backoff": {
            "init_backoff": timedelta(seconds=_BACKOFF_S),
            "max_backoff": timedelta(seconds=_MAX_BACKOFF_S),
            "base": 2,
        },
    }
    bucket, prefix, secret = url.netloc, url.path.strip("/"), _value(settings.object_store_secret_key)
    match url.scheme:
        case "gs":
            google: GCSConfig = {}
            if secret:
                google["service_account_key"] = secret
            if endpoint:
                google["base_url"] = endpoint
            return GCSStore(bucket, prefix=prefix or None, config=google, client_options=client, retry_config=retry)
        case "az":
            container, _, prefix = prefix.partition("/")
            azure: AzureConfig = {"account_name": bucket}
            if secret:
                azure["account_key"] = secret
            if endpoint:
                azure["endpoint"] = endpoint
            return AzureStore(container, prefix=prefix or None, config=azure, client_options=client, retry_config=retry)
        case _:
            amazon = _s3_config(settings, bucket, secret)
            return S3Store(bucket, prefix=prefix or None, config=amazon, client_options=client, retry_config=retry)


def _s3_config(settings: Settings, bucket: str, secret: str | None) -> S3Config:
    config: S3Config = {"virtual_hosted_style_request": settings.object_store_virtual_host}
    if endpoint := settings.object_store_endpoint:
        scheme, _, host = endpoint.rstrip("/").partition("://")
        config["endpoint"] = (
            f"{scheme}://{bucket}.{host}" if settings.object_store_virtual_host else f"{scheme}://{host}"
        )
        # Alibaba OSS, among others, does not delete several objects by one request of S3's form.
        config["disable_bulk_delete"] = True
    if settings.object_store_region:
        config["region"] = settings.object_store_region
    if (key_id := _value(settings.object_store_access_key_id)) and secret:
        config["access_key_id"], config["secret_access_key"] = key_id, secret
    return config


def _value(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret is not None else None


def fault_reason(error: BaseException) -> str:
    """Return an error's first line and the code in the store's XML; the rest of it may hold the access key id."""
    text = str(error)
    code = re.search(r"<Code>(\w{1,64})</Code>", text)
    return f"{type(error).__name__}: {text.partition(chr(10))[0][:_REASON_CHARS]} {code[1] if code else ''}".rstrip()
