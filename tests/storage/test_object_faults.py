"""Faults of an object store: each is a `StorageUnavailable` in bounded time, and nothing is lost or counted."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from serving import errors
from serving.cli.doctor import services
from serving.cli.doctor.findings import Level
from serving.storage.bucket_uploads import BucketUploads
from tests.storage.client import MODEL, OWNER, fetch, put, settings
from tests.storage.s3 import SECRET, FaultProxy, S3Server, bucket_settings, stall

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.storage.s3 import Handler

MESSAGE = "The storage of uploaded files is unavailable, please try again later."


@pytest.fixture
async def uploads(s3_server: S3Server, proxy: FaultProxy, tmp_path: Path) -> AsyncIterator[BucketUploads]:
    """A running store in a fresh bucket behind the proxy."""
    store = BucketUploads(settings(tmp_path, **bucket_settings(proxy.url, s3_server.bucket())))
    await store.start()
    yield store
    await store.stop()


def assert_nothing_held(store: BucketUploads, tmp_path: Path, *, files: int = 0) -> None:
    """Assert that the store counts this many files, and holds no local file."""
    assert (store.used_bytes, store._files.total(), store._copies.used) == (files * 4096, files, 0)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert store._bucket._writes._value == 4


async def test_a_server_that_fails_once_is_asked_again(uploads: BucketUploads, proxy: FaultProxy) -> None:
    """A 503 or a connection that is closed is retried within the deadline, for writes and reads."""
    for fault in (lambda handler: handler.refuse(503, "SlowDown"), _close):
        key = ""
        for _ in range(2):
            failed: list[str] = []

            def once(handler: Handler, failed: list[str] = failed, fault: object = fault) -> bool:
                if handler.command in failed:
                    return False
                failed.append(handler.command)
                return bool(fault(handler))  # type: ignore[operator]

            proxy.fault = once
            if key:
                assert await fetch(uploads, key) == b"abc"
                assert failed == ["GET"]
            else:
                key = await put(uploads, "a", b"abc")
                assert failed == ["HEAD", "PUT"]


async def test_a_lost_response_does_not_refuse_its_own_file(uploads: BucketUploads, proxy: FaultProxy) -> None:
    """A write whose response is lost is retried, and finds its own object rather than another upload's."""
    methods: list[str] = []

    def lose(handler: Handler) -> bool:
        methods.append(handler.command)
        proxy.lose_responses = int(methods == ["HEAD", "PUT"])
        return False

    proxy.fault = lose
    key = await put(uploads, "a", b"abc")
    assert methods.count("PUT") == 2
    proxy.fault = lambda _: False
    assert await fetch(uploads, key) == b"abc"
    assert uploads.used_bytes == 4096


async def test_a_server_that_keeps_failing(uploads: BucketUploads, proxy: FaultProxy, tmp_path: Path) -> None:
    """A store that answers 503 fails uploads and reads; once it answers again the same key can be used."""
    key, policy = await put(uploads, "kept", b"abc"), uploads.issue(OWNER, MODEL)
    proxy.fault = lambda handler: handler.refuse(503, "SlowDown")
    for _ in range(2):
        with pytest.raises(errors.StorageUnavailable) as caught:
            await put(uploads, "a", b"abc", policy)
        assert str(caught.value) == MESSAGE
        with pytest.raises(errors.StorageUnavailable):
            await fetch(uploads, key)
        with pytest.raises(errors.StorageUnavailable):
            await uploads.sweep()
    assert_nothing_held(uploads, tmp_path, files=1)
    proxy.fault = lambda handler: handler.command == "PUT" and handler.refuse(503, "SlowDown")
    with pytest.raises(errors.StorageUnavailable):
        await put(uploads, "a", b"abc", policy)
    assert_nothing_held(uploads, tmp_path, files=1)
    proxy.fault = lambda _: False
    assert await fetch(uploads, await put(uploads, "a", b"abc", policy)) == b"abc"
    assert await fetch(uploads, key) == b"abc"


