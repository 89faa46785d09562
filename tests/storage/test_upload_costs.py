"""Costs of an upload: no file is free, and the files of one owner are bounded in bytes and in number."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from serving import errors
from serving.config import Settings
from serving.storage.uploads import DirectoryUploads
from tests.audio.sites import files
from tests.storage.client import MIB, MODEL, fetch, put, settings

if TYPE_CHECKING:
    from pathlib import Path


async def test_an_empty_file_is_refused(store: DirectoryUploads, tmp_path: Path) -> None:
    """A file without a byte is refused in the words of the object store, and leaves nothing."""
    with pytest.raises(errors.UploadEmpty) as caught:
        await put(store, "a", b"")
    assert (caught.value.code, str(caught.value)) == (
        "EntityTooSmall",
        "Your proposed upload is smaller than the minimum allowed size.",
    )
    assert files(tmp_path) == []
    assert store.used_bytes == 0


async def test_a_file_counts_as_a_block_at_least(tmp_path: Path) -> None:
    """Files of one byte fill an owner's share as files of 4 KiB do, when they are received and when they are swept."""
    store = DirectoryUploads(settings(tmp_path))
    await store.start()
    policy = store.issue("tiny", MODEL)
    for number in range(128):  # half of a MiB
        await put(store, str(number), b"x", policy)
    with pytest.raises(errors.Overloaded, match="all the space that one caller's may take"):
        await put(store, "more", b"x", policy)
    assert store.used_bytes == 128 * 4096
    assert store.received_bytes == 128
    await store.sweep()
    assert store.used_bytes == 128 * 4096
    assert await fetch(store, await put(store, "a", b"y" * 1000, store.issue("other", MODEL)), "other")
    await store.stop()


async def test_a_file_over_a_block_counts_as_it_is(tmp_path: Path) -> None:
    """The least cost is no surcharge."""
    store = DirectoryUploads(settings(tmp_path, max_upload_bytes=MIB))
    await store.start()
    await put(store, "a", bytes(4097))
    assert store.used_bytes == 4097
    await store.stop()


async def test_the_files_of_one_tenant_are_bounded(tmp_path: Path) -> None:
    """A tenant has at most `max_uploads_per_tenant` files, over restarts; expired ones and failed ones do not count."""
    store = DirectoryUploads(settings(tmp_path, max_uploads_per_tenant=5))
    await store.start()
    policy = store.issue("one", MODEL)
    for number in range(4):
        await put(store, str(number), b"abc", policy)
    for _ in range(3):
        with pytest.raises(errors.UploadEmpty):
            await put(store, "empty", b"", policy)
        with pytest.raises(errors.UploadExists):
            await put(store, "0", b"abc", policy)
        with pytest.raises(errors.UploadTooLarge):
            await put(store, "large", bytes(1001), policy)
    await put(store, "4", b"abc", policy)
    await store.stop()
    again = DirectoryUploads(settings(tmp_path, max_uploads_per_tenant=5))
    await again.start()
    for _ in range(2):
        with pytest.raises(errors.Overloaded) as caught:
            await put(again, "5", b"abc", policy)
    assert str(caught.value) == (
        "You have uploaded as many files as one caller may. They are removed when they expire."
    )
    assert (caught.value.retry_after_s, caught.value.reason) == (60, "uploads")
    assert await put(again, "a", b"abc", again.issue("other", MODEL))
    for path in list(again._directory.iterdir())[:2]:
        os.utime(path, times=(0, 0))
    await again.sweep()
    assert sum(again._files.values()) == 4
    await again.stop()


def test_the_default_bound_is_below_the_inodes_of_a_small_disk() -> None:
    """An ext4 file system of 10 GiB has 655,360 inodes; one tenant uses less than a sixth of them."""
    assert Settings().max_uploads_per_tenant == 100_000
