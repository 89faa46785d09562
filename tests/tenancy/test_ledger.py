"""The ledger: one record for each admitted request, whatever happens to its process and to the database."""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import time
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from serving.errors import (
    CaptionerError,
    Disconnected,
    EngineFailed,
    EngineStalled,
    Overloaded,
    UploadNotFound,
    outcome_of,
)
from serving.observability.request_record import RequestRecord
from serving.tenancy.ledger import database_writer, usage_table
from serving.tenancy.ledger import ledger as ledgers
from serving.tenancy.ledger.ledger import Ledger
from serving.tenancy.ledger.usage_record import UsageRecord, is_billed, now_ms
from serving.tenancy.limits.counter_store import Spent, Sums
from serving.tenancy.schema import metadata, usage_records
from serving.types import Caller, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("hurried")


def usage(request_id: str, replica: str = "here", **changes: Any) -> UsageRecord:
    """Return a record that was just opened."""
    fields: dict[str, Any] = {
        "request_id": request_id,
        "tenant_id": "acme",
        "key_id": "k1",
        "region": "beijing",
        "dialect": "openai",
        "model": "captioner",
        "stream": True,
        "audio_form": "inline",
        "replica": replica,
        "currency": "CNY",
        "input_price": "0.0158",
        "output_price": "0.0127",
    }
    return UsageRecord(**fields | changes)


def rows(database: sa.Engine) -> dict[str, Any]:
    """Return all records of the database by request id."""
    with database.connect() as connection:
        return {row.request_id: row for row in connection.execute(sa.select(usage_records))}


async def until(condition: Callable[[], Any], timeout_s: float = 60) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(timeout_s):
        while not await asyncio.to_thread(condition):  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.02)


def ledger_in(tmp_path: Path, database: sa.Engine, *, max_journal_bytes: int = 2**20) -> Ledger:
    """Return a process's ledger with its journal in that directory."""
    return Ledger(database, tmp_path, max_journal_bytes=max_journal_bytes)


def kill(ledger: Ledger) -> None:
    """End a ledger as SIGKILL would: its threads do nothing more, the lock is free, the journal stays as it is."""
    ledger._writer._write = lambda: None  # type: ignore[method-assign]
    ledger._stopping.set()
    ledger._syncing.join()
    ledger._writer.stop()
    assert ledger._reporting is not None
    ledger._reporting.cancel()
    for descriptor in (ledger._journal._file, ledger._journal._lock):
        os.close(descriptor)


async def test_each_record_reaches_the_database_once(database: sa.Engine, tmp_path: Path) -> None:
    """Opening and end of each record reach the database soon, its progress does not; nothing is left on the disk."""
    ledger = ledger_in(tmp_path, database)
    await ledger.start()
    records = [usage(f"r{number}", ledger.replica) for number in range(50)]
    for record in records:
        ledger.open(record)
    assert ledger.open_records == 50
    await until(lambda: len(rows(database)) == 50)
    assert {row.ending for row in rows(database).values()} == {None}
    records[7].output_tokens = 11
    reported = ledger._journal.appended
    await until(lambda: ledger._journal.appended > reported and not ledger.pending)
    assert rows(database)["r7"].output_tokens == 0
    for record in records:
        record.output_tokens, record.billed, record.amount_nanos = 20, True, 2**60
        ledger.close(record, Outcome.FINISHED)
        ledger.close(record, Outcome.FAILED)  # only the first call counts
    await until(lambda: {row.ending for row in rows(database).values()} == {"finished"})
    assert ledger.open_records == 0
    assert {(row.output_tokens, row.amount_nanos, row.billed) for row in rows(database).values()} == {(20, 2**60, True)}
    assert ledger.lag_s < 5
    await ledger.stop()
    assert list((tmp_path / "journal").iterdir()) == []
    await ledger.stop()


def test_times_of_a_record_are_in_order() -> None:
    """A first token right after the audio was prepared, noticed a little later, is not dated out of order."""
    for _ in range(500):
        record = usage("r")
        record.prepared_at = now_ms()
        first_token = time.perf_counter()
        time.sleep(0.0006)
        record.follow(RequestRecord("r", "openai", first_token=first_token))
        record.closed_at = now_ms()
        assert record.first_token_at is not None
        assert record.prepared_at <= record.first_token_at <= record.closed_at