async def test_a_slow_server_meets_a_deadline(s3_server: S3Server, proxy: FaultProxy, tmp_path: Path) -> None:
    """A store that does not answer in `object_store_timeout_s` is given up, however many requests it would take."""
    changes = bucket_settings(proxy.url, s3_server.bucket()) | {"object_store_timeout_s": 1}
    store = BucketUploads(settings(tmp_path, **changes))
    await store.start()
    key = await put(store, "kept", b"abc")
    proxy.fault = stall(3)
    for call in (put(store, "a", b"abc"), fetch(store, key), store.sweep()):
        started = time.monotonic()
        with pytest.raises(errors.StorageUnavailable):
            await call
        assert time.monotonic() - started < 2
    assert_nothing_held(store, tmp_path, files=1)
    await store.stop()


async def test_a_body_that_stalls_or_breaks_off(uploads: BucketUploads, proxy: FaultProxy, tmp_path: Path) -> None:
    """A response that is cut off is not taken for the file."""
    key = await put(uploads, "a", b"abc" * 100)
    proxy.alter = lambda body: body[:100]
    with pytest.raises(errors.StorageUnavailable):
        await fetch(uploads, key)
    assert_nothing_held(uploads, tmp_path, files=1)


async def test_a_checksum_mismatch_is_never_served(
    uploads: BucketUploads, proxy: FaultProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bytes that differ from those that were uploaded are read again, and refused if they differ again."""
    key = await put(uploads, "a", b"abc" * 100)
    answers = [b"xyz" * 100, b"abc" * 100]
    proxy.alter = lambda _: answers.pop(0)
    assert await fetch(uploads, key) == b"abc" * 100
    proxy.alter = lambda _: b"xyz" * 100
    with pytest.raises(errors.StorageUnavailable):
        await fetch(uploads, key)
    assert caplog.text.count("object checksum mismatch") == 3
    assert_nothing_held(uploads, tmp_path, files=1)


async def test_a_store_without_conditional_writes(uploads: BucketUploads, proxy: FaultProxy) -> None:
    """A store that answers 501 to `If-None-Match`, as Alibaba OSS does, is used without; nothing is overwritten."""
    proxy.fault = lambda handler: "if-none-match" in handler.headers and handler.refuse(501, "NotImplemented")
    policy = uploads.issue(OWNER, MODEL)
    key = await put(uploads, "a", b"abc", policy)
    assert await fetch(uploads, key) == b"abc"
    with pytest.raises(errors.UploadExists):
        await put(uploads, "a", b"other", policy)
    proxy.requests.clear()
    await put(uploads, "b", b"abc", policy)
    assert proxy.requests == ["HEAD", "HEAD", "PUT"]


async def test_a_store_without_deletion_of_several_objects(uploads: BucketUploads, proxy: FaultProxy) -> None:
    """With `object_store_endpoint`, objects are deleted one by one, as Alibaba OSS requires."""
    policy = uploads.issue(OWNER, MODEL)
    for name in "abc":
        await put(uploads, name, b"abc", policy)
    proxy.requests.clear()
    await uploads._bucket.delete([found.name async for found in uploads._bucket.list("uploads")])
    assert proxy.requests == ["GET", "DELETE", "DELETE", "DELETE"]
    await uploads._bucket.delete(["uploads/gone"])


async def test_a_client_that_leaves_while_its_file_is_stored(
    uploads: BucketUploads, proxy: FaultProxy, tmp_path: Path
) -> None:
    """An upload that is cancelled while the bucket is written holds nothing, and its key can be used again."""
    proxy.fault = lambda handler: handler.command == "PUT" and stall(2)(handler)
    policy = uploads.issue(OWNER, MODEL)
    task = asyncio.create_task(put(uploads, "a", b"abc", policy))
    await asyncio.sleep(0.5)
    task.cancel()
    await asyncio.wait((task,))
    assert task.cancelled()
    assert_nothing_held(uploads, tmp_path)
    proxy.fault = lambda _: False
    assert await put(uploads, "b", b"abc", policy)


async def test_a_wrong_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Keys that the store refuses fail every operation with its code in the log; the log has no part of the keys."""
    caplog.set_level(logging.DEBUG)
    with S3Server(checks_keys=True) as server:
        store = BucketUploads(settings(tmp_path, **bucket_settings(server.url, server.bucket())))
        await store.start()
        with pytest.raises(errors.StorageUnavailable):
            await put(store, "a", b"abc")
        with pytest.raises(errors.StorageUnavailable):
            await fetch(store, f"{store.issue(OWNER, MODEL).upload_dir}/a")
        assert_nothing_held(store, tmp_path)
        await store.stop()
    reasons = [str(vars(record).get("reason", "")) for record in caplog.records]
    assert any("InvalidAccessKeyId" in reason for reason in reasons)
    assert "uploads sweep failed" in caplog.text
    assert SECRET not in caplog.text + "".join(reasons)
    assert "test-key-id" not in caplog.text + "".join(reasons)


async def test_a_missing_bucket(s3_server: S3Server, tmp_path: Path) -> None:
    """A bucket that does not exist is a fault of the service, not an upload that is not found."""
    store = BucketUploads(settings(tmp_path, **bucket_settings(s3_server.url, "no-such-bucket")))
    await store.start()
    with pytest.raises(errors.StorageUnavailable):
        await put(store, "a", b"abc")
    with pytest.raises(errors.StorageUnavailable):
        await fetch(store, f"{store.issue(OWNER, MODEL).upload_dir}/a")
    assert_nothing_held(store, tmp_path)
    await store.stop()


async def test_a_killed_server(tmp_path: Path) -> None:
    """With a server that is gone the store starts, refuses in seconds, and stops."""
    with S3Server() as server:
        changes = bucket_settings(server.url, server.bucket())
        store = BucketUploads(settings(tmp_path, **changes))
        await store.start()
        policy = store.issue(OWNER, MODEL)
        grant = store.check(policy=policy.policy, signature=policy.signature, key=f"{policy.upload_dir}/a")
        with pytest.raises(errors.StorageUnavailable):  # noqa: PT012 - killed in the middle of an upload
            async with store.receive(grant) as upload:
                await upload.write(b"abc")
                server.kill()
    with pytest.raises(errors.StorageUnavailable):
        await put(store, "a", b"abc")
    with pytest.raises(errors.StorageUnavailable):
        await fetch(store, grant.key)
    assert_nothing_held(store, tmp_path)
    await store.stop()
    again = BucketUploads(settings(tmp_path, **changes))
    started = time.monotonic()
    await again.start()
    assert time.monotonic() - started < 5
    assert_nothing_held(again, tmp_path)
    await again.stop()


def _close(handler: Handler) -> bool:
    handler.close_connection = True
    return True


def test_a_key_that_is_none_refuses_the_start(tmp_path: Path) -> None:
    """`captioner serve` ends at once with one line that says what to do, and the doctor has a finding; no key in it."""
    changes = {"object_store_url": "gs://captions", "object_store_secret_key": "{'hidden': 1}"}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in changes.items()]
    command = [str(Path(sys.executable).with_name("captioner")), "serve", "--engine=fake", "--port=0", "--no-auth"]
    ended = subprocess.run(
        [*command, f"--data-dir={tmp_path}", *flags], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("captioner: gs://captions cannot be used: GenericError: Generic GCS error: ")
    assert ended.stderr.endswith("; check object_store_url and object_store_secret_key\n")
    (found,) = services.bucket(settings(tmp_path, **changes))
    assert found.level is Level.ERROR
    assert "hidden" not in ended.stderr + found.message


def test_the_doctor_names_what_is_wrong_with_a_bucket(s3_server: S3Server, tmp_path: Path) -> None:
    """`captioner doctor` lists the bucket: a missing one is an error with the store's code; nothing is written."""
    name = s3_server.bucket()
    good, missing = (settings(tmp_path, **bucket_settings(s3_server.url, each)) for each in (name, "no-such-bucket"))
    (found,) = services.bucket(good)
    assert (found.level, found.message) == (Level.OK, f"s3://{name}/some/prefix can be listed")
    (found,) = services.bucket(missing)
    assert found.level is Level.ERROR
    assert found.message.startswith("s3://no-such-bucket/some/prefix cannot be used: ")
    assert found.message.endswith("NoSuchBucket")
    assert SECRET not in found.message
    assert s3_server.objects(name) == []
    assert list(services.bucket(settings(tmp_path))) == []
