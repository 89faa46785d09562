"""A process that is killed at each point of a batch's work, and the next one that takes over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Self

import httpx
import pytest
import sqlalchemy as sa

from benchmarks.servers import free_port
from serving.tenancy import database as databases
from serving.tenancy import schema
from tests.batch.killed_service import POINTS
from tests.batch.served import jsonl, line
from tests.support.wire import data_url

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KEY = {"authorization": "Bearer sk-of-the-settings"}
ENDED = {"completed", "failed", "expired", "cancelled"}
LINES = [line(f"good-{number}") for number in range(12)]
BAD = [line(f"bad-{number}", data_url(b"no audio")) for number in range(3)]


class _Service:
    """A service that dies at a point, with its data in a directory that the next one uses, too."""

    def __init__(self, directory: Path, point: str, number: int) -> None:
        self._port = free_port()
        self._log = (directory / f"log-{point.replace(' ', '-')}").open("wb")
        command = [sys.executable, "-m", "tests.batch.killed_service", point, str(number), "serve"]
        command += ["--engine=fake", "--audio-workers=1", f"--port={self._port}", "--max-batch-lines=3"]
        command += [f"--data-dir={directory / 'data'}", f"--download-dir={directory}"]
        command += [f"--uploads-dir={directory / 'uploads'}", "--fake-tpot-s=0.002"]
        environment = os.environ | {"CAPTIONER_API_KEYS": "sk-of-the-settings"}
        self.process = subprocess.Popen(command, env=environment, stdout=self._log, stderr=self._log)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self._port}", headers=KEY, timeout=30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.kill()
        self.process.wait()
        self.client.close()
        self._log.close()

    def until_ready(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                if self.client.get("/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.05)
        raise TimeoutError

    def create(self, lines: list[Any]) -> str:
        """Make a batch; return its id."""
        form = {"file": ("in.jsonl", jsonl(lines))}
        file = self.client.post("/v1/files", data={"purpose": "batch"}, files=form).json()
        body = {
            "input_file_id": file["id"],
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
        }
        return str(self.client.post("/v1/batches", json=body).json()["id"])

    def ended(self, batch_id: str) -> dict[str, Any]:
        """Wait until a batch has ended; return its object."""
        deadline = time.monotonic() + 60
        while True:
            shown: dict[str, Any] = self.client.get(f"/v1/batches/{batch_id}").json()
            if shown["status"] in ENDED:
                return shown
            assert time.monotonic() < deadline, shown
            time.sleep(0.1)

    def results(self, file_id: str) -> list[dict[str, Any]]:
        """Return the lines of an output file."""
        text = self.client.get(f"/v1/files/{file_id}/content").text
        return [json.loads(each) for each in text.splitlines()]


@pytest.fixture(scope="module")
def survived(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, _Service, str]]:
    """A batch that was interrupted at every point, one process after the other, and then completed."""
    directory = tmp_path_factory.mktemp("killed")
    number = {"opened": 3, "generated": 3, "committed": 2, "closed": 2}
    batch_id = ""
    for point in POINTS:
        with _Service(directory, point, number.get(point, 1)) as service:
            if not batch_id:
                service.until_ready()
                batch_id = service.create([*LINES, *BAD])
            assert service.process.wait(60) == -9, point
    with _Service(directory, "never", 0) as service:
        service.until_ready()
        yield directory, service, batch_id


def test_every_line_has_one_result_and_one_bill(survived: tuple[Path, _Service, str]) -> None:
    """Nine kills later each line is in one file once, each good line has one billed record, and the sums are equal."""
    directory, service, batch_id = survived
    shown = service.ended(batch_id)
    assert (shown["status"], shown["request_counts"]) == ("completed", {"total": 15, "completed": 12, "failed": 3})
    good, bad = service.results(shown["output_file_id"]), service.results(shown["error_file_id"])
    assert [each["custom_id"] for each in good] == [each["custom_id"] for each in LINES]
    assert [each["custom_id"] for each in bad] == [each["custom_id"] for each in BAD]
    usage = [each["response"]["body"]["usage"] for each in good]
    assert sum(each["total_tokens"] for each in usage) == shown["usage"]["total_tokens"] == 12 * 45
    assert len(service.client.get("/v1/files?purpose=batch_output").json()["data"]) == 2
    database = databases.connect(f"sqlite:///{directory / 'data' / 'captioner.db'}")
    deadline = time.monotonic() + 30
    records = schema.usage_records
    while True:  # until the journals of all dead processes are replayed
        with database.connect() as connection:
            rows = [*connection.execute(sa.select(records).where(records.c.dialect == "batch"))]
            amount = connection.scalar(sa.select(schema.batches.c.amount_nanos))
            lines = connection.scalar(sa.select(sa.func.count()).select_from(schema.batch_lines))
        if all(row.ending is not None for row in rows) and service.client.get("/readyz").status_code == 200:
            break
        assert time.monotonic() < deadline
        time.sleep(0.2)
    database.dispose()
    billed = {row.request_id: row for row in rows if row.billed}
    assert sorted(billed) == sorted(f"{batch_id}-{number}" for number in range(1, 13))
    assert {row.ending for row in rows} == {"finished", "rejected"}
    assert sum(row.input_tokens + row.output_tokens for row in billed.values()) == 12 * 45
    assert sum(row.amount_nanos for row in billed.values()) == amount
    assert (len(rows), lines) == (15, 0)
