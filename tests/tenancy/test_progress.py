"""Progress of open records: it stays in the journal, survives its process there, and costs the database nothing."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from serving.tenancy.ledger import database_writer, usage_table
from serving.tenancy.ledger import ledger as ledgers
from serving.tenancy.ledger.usage_record import now_ms
from serving.types import Outcome
from tests.tenancy.test_ledger import kill, ledger_in, rows, until, usage

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("hurried")


def writes(database: sa.Engine) -> list[str]:
    """Return a list that gets each statement which writes, from now on."""
    written: list[str] = []

    @sa.event.listens_for(database, "before_cursor_execute")
    def executed(*call: Any) -> None:
        if call[2].split()[0] in {"INSERT", "UPDATE", "DELETE"}:
            written.append(call[2])

    return written


async def test_progress_makes_no_statement(database: sa.Engine, tmp_path: Path) -> None:
    """While 100 requests report progress, nothing is written but one row, each 15 s, for their whole process."""
    ledger = ledger_in(tmp_path, database)
    await ledger.start()
    records = [usage(f"r{number}", ledger.replica) for number in range(100)]
    for record in records:
        ledger.open(record)
    await until(lambda: not ledger.pending)
    written = writes(database)

    def caught_up(reported: int) -> bool:
        return ledger._journal.appended > reported and not ledger.pending

    for tokens in range(1, 6):
        reported = ledger._journal.appended
        for record in records:
            record.output_tokens = tokens
        await until(partial(caught_up, reported))
    assert len(written) <= 1
    assert all("ledger_replicas" in statement for statement in written)
    await ledger.stop()
    assert {row.output_tokens for row in rows(database).values()} == {5}


async def test_the_last_report_survives_its_segment(database: sa.Engine, tmp_path: Path) -> None:
    """A request that waits reports once; its report is still there after a kill, many segments later."""
    dead = ledger_in(tmp_path, database, max_journal_bytes=2**26)
    await dead.start()
    waiting = usage("waiting", dead.replica)
    dead.open(waiting)
    waiting.input_tokens, waiting.audio_ms = 83, 6000
    while dead._journal.segment <= 3:
        _fill(dead)  # here: a ledger belongs to its event loop
        await asyncio.sleep(0)
    await until(lambda: not dead.pending)
    segments = {path.name for path in dead._journal.directory.glob("*.log")}
    assert "00000001.log" not in segments
    assert rows(database)["waiting"].input_tokens == 0
    kill(dead)
    living = ledger_in(tmp_path, database)
    await living.start()
    found = rows(database)["waiting"]
    assert (found.ending, found.input_tokens, found.audio_ms, found.billed) == ("lost", 83, 6000, False)
    await living.stop()


def _fill(ledger: ledgers.Ledger) -> None:
    """Open and close 200 records."""
    records = [usage(f"{ledger._journal.appended}-{number}", ledger.replica) for number in range(200)]
    for record in records:
        ledger.open(record)
        ledger.close(record, Outcome.FINISHED)


async def test_a_process_with_a_wrong_clock_is_not_taken_for_lost(
    database: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process lives by the database's clock: one whose clock is a day behind keeps its records open."""
    monkeypatch.setattr(database_writer, "_REPORT_LIVING_S", 0.1)
    monkeypatch.setattr(ledgers, "_ALIVE_TICKS", 1)
    ledger = ledger_in(tmp_path, database)
    await ledger.start()
    ledger.open(usage("behind", ledger.replica, reported_at=now_ms() - 86_400_000))
    written = ledger._writer
    await until(lambda: written._reported_living_s and "behind" in rows(database))
    assert usage_table.close_unreported(database, after_s=120) == 0
    await ledger.stop()
    usage_table.write(database, [usage("dead", "elsewhere", reported_at=now_ms() - 86_400_000).row()])
    assert usage_table.close_unreported(database, after_s=120) == 1
    assert {name: row.ending for name, row in rows(database).items()} == {"behind": "cancelled", "dead": "lost"}
    usage_table.forget_dead(database, after_s=-1)
    with database.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM ledger_replicas").scalar() == 0


async def test_an_outage_lasts_until_the_database_is_back(
    database: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While only progress is journaled, an outage is neither ended nor begun again by passes that write no record."""
    monkeypatch.setattr(ledgers, "_ALIVE_TICKS", 1)
    monkeypatch.setattr(database_writer, "_REPORT_LIVING_S", 0.0)
    ledger = ledger_in(tmp_path, database)
    await ledger.start()
    ledger.open(usage("r", ledger.replica))
    await until(lambda: "r" in rows(database))
    real = usage_table.report_living

    def fail(*_: Any) -> None:
        raise sa.exc.OperationalError("", None, Exception("away"))

    monkeypatch.setattr(usage_table, "report_living", fail)
    await until(lambda: ledger.write_failures > 3)
    assert not ledger.database_up
    monkeypatch.setattr(database_writer, "_REPORT_LIVING_S", 3600.0)
    failures = ledger.write_failures
    await until(lambda: ledger.write_failures > failures + 2)
    assert not ledger.database_up
    monkeypatch.setattr(usage_table, "report_living", real)
    await until(lambda: ledger.database_up)
    await ledger.stop()
