"""A server with planted faults, and the sounds of clips, for tests of Locust runs."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from benchmarks.load.clips import Bank
from tests.benchmarks.faulty_server import FaultyServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def faulty() -> Iterator[FaultyServer]:
    """The server with planted faults."""
    server = FaultyServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def url(faulty: FaultyServer) -> str:
    """URL of the server with planted faults."""
    faulty.requests.clear()
    return f"http://127.0.0.1:{faulty.server_port}"


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the sounds of MP3 clips, encoded once for all runs, and of clips behind URLs."""
    directory = tmp_path_factory.mktemp("clips")
    Bank(directory).clip("mp3", 1, 0)
    return directory
