"""Calls by which a record survives a power cut, and the times that limits are reckoned by."""

from __future__ import annotations

import datetime as dt
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serving.errors import BurstLimited
from serving.tenancy import database as databases
from serving.tenancy.ledger import journal as journals
from serving.tenancy.ledger.journal import Journal
from serving.tenancy.limits import limiter as limiters
from serving.tenancy.limits.memory import MemoryStore
from serving.types import Limits
from tests.tenancy.limits_support import caller, limiter


def test_a_sync_writes_each_full_segment_and_the_open_one_then_the_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After three segments all of them are synced, then the journal's directory and its parent; then nothing more."""
    monkeypatch.setattr(journals, "SEGMENT_BYTES", 100)
    calls: list[str] = []
    fdatasync, fsync = os.fdatasync, os.fsync

    def name(descriptor: int) -> str:
        return os.path.relpath(Path(f"/proc/self/fd/{descriptor}").readlink(), tmp_path)

    def data_synced(descriptor: int) -> None:
        calls.append(f"data {name(descriptor)}")
        fdatasync(descriptor)

    def synced(descriptor: int) -> None:
        calls.append(f"all {name(descriptor)}")
        fsync(descriptor)

    monkeypatch.setattr(os, "fdatasync", data_synced)
    monkeypatch.setattr(os, "fsync", synced)
    journal = Journal(tmp_path, "one").open()
    for number in range(3):
        journal.append([number, "x" * 60])
    journal.sync()
    assert calls == [
        "data one/00000001.log",
        "data one/00000002.log",
        "data one/00000003.log",
        "all one",
        "all .",
    ]
    calls.clear()
    journal.sync()
    assert calls == []
    journal.append([1])
    journal.sync()
    assert calls == ["data one/00000003.log"]
    journal.close()


def test_sqlite_waits_for_the_disk(tmp_path: Path) -> None:
    """Each connection has `synchronous = FULL` (2), a write-ahead log and foreign keys."""
    database = databases.connect(f"sqlite:///{tmp_path / 'a.db'}")
    for _ in range(2):
        with database.connect() as connection:
            found = [
                connection.exec_driver_sql(f"PRAGMA {name}").scalar()
                for name in ("synchronous", "journal_mode", "foreign_keys")
            ]
        assert found == [2, "wal", 1]
        database.dispose()


@pytest.mark.parametrize(
    ("now", "day_s", "month_s"),
    [
        ("2026-11-03T00:00:00", 86_400, 28 * 86_400),
        ("2026-11-03T23:59:59", 1, 27 * 86_400 + 1),
        ("2026-12-31T12:00:00", 43_200, 43_200),
        ("2026-01-31T23:00:00", 3600, 3600),
        ("2026-02-01T00:00:00", 86_400, 28 * 86_400),
        ("2028-02-01T00:00:00.5", 86_400, 29 * 86_400),
        ("2026-10-01T00:00:00", 86_400, 31 * 86_400),
    ],
)
def test_budgets_begin_again_with_the_day_and_the_month(
    now: str, day_s: int, month_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seconds to the next midnight, and to the first of the next month, in UTC, rounded up."""

    class Clock(dt.datetime):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> Clock:
            return cls.fromisoformat(now).replace(tzinfo=tz)

    given: Any = SimpleNamespace(datetime=Clock, timedelta=dt.timedelta, UTC=dt.UTC)
    monkeypatch.setattr(limiters, "dt", given)
    assert (limiters.until_next(month=False), limiters.until_next(month=True)) == (day_s, month_s)


async def test_a_burst_does_not_end_with_the_second_on_the_clock() -> None:
    """Requests at 1000.9 s and at 1001.1 s are one burst of 20; those of 1001 count until 1003."""
    now_s = 1000.9
    async with limiter(MemoryStore(lambda: now_s)) as limits:
        who = caller(Limits(requests_per_minute=120))
        for now_s in (1000.9, 1001.1, 1002.1, 1003.1):
            for _ in range(10):
                await limits.admit(who)
            if now_s > 1001:
                with pytest.raises(BurstLimited):
                    await limits.admit(who)


async def test_a_limit_that_is_unused_resets_at_once() -> None:
    """The header of a limit of which nothing is used says `0s`, else the time until the limit counts nothing."""
    async with limiter(MemoryStore(lambda: 1000.0)) as limits:
        who = caller(Limits(requests_per_minute=120, tokens_per_minute=100, audio_seconds_per_minute=60))
        reservation = await limits.admit(who)
        resets = {name: value for name, value in reservation.headers.items() if "reset" in name}
        assert resets == {
            "x-ratelimit-reset-requests": "61s",
            "x-ratelimit-reset-tokens": "0s",
            "x-ratelimit-reset-audio-seconds": "0s",
        }
