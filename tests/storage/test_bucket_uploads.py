"""Uploaded files in a bucket: shared between frontends without a shared disk, checked, bounded, expired."""

from __future__ import annotations

import hashlib
import re
import time
from typing import TYPE_CHECKING, Any

import obstore
import pytest

from serving import errors
from serving.storage import bucket_uploads
from serving.storage.bucket_uploads import BucketUploads
from serving.storage.objects import Bucket
from tests.storage.client import MIB, MODEL, OWNER, fetch, put, settings
from tests.storage.s3 import S3Server, bucket_settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from serving.storage.objects import StoredObject


@pytest.fixture
def bucket(s3_server: S3Server) -> str:
    """A fresh bucket."""
    return s3_server.bucket()


@pytest.fixture
async def uploads(s3_server: S3Server, bucket: str, tmp_path: Path) -> AsyncIterator[BucketUploads]:
    """A running store in a fresh bucket."""
    store = BucketUploads(settings(tmp_path / "one", **bucket_settings(s3_server.url, bucket)))
    await store.start()
    yield store
    await store.stop()


def on_disk(directory: Path) -> list[Path]:
    """Return every file on the local disk."""
    return [path for path in directory.rglob("*") if path.is_file()]


async def test_frontends_share_files_without_a_disk(
    uploads: BucketUploads, s3_server: S3Server, bucket: str, tmp_path: Path
) -> None:
    """A file that one frontend has received is read by another with a separate disk, and neither disk keeps it."""
    other = BucketUploads(settings(tmp_path / "two", **bucket_settings(s3_server.url, bucket)))
    await other.start()
    key = await put(uploads, "t ö+n%e.wav", b"abc" * 300)
    assert on_disk(tmp_path) == []
    async with other.reading(key, owner=OWNER, model=MODEL) as path:
        assert path.read_bytes() == b"abc" * 300
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.is_relative_to(tmp_path / "two")
    assert on_disk(tmp_path) == []
    await other.stop()


async def test_names_are_by_tenant_and_reveal_nothing(uploads: BucketUploads, s3_server: S3Server, bucket: str) -> None:
    """Each tenant's files are below one prefix; no name of a tenant or a file is in the bucket."""
    for owner in ("tenant-one", "tenant-two"):
        await put(uploads, "secret-name.wav", b"abc", uploads.issue(owner, MODEL))
    names = s3_server.objects(bucket)
    assert len(names) == 2
    assert {name.rpartition("/")[0] for name in names} == {
        f"some/prefix/uploads/{hashlib.sha256(owner).hexdigest()[:32]}" for owner in (b"tenant-one", b"tenant-two")
    }
    assert all(re.fullmatch(r"some/prefix/uploads/[0-9a-f]{32}/[0-9a-f]{64}", name) for name in names)


async def test_a_file_belongs_to_its_owner_and_model(uploads: BucketUploads) -> None:
    """Another caller, another model, and another key find no file."""
    key = await put(uploads, "a.wav", b"abc")
    for changes in (
        {"owner": "someone"},
        {"model": "other"},
        {"key": key + "x"},
        {"key": "../../etc/passwd"},
        {"key": "\ud800\0", "owner": "", "model": ""},
    ):
        with pytest.raises(errors.UploadNotFound):
            await fetch(uploads, **({"key": key} | changes))


async def test_nothing_is_overwritten(uploads: BucketUploads) -> None:
    """A second upload of a key is refused before it is read, and the first one is kept."""
    policy = uploads.issue(OWNER, MODEL)
    key = await put(uploads, "a.wav", b"first", policy)
    with pytest.raises(errors.UploadExists):
        await put(uploads, "a.wav", b"second", policy)
    assert await fetch(uploads, key) == b"first"
    assert uploads.used_bytes == 4096


async def test_one_of_two_concurrent_uploads_is_stored(uploads: BucketUploads, tmp_path: Path) -> None:
    """Overlapping uploads of one key do not mix: the first to finish is stored, the other refused."""
    policy = uploads.issue(OWNER, MODEL)
    grant = uploads.check(policy=policy.policy, signature=policy.signature, key=f"{policy.upload_dir}/a")
    with pytest.raises(errors.UploadExists):  # noqa: PT012 - on leaving, not before
        async with uploads.receive(grant) as slow:
            await slow.write(b"slow")
            async with uploads.receive(grant) as quick:
                await quick.write(b"quick")
    assert await fetch(uploads, grant.key) == b"quick"
    assert (uploads.used_bytes, on_disk(tmp_path)) == (4096, [])


async def test_a_refused_file_leaves_nothing(
    uploads: BucketUploads, s3_server: S3Server, bucket: str, tmp_path: Path
) -> None:
    """An empty, too large or interrupted file leaves no object, no local file and no counted byte."""
    with pytest.raises(errors.UploadEmpty):
        await put(uploads, "a", b"")
    with pytest.raises(errors.UploadTooLarge):
        await put(uploads, "a", bytes(1001))
    policy = uploads.issue(OWNER, MODEL)
    grant = uploads.check(policy=policy.policy, signature=policy.signature, key=f"{policy.upload_dir}/a")
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the exception is raised inside
        async with uploads.receive(grant) as upload:
            await upload.write(b"abc")
            raise ZeroDivisionError
    assert (s3_server.objects(bucket), on_disk(tmp_path)) == ([], [])
    assert (uploads.used_bytes, sum(uploads._files.values())) == (0, 0)


