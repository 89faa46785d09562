"""The ledger: one record for each admitted request, whatever happens to its process and to the database."""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import time
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from serving.errors import Disconnected, EngineFailed, Overloaded, UploadNotFound
from serving.observability.request_record import RequestRecord
from serving.tenancy.ledger import ledger as ledgers
from serving.tenancy.ledger import store as ledger_store
from serving.tenancy.ledger.ledger import Ledger
from serving.tenancy.ledger.usage_record import Ending, UsageRecord, ending_of, is_billed, now_ms
from serving.tenancy.limits.limiter import Spent, Sums
from serving.tenancy.schema import metadata, usage_records
from serving.types import Caller

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def usage(request_id: str, replica: str = "here", **changes: Any) -> UsageRecord:
    """A record that was just opened."""
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
    """Every record that the database has."""
    with database.connect() as connection:
        return {row.request_id: row for row in connection.execute(sa.select(usage_records))}


async def until(true: Callable[[], Any], timeout_s: float = 60) -> None:
    """Wait for it."""
    async with asyncio.timeout(timeout_s):
        while not await asyncio.to_thread(true):  # noqa: ASYNC110 - no event tells it
            await asyncio.sleep(0.02)


def ledger_in(tmp_path: Path, database: sa.Engine, *, max_journal_bytes: int = 2**20) -> Ledger:
    """A process's ledger with its journal in that directory."""
    return Ledger(database, tmp_path, max_journal_bytes=max_journal_bytes)


def kill(ledger: Ledger) -> None:
    """End it as SIGKILL would, but for its threads, which do no more: the lock is free, the journal is as it is."""
    ledger._stopping.set()
    ledger._write = lambda: None  # type: ignore[method-assign]
    for thread in ledger._threads:
        thread.join()
    assert ledger._reporting is not None
    ledger._reporting.cancel()
    for descriptor in (ledger._journal._file, ledger._journal._lock):
        os.close(descriptor)


async def test_each_record_reaches_the_database_once(database: sa.Engine, tmp_path: Path) -> None:
    """What is opened is in the database soon, what it reports too, and its end; nothing stays behind on the disk."""
    ledger = ledger_in(tmp_path, database)
    await ledger.start()
    records = [usage(f"r{number}", ledger.replica) for number in range(50)]
    for record in records:
        ledger.open(record)
    assert ledger.open_records == 50
    await until(lambda: len(rows(database)) == 50)
    assert {row.ending for row in rows(database).values()} == {None}
    records[7].output_tokens = 11
    await until(lambda: rows(database)["r7"].output_tokens == 11)
    for record in records:
        record.output_tokens, record.billed, record.amount_nanos = 20, True, 2**60
        ledger.close(record, Ending.FINISHED)
        ledger.close(record, Ending.FAILED)  # the first word counts
    await until(lambda: {row.ending for row in rows(database).values()} == {"finished"})
    assert ledger.open_records == 0
    assert {(row.output_tokens, row.amount_nanos, row.billed) for row in rows(database).values()} == {(20, 2**60, True)}
    assert ledger.lag_s < 5
    await ledger.stop()
    assert list((tmp_path / "journal").iterdir()) == []
    await ledger.stop()


def test_times_of_a_record_stand_in_their_order() -> None:
    """A first token right after the hand-over to the engine, told a little later, is not dated before or after them."""
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
    """What a killed process had closed is as it closed it; what was open is lost, unbilled, as it was reported."""
    dead = ledger_in(tmp_path, database)
    await dead.start()
    early, late, closed = (usage(name, dead.replica) for name in ("early", "late", "closed"))
    dead.open(early)
    early.output_tokens = 5
    await until(lambda: rows(database).get("early") and rows(database)["early"].output_tokens == 5)
    dead._write = lambda: None  # type: ignore[method-assign]
    await asyncio.sleep(0.6)
    dead.open(late)
    dead.open(closed)
    closed.output_tokens, closed.billed, closed.amount_nanos = 9, True, 7
    dead.close(closed, Ending.FINISHED)
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
    assert living.closed[Ending.LOST] == 2
    assert [path.name for path in (tmp_path / "journal").iterdir()] == [living.replica]
    await living.stop()


