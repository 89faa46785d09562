"""Fixtures that several rooms share: services as separate processes, started once a session."""

from __future__ import annotations

import os
import signal
import tempfile
from typing import TYPE_CHECKING

import hypothesis
import pytest
from _pytest.nodeid import NodeId

from tests import needs
from tests.support.in_process import AudioThreads, DownloadThreads
from tests.support.lazy import Lazy
from tests.support.media import MediaServer
from tests.support.service import RunningService

if TYPE_CHECKING:
    from collections.abc import Iterator


hypothesis.settings.register_profile("busy machine", deadline=None)
hypothesis.settings.load_profile("busy machine")

for name in [name for name in os.environ if name.startswith("CAPTIONER_")]:
    del os.environ[name]  # what this shell would serve is not what is tested
_DATA = tempfile.TemporaryDirectory(prefix="captioner-test-data-")
os.environ["CAPTIONER_DATA_DIR"] = _DATA.name  # nor does what is tested touch what this user serves

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell ignores it for jobs in the background, and all their children inherit that: nothing would stop on Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marks of `tests/needs.py`."""
    for name, meaning in needs.NEEDS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


_LONGEST_FIRST = ("engine", "cluster", "sdk", "chart", "cuda", "store", "process")
"""Needs in the order in which their groups start under `-n`; a long group that started last would leave a core idle."""


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Mark each test with what it needs, before `-m` selects, and with the group that shares it under `-n`.

    All tests of the real engine run one after the other in one process, which loads the model once, as do those of the
    real cluster, and those that import PyTorch or the like; else a file's tests stay together, and with them what its
    fixtures made.
    """
    ranks: dict[str, int] = {}
    groups: dict[pytest.Item, str] = {}
    for item in items:
        if isinstance(item, pytest.Function):
            found = needs.of(item)
            for need in sorted(found):
                item.add_marker(need)
            lazy = "lazy" if any(isinstance(value, Lazy) for value in vars(item.module).values()) else item.location[0]
            group = next((need for need in ("engine", "cluster") if need in found), lazy)
            item.add_marker(pytest.mark.xdist_group(group))
            groups[item] = group
            rank = min((_LONGEST_FIRST.index(need) for need in found), default=len(_LONGEST_FIRST))
            ranks[group] = min(rank, ranks.get(group, rank))
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: ranks.get(groups.get(item, ""), 0))
    yield
    for item in items:
        # xdist 3.8 has written each test's name with its group where pytest read it until 9.1. Without it there are no
        # groups, silently: each worker starts its own engine and its own cluster.
        if (name := getattr(item, "_nodeid", item.nodeid)) != item.nodeid:
            path, _, rest = name.partition("::")
            item._id = NodeId(path=path, names=(rest,))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Applications of this test start no processes: see `tests.support.in_process`."""
    monkeypatch.setattr("serving.api.app.AudioWorkerPool", AudioThreads)
    monkeypatch.setattr("serving.api.app.DownloadProcess", DownloadThreads)


@pytest.fixture(scope="session")
def fake_service() -> Iterator[RunningService]:
    """The whole service with the fake engine: fast and deterministic, one event per token."""
    with RunningService("--engine=fake", "--fetch-allow=127.0.0.0/8", "--stream-flush-interval-s=0") as service:
        yield service


@pytest.fixture(scope="session")
def embedded_service() -> Iterator[RunningService]:
    """The whole service with the real engine and the embedded checkpoint."""
    flags = ("--fetch-allow=127.0.0.0/8", "--max-output-tokens=256", "--allow-ignore-eos")
    with RunningService(*flags, start_timeout_s=280) as service:
        yield service


@pytest.fixture(scope="session")
def media() -> Iterator[MediaServer]:
    """A web server on loopback for audio behind URLs."""
    with MediaServer() as server:
        yield server
