"""The directory that keeps uploaded files."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from typing import TYPE_CHECKING

import pytest

from serving import errors
from serving.config import Settings
from serving.storage import uploads
from serving.storage.uploads import DirectoryUploads
from tests.storage.client import MIB, MODEL, OWNER, fetch, put, settings

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def stored(directory: Path) -> list[Path]:
    """Return every stored file."""
    return [path for path in directory.rglob("*") if path.is_file()]


# Receiving


async def test_a_stored_file_is_private(store: DirectoryUploads, tmp_path: Path) -> None:
    """Only the service's user can read the file, and its name on disk reveals nothing of the client's name."""
    key = await put(store, "secret-name.wav", b"abc")
    (path,) = stored(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert "secret" not in str(path)
    assert await store.open(key, owner=OWNER, model=MODEL) == path


async def test_a_file_above_a_lowered_limit_is_not_opened(tmp_path: Path) -> None:
    """A file that was stored under a larger limit is `AudioTooLarge`; one of the limit's size is opened."""
    larger = DirectoryUploads(settings(tmp_path))
    await larger.start()
    keys = [await put(larger, f"{size}.wav", b"x" * size) for size in (500, 501)]
    await larger.stop()
    lowered = DirectoryUploads(settings(tmp_path, max_upload_bytes=500))
    await lowered.start()
    assert await fetch(lowered, keys[0]) == b"x" * 500
    with pytest.raises(errors.AudioTooLarge):
        await lowered.open(keys[1], owner=OWNER, model=MODEL)
    await lowered.stop()


async def test_a_file_belongs_to_its_owner_and_model(store: DirectoryUploads) -> None:
    """Another caller, another model, and another key find no file."""
    key = await put(store, "a.wav", b"abc")
    assert await fetch(store, key) == b"abc"
    for other in (
        {"key": key, "owner": "someone", "model": MODEL},
        {"key": key, "owner": OWNER, "model": "other"},
        {"key": key + "x", "owner": OWNER, "model": MODEL},
        {"key": "../../etc/passwd", "owner": OWNER, "model": MODEL},
        {"key": "\ud800\0", "owner": "", "model": ""},
    ):
        with pytest.raises(errors.UploadNotFound):
            await store.open(other["key"], owner=other["owner"], model=other["model"])


async def test_several_files_under_one_policy(store: DirectoryUploads) -> None:
    """One policy allows all files of a call."""
    policy = store.issue(OWNER, MODEL)
    keys = [await put(store, f"{number}.wav", str(number).encode(), policy) for number in range(5)]
    assert [await fetch(store, key) for key in keys] == [b"0", b"1", b"2", b"3", b"4"]


async def test_nothing_is_overwritten(store: DirectoryUploads, tmp_path: Path) -> None:
    """A second upload of a key is refused before it is read, and the first one is kept."""
    policy = store.issue(OWNER, MODEL)
    key = await put(store, "a.wav", b"first", policy)
    with pytest.raises(errors.UploadExists) as caught:
        await put(store, "a.wav", b"second", policy)
    assert caught.value.code == "FileAlreadyExists"
    assert await fetch(store, key) == b"first"
    assert len(stored(tmp_path)) == 1


async def test_one_of_two_concurrent_uploads_is_stored(store: DirectoryUploads, tmp_path: Path) -> None:
    """Overlapping uploads of one key do not mix: the first to finish is stored, the other refused."""
    policy = store.issue(OWNER, MODEL)
    grant = store.check(policy=policy.policy, signature=policy.signature, key=f"{policy.upload_dir}/a")
    with pytest.raises(errors.UploadExists):  # noqa: PT012 - on leaving, not before
        async with store.receive(grant) as slow:
            await slow.write(b"slow")
            async with store.receive(grant) as quick:
                await quick.write(b"quick")
            await slow.write(b"slow")
    assert await fetch(store, grant.key) == b"quick"
    assert len(stored(tmp_path)) == 1
    assert store.used_bytes == 4096


async def test_the_size_is_limited_while_reading(store: DirectoryUploads, tmp_path: Path) -> None:
    """The limit is inclusive; a file with one byte more is refused when that byte arrives, and leaves nothing."""
    await put(store, "most", bytes(1000))
    with pytest.raises(errors.UploadTooLarge) as caught:
        await put(store, "more", bytes(1001))
    assert caught.value.code == "EntityTooLarge"
    assert len(stored(tmp_path)) == 1
    assert store.used_bytes == 4096


async def test_an_upload_that_fails_or_is_cancelled_leaves_nothing(store: DirectoryUploads, tmp_path: Path) -> None:
    """A client that disconnects leaves no file and no counted byte, and may retry with the same key."""
    policy = store.issue(OWNER, MODEL)
    grant = store.check(policy=policy.policy, signature=policy.signature, key=f"{policy.upload_dir}/a")
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the exception is raised inside
        async with store.receive(grant) as upload:
            await upload.write(b"abc")
            raise ZeroDivisionError

    async def hang() -> None:
        async with store.receive(grant) as upload:
            await upload.write(b"abc")
            await asyncio.sleep(60)

    task = asyncio.create_task(hang())
    await asyncio.sleep(0.01)
    assert len(stored(tmp_path)) == 1
    with pytest.raises(errors.UploadNotFound):
        await store.open(grant.key, owner=OWNER, model=MODEL)
    task.cancel()
    await asyncio.wait((task,))
    assert not stored(tmp_path)
    assert store.used_bytes == 0
    assert await fetch(store, await put(store, "a", b"again", policy)) == b"again"