async def test_killed_process_is_replayed(database: sa.Engine, tmp_path: Path) -> None:
    """Records that a killed process had closed stay as closed; open ones are lost, unbilled, with reported tokens."""
    dead = ledger_in(tmp_path, database)
    await dead.start()
    early, late, closed = (usage(name, dead.replica) for name in ("early", "late", "closed"))
    dead.open(early)
    early.output_tokens = 5
    reported = dead._journal.appended + 1
    await until(lambda: dead._journal.written > reported and rows(database).get("early"))
    dead._writer._write = lambda: None  # type: ignore[method-assign]
    await asyncio.sleep(0.1)  # a pass that is under way ends
    dead.open(late)
    dead.open(closed)
    closed.output_tokens, closed.billed, closed.amount_nanos = 9, True, 7
    dead.close(closed, Outcome.FINISHED)
    late.output_tokens, late.input_tokens = 3, 33
    dead._journal.append({"at": now_ms(), "progress": [late.progress()]})
    kill(dead)
    assert rows(database).keys() == {"early"}

    living = ledger_in(tmp_path, database)
    await living.start()  # replays before it returns
    found = rows(database)
    assert {name: (row.ending, row.output_tokens, row.billed, row.amount_nanos) for name, row in found.items()} == {
        "early": ("lost", 5, False, 0),
        "late": ("lost", 3, False, 0),
        "closed": ("finished", 9, True, 7),
    }
    assert found["late"].input_tokens == 33
    assert living.closed[Outcome.LOST] == 2
    assert [path.name for path in (tmp_path / "journal").iterdir()] == [living.replica]
    await living.stop()