async def test_sweep_finds_who_dies_later(database: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies beside a living one is swept by that one, which does not touch its own."""
    monkeypatch.setattr(ledgers, "_SWEEP_EVERY_S", 0.1)
    living, dead = ledger_in(tmp_path, database), ledger_in(tmp_path, database)
    await living.start()
    await dead.start()
    living.open(usage("mine", living.replica))
    dead.open(usage("its", dead.replica))
    kill(dead)
    await until(lambda: rows(database).get("its") and rows(database)["its"].ending == "lost")
    assert rows(database)["mine"].ending is None
    await living.stop()
    assert rows(database)["mine"].ending == "cancelled"  # nobody waited for it


async def test_lost_machine_is_found_by_its_silence(
    database: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Open records of a machine that went with its disk are closed; one that comes back has the last word."""
    monkeypatch.setattr(ledgers, "_SWEEP_EVERY_S", 0.1)
    monkeypatch.setattr(ledgers, "UNREPORTED_S", 2.0)
    monkeypatch.setattr(ledgers, "_ALIVE_TICKS", 1)
    gone = usage("gone", "elsewhere", reported_at=now_ms() - 60_000)
    ledger_store.write(database, [gone.row()])
    ledger = ledger_in(tmp_path, database)
    await ledger.start()
    running = usage("running", ledger.replica)
    ledger.open(running)
    await until(lambda: rows(database)["gone"].ending == "lost")
    await asyncio.sleep(2.5)
    assert rows(database)["running"].ending is None  # it reports
    await ledger.stop()
    gone.ending, gone.billed, gone.amount_nanos = Ending.FINISHED, True, 5
    ledger_store.write(database, [gone.row()])
    assert rows(database)["gone"].ending == "finished"
    gone.ending, gone.amount_nanos = Ending.FAILED, 0
    ledger_store.write(database, [gone.row()])
    assert rows(database)["gone"].amount_nanos == 5  # final


async def test_outage_loses_nothing_and_is_bounded(tmp_path: Path) -> None:
    """Without the database requests go on until the journal is full, are refused then, and all is written later."""
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
    for record in admitted:  # what was admitted can end, even so
        ledger.close(record, Ending.FINISHED)
    await until(lambda: ledger.write_failures > 1)
    assert ledger.lag_s > 0.5
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
    """A process that ends in an outage leaves its journal, and the next start brings it in."""
    path = tmp_path / "tenancy.sqlite"
    database = sa.create_engine(f"sqlite:///{path}")
    path.mkdir()
    ledger = ledger_in(tmp_path, database)
    await ledger.start()
    record = usage("r", ledger.replica)
    ledger.open(record)
    ledger.close(record, Ending.FINISHED)
    await ledger.stop()
    path.rmdir()
    metadata.create_all(database)
    again = ledger_in(tmp_path, database)
    await again.start()
    assert rows(database)["r"].ending == "finished"
    await again.stop()
    database.dispose()


async def test_what_the_database_refuses_holds_nobody_up(
    database: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record that the database will never take is kept aside; the others are written."""
    ledger = ledger_in(tmp_path, database)
    await ledger.start()
    for request_id in ("good", "bad", "better"):
        record = usage(request_id, ledger.replica)
        if request_id == "bad":
            record.model = None  # type: ignore[assignment]
        ledger.open(record)
        ledger.close(record, Ending.FINISHED)
    await until(lambda: rows(database).keys() == {"good", "better"})
    await until(lambda: ledger.journal_bytes == 0)
    assert ledger.refused == 2
    assert '"bad"' in (tmp_path / "refused.log").read_text()
    await ledger.stop()


async def test_spent_is_what_was_billed(database: sa.Engine, tmp_path: Path) -> None:
    """A budget begins with what was billed this day and month, to the tenant and to the key; free tokens never end."""
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
    told: dict[str, dict[str, Any]] = {
        "today": {"opened_at": today},
        "other key": {"opened_at": today, "key_id": "k2"},
        "month": {"opened_at": first, "free_tokens": 15, "amount_nanos": 0},
        "before": {"opened_at": before, "free_tokens": 7},
        "unbilled": {"opened_at": today, "billed": False},
        "stranger": {"opened_at": today, "tenant_id": "other", "key_id": "k9"},
    }
    for request_id, changes in told.items():
        ledger_store.write(database, [usage(request_id, **paid | changes).row()])
    spent = ledger_store.spent(database, Caller("acme", "k1"), today + 1000)
    assert spent == Spent(Sums(30, 45, 200, 200), Sums(15, 30, 100, 100), 22)
    assert await ledger.spent(Caller("nobody", "k0")) == Spent()


@pytest.mark.parametrize(
    ("error", "flags", "ending", "billed"),
    [
        (None, {"generated"}, "finished", True),
        (None, {"partial", "generated"}, "partial", True),
        (UploadNotFound(), set(), "rejected", False),
        (EngineFailed(), set(), "failed", False),
        (EngineFailed(), {"generated"}, "failed_midstream", False),
        (ValueError(), {"generated"}, "failed_midstream", False),
        (Disconnected(), set(), "disconnected", True),
        (asyncio.CancelledError(), {"generated"}, "cancelled", False),
    ],
)
def test_each_ending_has_its_bill(error: BaseException | None, flags: set[str], ending: str, *, billed: bool) -> None:
    """What is delivered is paid, and what a caller that leaves has had done; what we failed to deliver is not."""
    told = ending_of(error, partial="partial" in flags, generated="generated" in flags)
    assert told == ending
    assert is_billed(told, given_to_engine=True) is billed
    assert not is_billed(Ending.DISCONNECTED, given_to_engine=False)
    assert not is_billed(Ending.LOST, given_to_engine=True)
