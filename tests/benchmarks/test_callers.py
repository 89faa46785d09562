"""Callers of a cluster: every request that was sent has one outcome."""

from __future__ import annotations

import signal
import socket
import time
from typing import TYPE_CHECKING

import pytest

from benchmarks.cluster.callers import account, outcome_of
from tests.benchmarks.locust_runs import command, read, run, running

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("fault", "outcome", "cause"),
    [
        ("closes", "lost", "connection"),
        ("breaks", "lost", "connection"),
        ("proxy", "proxy_error", "foreign"),
        ("busy", "dialect_error", "dialect"),
        ("breaks-off", "defect", ""),
        ("error-in-stream", "dialect_error", "stream"),
    ],
)
def test_every_failure_is_classified(
    url: str, clips: Path, tmp_path: Path, *, fault: str, outcome: str, cause: str
) -> None:
    """The account of a cluster's callers distinguishes lost connections, errors of a proxy, and of the service."""
    ways = "openai-stream,dashscope-stream"
    flags = (f"--ways={ways}", "--journal-sent", "--connections=both", "--seconds=1", "--max-pause-s=0.1")
    status, entries, printed = run(f"{url}/{fault}", clips, tmp_path / "journal", *flags)
    assert status == (4 if fault == "busy" else 3), printed
    ended = [entry | {"result": outcome_of(entry)} for entry in entries if "outcome" in entry]
    assert {(entry["result"], entry["cause"]) for entry in ended} == {(outcome, cause)}
    found = account([entry["number"] for entry in entries if "outcome" not in entry], ended)
    assert found["sent"] == found[outcome] == len(ended) > 0
    assert bool(found["defects"]) == (outcome == "defect")


def test_a_request_without_end_is_a_defect(url: str, clips: Path, tmp_path: Path) -> None:
    """The account names requests that were sent and never ended, ended twice, or share a request id."""
    flags = ("--journal-sent", "--seconds=1", "--max-pause-s=0.1")
    _, entries, printed = run(f"{url}/honest", clips, tmp_path / "journal", *flags)
    sent = [entry["number"] for entry in entries if "outcome" not in entry]
    ended = [entry | {"result": "answered"} for entry in entries if "outcome" in entry]
    assert account(sent, ended)["defects"] == [], printed
    assert "do not match" in account(sent, ended[1:])["defects"][0]["detail"]
    assert "do not match" in account(sent, [*ended, ended[0]])["defects"][0]["detail"]
    same_id = [entry | {"request_id": "one"} for entry in ended]
    assert "request id one" in account(sent, same_id)["defects"][0]["detail"]


def test_a_stopped_run_accounts_for_requests_in_flight(clips: Path, tmp_path: Path) -> None:
    """A caller that is stopped while the server is silent leaves an abandoned or failed request, not an unknown one."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host = f"http://127.0.0.1:{silent.getsockname()[1]}"
        flags = ("--journal-sent", "--seconds=60", "--timeout-s=1")
        journal = tmp_path / "journal"
        with running(command(host, clips, journal, *flags), clips, tmp_path / "log") as process:
            deadline = time.monotonic() + 60
            while not any("outcome" in entry for entry in read(journal)) and time.monotonic() < deadline:
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            assert process.wait(100) in (3, 4)
    entries = read(journal)
    sent = {entry["number"] for entry in entries if "outcome" not in entry}
    assert sent == {entry["number"] for entry in entries if "outcome" in entry} != set()
    assert {outcome_of(entry) for entry in entries if "outcome" in entry} <= {"lost", "abandoned"}