async def test_sweep_finds_a_process_that_dies_later(
    database: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A living process sweeps the journal of one that dies, and leaves its own records open."""
    monkeypatch.setattr(database_writer, "_SWEEP_EVERY_S", 0.1)
    living, dead = ledger_in(tmp_path, database), ledger_in(tmp_path, database)
    await living.start()
    await dead.start()
    living.open(usage("mine", living.replica))
    dead.open(usage("dead", dead.replica))
    kill(dead)
    await until(lambda: rows(database).get("dead") and rows(database)["dead"].ending == "lost")
    assert rows(database)["mine"].ending is None
    await living.stop()
    assert rows(database)["mine"].ending == "cancelled"  # stop did not wait for it


async def test_lost_machine_is_found_by_missing_reports(
    database: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Open records of a machine that is gone with its disk are closed; its own outcome replaces `lost` later."""
    monkeypatch.setattr(database_writer, "_SWEEP_EVERY_S", 0.1)
    monkeypatch.setattr(database_writer, "UNREPORTED_S", 2.0)
    monkeypatch.setattr(database_writer, "_REPORT_LIVING_S", 0.1)
    monkeypatch.setattr(ledgers, "_ALIVE_TICKS", 1)
    gone = usage("gone", "elsewhere", reported_at=now_ms() - 60_000)
    usage_table.write(database, [gone.row()])
    ledger = ledger_in(tmp_path, database)
    await ledger.start()
    running = usage("running", ledger.replica)
    ledger.open(running)
    await until(lambda: rows(database)["gone"].ending == "lost")
    await asyncio.sleep(2.5)
    assert rows(database)["running"].ending is None  # it reports
    await ledger.stop()
    gone.ending, gone.billed, gone.amount_nanos = Outcome.FINISHED, True, 5
    usage_table.write(database, [gone.row()])
    assert rows(database)["gone"].ending == "finished"
    gone.ending, gone.amount_nanos = Outcome.FAILED, 0
    usage_table.write(database, [gone.row()])
    assert rows(database)["gone"].amount_nanos == 5  # final


async def test_outage_loses_nothing_and_is_bounded(tmp_path: Path) -> None:
    """Without the database requests continue until the journal is full, are refused then, and all are written later."""
    path = tmp_path / "tenancy.sqlite"
    database = sa.create_engine(f"sqlite:///{path}", poolclass=sa.NullPool)
    metadata.create_all(database)
    ledger = ledger_in(tmp_path, database, max_journal_bytes=100_000)
    await ledger.start()
    path.rename(tmp_path / "away")
    path.mkdir()  # no database can be opened there
    admitted: list[UsageRecord] = []
    while ledger.journal_bytes < 100_000:
        admitted.append(usage(f"r{len(admitted)}", ledger.replica))
        ledger.open(admitted[-1])
    with pytest.raises(Overloaded) as refused:
        ledger.open(usage("late", ledger.replica))
    assert refused.value.reason == "journal"
    assert 100 < len(admitted) < 300
    for record in admitted:  # admitted requests can still be closed
        ledger.close(record, Outcome.FINISHED)
    await until(lambda: ledger.write_failures > 1 and ledger.lag_s > 0.5)
    assert ledger.journal_bytes > 100_000
    path.rmdir()
    (tmp_path / "away").rename(path)
    await until(lambda: ledger.journal_bytes == 0)
    assert {row.ending for row in rows(database).values()} == {"finished"}
    assert len(rows(database)) == len(admitted)
    ledger.open(usage("again", ledger.replica))
    await ledger.stop()
    database.dispose()


async def test_outage_survives_the_process(tmp_path: Path) -> None:
    """A process that ends in an outage leaves its journal, which the next start writes into the database."""
    path = tmp_path / "tenancy.sqlite"
    database = sa.create_engine(f"sqlite:///{path}")
    path.mkdir()
    ledger = ledger_in(tmp_path, database)
    await ledger.start()
    record = usage("r", ledger.replica)
    ledger.open(record)
    ledger.close(record, Outcome.FINISHED)
    await ledger.stop()
    path.rmdir()
    metadata.create_all(database)
    again = ledger_in(tmp_path, database)
    await again.start()
    assert rows(database)["r"].ending == "finished"
    await again.stop()
    database.dispose()


async def test_a_refused_record_does_not_hold_up_others(
    database: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record that the database refuses is kept in a file; the others are written."""
    ledger = ledger_in(tmp_path, database)
    await ledger.start()
    for request_id in ("good", "bad", "better"):
        record = usage(request_id, ledger.replica)
        if request_id == "bad":
            record.model = None  # type: ignore[assignment]
        ledger.open(record)
        ledger.close(record, Outcome.FINISHED)
    await until(lambda: rows(database).keys() == {"good", "better"})
    await until(lambda: ledger.journal_bytes == 0)
    assert ledger._writer.refused == 2
    assert '"bad"' in (tmp_path / "refused.log").read_text()
    await ledger.stop()


async def test_spent_is_what_was_billed(database: sa.Engine, tmp_path: Path) -> None:
    """The sums are what was billed this day and month, to tenant and key; free tokens are summed over all time."""
    ledger = ledger_in(tmp_path, database)
    noon = dt.datetime.now(dt.UTC).replace(day=15, hour=12)
    today, first, before = (
        round(1000 * at.timestamp()) for at in (noon, noon.replace(day=2), noon - dt.timedelta(days=40))
    )
    paid: dict[str, Any] = {
        "billed": True,
        "ending": "finished",
        "input_tokens": 10,
        "output_tokens": 5,
        "amount_nanos": 100,
    }
    changes_of: dict[str, dict[str, Any]] = {
        "today": {"opened_at": today},
        "other key": {"opened_at": today, "key_id": "k2"},
        "month": {"opened_at": first, "free_tokens": 15, "amount_nanos": 0},
        "before": {"opened_at": before, "free_tokens": 7},
        "unbilled": {"opened_at": today, "billed": False},
        "other tenant": {"opened_at": today, "tenant_id": "other", "key_id": "k9"},
    }
    for request_id, changes in changes_of.items():
        usage_table.write(database, [usage(request_id, **paid | changes).row()])
    spent = usage_table.spent(database, Caller("acme", "k1"), today + 1000, "CNY")
    assert spent == Spent(Sums(30, 45, 200, 200), Sums(15, 30, 100, 100), 22)
    assert await ledger.spent(Caller("nobody", "k0"), today, "CNY") == Spent()


@pytest.mark.parametrize(
    ("error", "flags", "outcome", "code", "billed"),
    [
        (None, {"generated"}, "finished", "", True),
        (None, {"partial", "generated"}, "partial", "", True),
        (UploadNotFound(), set(), "rejected", "upload_not_found", False),
        (EngineFailed(), set(), "failed", "engine_failed", False),
        (EngineStalled(), {"generated"}, "failed_midstream", "engine_stalled", False),
        (CaptionerError(), set(), "failed", "captioner_error", False),
        (ValueError(), {"generated"}, "failed_midstream", "internal", False),
        (Disconnected(), set(), "disconnected", "disconnected", True),
        (asyncio.CancelledError(), {"generated"}, "cancelled", "cancelled", False),
    ],
)
def test_each_outcome_has_its_bill(
    error: BaseException | None, flags: set[str], outcome: str, code: str, *, billed: bool
) -> None:
    """Delivered captions are billed, and work for a caller that leaves; what the service failed to deliver is not."""
    found = outcome_of(error, partial="partial" in flags, generated="generated" in flags)
    assert found == (outcome, code)
    assert is_billed(found[0], given_to_engine=True) is billed
    assert not is_billed(Outcome.DISCONNECTED, given_to_engine=False)
    assert not is_billed(Outcome.LOST, given_to_engine=True)


def test_values_of_outcomes_are_those_of_the_database() -> None:
    """Values of the column `ending` stay the same: records of earlier versions have them."""
    names = "finished partial rejected failed failed_midstream disconnected cancelled lost"
    assert [outcome.value for outcome in Outcome] == names.split()
