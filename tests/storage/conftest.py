"""A store of uploads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from serving.storage.uploads import DirectoryUploads
from tests.storage.client import settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[DirectoryUploads]:
    """A running store."""
    store = DirectoryUploads(settings(tmp_path))
    await store.start()
    yield store
    await store.stop()