async def test_the_disk_is_bounded(tmp_path: Path) -> None:
    """An upload beyond the disk space of all uploads is refused as overload; stored files are kept."""
    store = DirectoryUploads(settings(tmp_path, max_upload_bytes=MIB))
    await store.start()
    key = await put(store, "a", bytes(MIB // 2))
    with pytest.raises(errors.Overloaded) as caught:
        await put(store, "b", bytes(MIB // 2 + 1), store.issue("other", MODEL))
    assert "all the space that one caller's may take" in str(caught.value)
    left = MIB // 2
    for number in range(7):
        await put(store, "c", bytes(left // 2), store.issue(f"owner {number}", MODEL))
        left -= left // 2
    with pytest.raises(errors.Overloaded) as caught:
        await put(store, "d", bytes(left + 1), store.issue("last", MODEL))
    assert str(caught.value) == errors.Overloaded.message
    assert len(await fetch(store, key)) == MIB // 2
    await store.stop()


async def test_no_owner_fills_the_disk(tmp_path: Path) -> None:
    """An owner may use at most as much as is free, files from before a restart included; the refusal says so."""
    changes = {"max_upload_bytes": MIB}
    store = DirectoryUploads(settings(tmp_path, **changes))
    await store.start()
    for number in range(2):
        await put(store, str(number), bytes(MIB // 4))
    await store.stop()
    again = DirectoryUploads(settings(tmp_path, **changes))
    await again.start()
    with pytest.raises(errors.Overloaded, match="all the space that one caller's may take") as caught:
        await put(again, "more", b"1")
    assert caught.value.retry_after_s == 60
    old = stored(tmp_path)
    await put(again, "a", bytes(MIB // 4), again.issue("other", MODEL))
    for path in old:
        os.utime(path, times=(0, 0))
    await again.sweep()
    assert again.used_bytes == MIB // 4
    await put(again, "b", b"now there is space")
    await again.stop()


async def test_a_full_disk_is_our_fault(store: DirectoryUploads, monkeypatch: pytest.MonkeyPatch) -> None:
    """No space left on the device is `Overloaded`."""
    real = os.open
    monkeypatch.setattr(os, "open", lambda *_: real("/dev/full", os.O_WRONLY))
    with pytest.raises(errors.Overloaded):
        await put(store, "a", b"abc")
    assert store.used_bytes == 0


async def test_no_file_to_write_to_is_our_fault(store: DirectoryUploads, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that cannot be created, because all descriptors are in use, is `Overloaded`."""

    def full(*_: object) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(errors.Overloaded):
        await put(store, "a", b"abc")
    assert store.used_bytes == 0


# Keeping


async def test_files_expire(store: DirectoryUploads, tmp_path: Path) -> None:
    """After 48 hours a file is not found; it is removed an hour later, when no reader can still have it open."""
    assert Settings().upload_ttl_s == 48 * 3600
    key, fresh = await put(store, "a", b"abc"), await put(store, "b", b"defg")
    path = await store.open(key, owner=OWNER, model=MODEL)
    os.utime(path, times=(0, time.time() - 48 * 3600 + 5))
    assert await fetch(store, key) == b"abc"
    os.utime(path, times=(0, time.time() - 48 * 3600 - 5))
    with pytest.raises(errors.UploadNotFound):
        await fetch(store, key)
    await store.sweep()
    assert path.exists()
    os.utime(path, times=(0, time.time() - 49 * 3600 - 5))
    await store.sweep()
    assert not path.exists()
    assert await fetch(store, fresh) == b"defg"
    assert store.used_bytes == 4096
    assert len(stored(tmp_path)) == 1


async def test_the_sweeper_runs_periodically_and_survives_errors(
    store: DirectoryUploads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The sweeper continues in the background after an error of a single sweep."""
    monkeypatch.setattr(uploads, "_SWEEP_S", 0.01)
    await store.stop()
    await store.start()
    await put(store, "a", b"abc")
    (path,) = stored(tmp_path)
    directory, store._directory = store._directory, tmp_path / "gone"
    async with asyncio.timeout(20):
        while "uploads sweep failed" not in caplog.text:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.01)
    store._directory = directory
    os.utime(path, times=(0, 0))
    async with asyncio.timeout(20):
        while path.exists():  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.01)


async def test_stored_files_outlive_a_restart(tmp_path: Path) -> None:
    """Files outlive the service and are counted again; an incomplete file is removed once it is old."""
    first = DirectoryUploads(settings(tmp_path))
    await first.start()
    key = await put(first, "t ö+n%e.wav", b"abc")
    await first.stop()
    await first.stop()
    young, old = (tmp_path / f"captioner-uploads-{os.geteuid()}" / f"{age}.partial" for age in ("young", "old"))
    young.write_bytes(b"12345")
    old.write_bytes(b"1234567")
    os.utime(old, times=(0, time.time() - 3700))
    second = DirectoryUploads(settings(tmp_path))
    await second.start()
    assert await fetch(second, key) == b"abc"
    assert young.exists()
    assert not old.exists()
    assert second.used_bytes == 2 * 4096
    await second.stop()


async def test_bytes_received_during_a_sweep_are_counted(
    store: DirectoryUploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep counts in another thread; bytes that arrive meanwhile are counted, too."""
    await put(store, "a", b"abc")
    counted = store._sweep()
    arrived = asyncio.Event()

    def slow() -> tuple[Mapping[str, int], Mapping[str, int]]:
        asyncio.run_coroutine_threadsafe(arrived.wait(), loop).result()
        return counted

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(store, "_sweep", slow)
    sweeping = asyncio.create_task(store.sweep())
    await asyncio.sleep(0.01)
    await put(store, "b", b"defg")
    arrived.set()
    await sweeping
    assert store.used_bytes == 2 * 4096
