"""Stores of uploads: in a directory, and in a bucket of a real S3 server."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from serving.storage.uploads import DirectoryUploads
from tests.storage.client import settings
from tests.storage.s3 import FaultProxy, S3Server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[DirectoryUploads]:
    """A running store."""
    store = DirectoryUploads(settings(tmp_path))
    await store.start()
    yield store
    await store.stop()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """An S3 server that accepts any key."""
    with S3Server() as server:
        yield server


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    """A proxy before the S3 server, without a fault."""
    with FaultProxy(s3_server.url) as proxy:
        yield proxy
