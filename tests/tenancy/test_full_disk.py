"""The service on a real disk that is full, and several services on one data directory."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import sqlalchemy as sa

from serving.tenancy.schema import usage_records
from tests.support.wire import COMPATIBLE, compatible_body, data_url, wav
from tests.tenancy.running import Command

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KEY = {"authorization": "Bearer sk-of-the-settings"}
CLIP = data_url(wav(1))
SLOW = ("--fake-tokens=60", "--fake-tpot-s=0.05")
BILL = 21 * 15_800 + 60 * 12_700
"""Nano-units of a caption of `SLOW`: 21 tokens of input, 60 of output."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(directory)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting a file system needs CAP_SYS_ADMIN: {mounted.stderr.strip()}")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill(directory: Path) -> Path:
    """Take all of a disk's space; return the file that has it."""
    path = directory / "filling"
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    return path


class Streams:
    """Streams of captions that run in the background."""

    def __init__(self, url: str, count: int) -> None:
        self._url = url
        self._begun = threading.Semaphore(0)
        self.bodies: list[str] = []
        self._threads = [threading.Thread(target=self._stream) for _ in range(count)]
        for thread in self._threads:
            thread.start()
        for _ in self._threads:
            assert self._begun.acquire(timeout=30)

    def _stream(self) -> None:
        body = compatible_body(CLIP, stream=True)
        with (
            suppress(httpx.HTTPError),
            httpx.stream("POST", self._url + COMPATIBLE, json=body, headers=KEY, timeout=60) as response,
        ):
            lines = response.iter_lines()
            first = next(lines)
            self._begun.release()
            self.bodies.append("\n".join([first, *lines]))

    def complete(self) -> int:
        """Wait for all streams; return the number of those that ended as they should."""
        for thread in self._threads:
            thread.join(60)
        return sum("[DONE]" in body for body in self.bodies)


def ask(service: Command) -> httpx.Response:
    """Request a caption, not streamed."""
    return httpx.post(service.url + COMPATIBLE, json=compatible_body(CLIP), headers=KEY, timeout=60)


def bills(data: Path) -> list[tuple[Any, ...]]:
    """Return ending, billed and amount of each record in a data directory's database."""
    database = sa.create_engine(f"sqlite:///{data}/captioner.db")
    columns = usage_records.c
    with database.connect() as connection:
        found = connection.execute(sa.select(columns.ending, columns.billed, columns.amount_nanos))
        rows = [tuple(row) for row in found]
    database.dispose()
    return rows


def ready(service: Command) -> None:
    """Wait until the service is ready."""
    service.wait(lambda: service.get("/readyz").status_code == 200)


@pytest.mark.parametrize("restart", [False, True])
def test_streams_on_a_full_disk_are_billed(small_disk: Path, tmp_path: Path, *, restart: bool) -> None:
    """Captions that are delivered on a full disk are billed, later or by the next start; new ones are refused."""
    service = Command(tmp_path, "serve", *SLOW, CAPTIONER_DATA_DIR=str(small_disk), CAPTIONER_API_KEYS=KEY_VALUE)
    with service:
        ready(service)
        streams = Streams(service.url, 5)
        filling = fill(small_disk)
        assert streams.complete() == 5
        service.wait(lambda: service.get("/readyz").status_code == 503)
        assert service.get("/readyz").json()["reason"] == (
            "Usage cannot be recorded: the disk of data_dir is full or failing."
        )
        refused = ask(service)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        metrics = service.get("/metrics").text
        assert 'captioner_requests_shed_total{reason="ledger"} 1.0' in metrics
        assert "\ncaptioner_ledger_writable 0.0" in metrics
        assert [line["reason"] for line in service.lines("ledger cannot record, new requests are refused")] == [
            "ENOSPC: No space left on device"
        ]
        if restart:
            assert service.stop() == 0  # everything is in the journal
            filling.unlink()
        else:
            filling.unlink()
            ready(service)
            assert ask(service).status_code == 200
            assert len(service.lines("ledger records again")) == 1
            assert service.stop() == 0
        assert "nothing was lost" not in service.text()
    if restart:
        with service:
            ready(service)
            assert service.stop() == 0
    assert bills(small_disk) == [("finished", True, BILL)] * (5 if restart else 6)


def test_a_disk_that_is_full_at_start_is_waited_for(small_disk: Path, tmp_path: Path) -> None:
    """A service with no space for its journal answers 503, obeys a signal, and goes on when there is space."""
    service = Command(tmp_path, "serve", *SLOW, CAPTIONER_DATA_DIR=str(small_disk), CAPTIONER_API_KEYS=KEY_VALUE)
    with service:
        ready(service)
        assert service.stop() == 0
    filling = fill(small_disk)
    with service:
        assert service.wait(lambda: service.get("/readyz")).status_code == 503
        assert ask(service).status_code == 503
        assert service.stop(within_s=5) == 0
    with service:
        service.wait(lambda: service.get("/readyz"))
        filling.unlink()
        ready(service)
        assert ask(service).status_code == 200
        assert service.stop() == 0
    assert bills(small_disk) == [("finished", True, BILL)]


def test_what_can_be_stored_nowhere_is_in_the_log(tmp_path: Path) -> None:
    """If the disk and the database on it fail until the end, each record is one line, and the exit status is 4."""
    service = Command(tmp_path, "serve", *SLOW, CAPTIONER_API_KEYS=KEY_VALUE)
    with service:
        ready(service)
        streams = Streams(service.url, 3)
        # Every write to a file fails, the journal's and SQLite's.
        resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
        assert streams.complete() == 3
        service.wait(lambda: service.get("/readyz").status_code == 503)
        assert "\ncaptioner_ledger_unrecorded 3.0" in service.get("/metrics").text
        assert service.stop() == 4
        lines = service.lines("usage record not stored")
        assert [line["level"] for line in lines] == ["error"] * 3
        assert {line["usage_record"]["amount_nanos"] for line in lines} == {BILL}
        assert len({line["usage_record"]["request_id"] for line in lines}) == 3
        assert [line["records"] for line in service.lines("usage records are in the log alone")] == [3]
    with service:
        ready(service)
        assert service.stop() == 0
    assert bills(tmp_path / "data") == [("lost", False, 0)] * 3  # to be billed by hand


def test_two_services_on_one_data_directory_bill_right(tmp_path: Path) -> None:
    """Each bills its own requests, knows the same keys, and replays the other's journal when that is killed."""
    flags: dict[str, str] = {"CAPTIONER_API_KEYS": KEY_VALUE}
    one, two = (Command(tmp_path, "serve", *SLOW, **flags) for _ in range(2))
    with one, two:
        ready(one)
        ready(two)
        [line] = (one.lines(SHARED) + two.lines(SHARED))[:1]
        assert len(line["processes"]) == 1
        both = Streams(one.url, 3), Streams(two.url, 3)
        assert [streams.complete() for streams in both] == [3, 3]
        killed = Streams(one.url, 2)
        one.process.send_signal(signal.SIGKILL)
        assert killed.complete() == 0
        two.wait(lambda: two.lines("journal of a dead process replayed"))
        assert ask(two).status_code == 200
        assert two.stop() == 0
    assert sorted(bills(tmp_path / "data")) == [("finished", True, BILL)] * 7 + [("lost", False, 0)] * 2
    assert list((tmp_path / "data" / "journal").iterdir()) == []


KEY_VALUE = "sk-of-the-settings"
SHARED = "other processes use this data_dir; without redis_url each process counts limits alone"