async def test_a_large_file_is_written_in_parts(s3_server: S3Server, bucket: str, tmp_path: Path) -> None:
    """A file over 16 MiB goes to the bucket in parts, and keeps its checksum."""
    changes = {"max_upload_bytes": 32 * MIB, "max_uploads_bytes": 128 * MIB}
    store = BucketUploads(settings(tmp_path, **changes, **bucket_settings(s3_server.url, bucket)))
    await store.start()
    policy, data = store.issue(OWNER, MODEL), bytes(range(256)) * (20 * MIB // 256)
    grant = store.check(policy=policy.policy, signature=policy.signature, key=f"{policy.upload_dir}/a")
    async with store.receive(grant) as upload:
        await upload.write(data)
    assert await fetch(store, grant.key) == data
    assert store.used_bytes == 20 * MIB
    with pytest.raises(errors.UploadExists):
        async with store.receive(grant):
            pass
    await store.stop()


async def test_files_expire(uploads: BucketUploads, s3_server: S3Server, bucket: str, monkeypatch: Any) -> None:
    """After 48 hours a file is not found; an hour later the sweep deletes its object, and no other program's."""
    key = await put(uploads, "a", b"abc")
    await obstore.put_async(uploads._bucket._store, "uploads/notes.txt", b"of another program")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 48 * 3600 - 5)
    assert await fetch(uploads, key) == b"abc"
    monkeypatch.setattr(time, "time", lambda: now + 48 * 3600 + 5)
    with pytest.raises(errors.UploadNotFound):
        await fetch(uploads, key)
    await uploads.sweep()
    assert (len(s3_server.objects(bucket)), uploads.used_bytes) == (2, 4096)
    monkeypatch.setattr(time, "time", lambda: now + 49 * 3600 + 5)
    await uploads.sweep()
    assert s3_server.objects(bucket) == ["some/prefix/uploads/notes.txt"]
    assert (uploads.used_bytes, sum(uploads._files.values())) == (0, 0)


async def test_the_bounds_count_the_files_of_all_frontends(s3_server: S3Server, bucket: str, tmp_path: Path) -> None:
    """A frontend counts the files in the bucket when it starts, and at each sweep those of other frontends."""
    changes = {"max_uploads_per_tenant": 2, **bucket_settings(s3_server.url, bucket)}
    one, two = (BucketUploads(settings(tmp_path / name, **changes)) for name in ("one", "two"))
    await one.start()
    policy = one.issue(OWNER, MODEL)
    await put(one, "a", b"x" * 5)
    await two.start()
    assert (two.used_bytes, two._files.total()) == (4096, 1)
    await put(one, "b", b"y" * 5, policy)
    await two.sweep()
    assert two.used_bytes == 2 * 4096
    for store in (one, two):
        with pytest.raises(errors.Overloaded, match="as many files as one caller may"):
            await put(store, "c", b"z")
        await store.sweep()
        assert store.used_bytes == 2 * 4096
        await store.stop()


async def test_files_that_arrive_during_a_sweep_are_counted_once(
    uploads: BucketUploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listing shows files that were stored since its start: they are counted already."""
    key = await put(uploads, "a", b"abc")

    async def slow(self: Bucket, prefix: str) -> AsyncIterator[StoredObject]:
        await put(uploads, "b", b"abc")
        async for found in listing(self, prefix):
            yield found

    listing = Bucket.list
    monkeypatch.setattr(Bucket, "list", slow)
    await uploads.sweep()
    assert uploads.used_bytes == 2 * 4096
    assert await fetch(uploads, key) == b"abc"


async def test_the_local_copies_are_bounded(s3_server: S3Server, bucket: str, tmp_path: Path) -> None:
    """Copies of files that are read take at most `max_downloads_bytes` of the local disk."""
    size = MIB // 2
    changes = {"max_upload_bytes": MIB, "max_downloads_bytes": MIB, "max_uploads_bytes": 8 * MIB}
    store = BucketUploads(settings(tmp_path, **changes, **bucket_settings(s3_server.url, bucket)))
    await store.start()
    keys = [await put(store, "a", bytes(size), store.issue(owner, MODEL)) for owner in ("one", "two", "three")]
    async with (
        store.reading(keys[0], owner="one", model=MODEL),
        store.reading(keys[1], owner="two", model=MODEL),
    ):
        with pytest.raises(errors.Overloaded) as caught:
            await fetch(store, keys[2], "three")
        assert caught.value.reason == "downloads"
    assert len(await fetch(store, keys[2], "three")) == size
    assert store._copies.used == 0
    await store.stop()


def test_the_sweeps_are_ten_minutes_apart() -> None:
    """Each sweep lists the bucket; one that failed is repeated after a minute."""
    assert (bucket_uploads._SWEEP_S, bucket_uploads._FAILED_SWEEP_S) == (600, 60)
