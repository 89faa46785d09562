"""Kept sums of usage: they equal the records after whatever is written, repeated, interrupted or migrated."""

from __future__ import annotations

import datetime as dt
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from serving.tenancy.admin.service import Administration
from serving.tenancy.billing import reports, sums
from serving.tenancy.key_hashing import Pepper
from serving.tenancy.ledger import usage_table
from serving.tenancy.ledger.usage_record import COLUMNS, UsageRecord
from serving.tenancy.schema import usage_days, usage_records
from serving.types import Caller

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DAY_MS = 86_400_000
FIRST_MS = 1_796_083_200_000  # 2026-12-01, 00:00 UTC
PRICES = [("CNY", "0.0158", "0.0127"), ("USD", "1", "2")]
ENDINGS = ["finished", "finished", "partial", "disconnected", "failed", "lost", None]
GROUP = ("tenant_id", "key_id", "region", "currency", "input_price", "output_price")


def row(rng: random.Random, request_id: str, **changes: Any) -> dict[str, Any]:
    """Return a record as a journal has it, of one of two tenants with two keys each, at a time within 60 days."""
    tenant = rng.choice(["acme", "umbrella"])
    currency, input_price, output_price = rng.choice(PRICES)
    fields: dict[str, Any] = {
        "request_id": request_id,
        "tenant_id": tenant,
        "key_id": f"{tenant}-{rng.randrange(2)}",
        "region": "beijing",
        "dialect": "openai",
        "model": "captioner",
        "stream": True,
        "audio_form": "url",
        "replica": rng.choice(["one", "two"]),
        "currency": currency,
        "input_price": input_price,
        "output_price": output_price,
        "opened_at": FIRST_MS + rng.randrange(60 * DAY_MS),
        "reported_at": FIRST_MS,
    }
    return UsageRecord(**fields | changes).row()


def ended(rng: random.Random, opened: dict[str, Any]) -> dict[str, Any]:
    """Return the record with an ending, and with tokens and an amount that is more than all units of 32 bits."""
    ending = rng.choice(ENDINGS)
    billed = ending in {"finished", "partial", "disconnected"}
    changes = {"ending": ending, "billed": billed, "audio_ms": rng.randrange(10**6), "closed_at": FIRST_MS}
    changes |= {name: rng.randrange(1000) for name in ("input_tokens", "output_tokens", "free_tokens")}
    return opened | changes | {"amount_nanos": rng.randrange(2**62)}


def of_rows(database: sa.Engine) -> dict[tuple[Any, ...], Counter[str]]:
    """Return the sums of all records by the group of a sum, added up by Python's integers."""
    found: dict[tuple[Any, ...], Counter[str]] = {}
    with database.connect() as connection:
        for each in connection.execute(sa.select(usage_records)):
            group = (each.opened_at // DAY_MS, *(getattr(each, name) for name in GROUP))
            added = found.setdefault(group, Counter())
            added.update({"requests": 1, "open_requests": int(each.ending is None), "audio_ms": each.audio_ms})
            if each.billed:
                names = ("input_tokens", "output_tokens", "free_tokens", "amount_nanos")
                added.update({"billed_requests": 1} | {name: getattr(each, name) for name in names})
    return found


def kept(database: sa.Engine) -> dict[tuple[Any, ...], Counter[str]]:
    """Return the sums that the database keeps, without those of no record."""
    found: dict[tuple[Any, ...], Counter[str]] = {}
    with database.connect() as connection:
        for each in connection.execute(sa.select(usage_days)).mappings():
            values = {name: value for name, value in each.items() if name not in {"day", *GROUP}}
            values["amount_nanos"] += 10**9 * values.pop("amount_units")
            if any(values.values()):
                found[each["day"], *(each[name] for name in GROUP)] = Counter(values)
    return found


def assert_equal(database: sa.Engine) -> None:
    """Check the sums by Python and by the command."""
    assert kept(database) == of_rows(database)
    assert sums.check(database)["different"] == 0


@pytest.mark.parametrize("seed", range(3))
def test_sums_equal_rows_after_random_writes(database: sa.Engine, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records are opened, ended, written again, closed as lost, replaced, corrected and deleted; some writes fail."""
    rng = random.Random(seed)
    journal: list[dict[str, Any]] = []
    monkeypatch.setattr(usage_table, "now_ms", lambda: FIRST_MS)

    def by_sql(statement: Any) -> None:
        with database.begin() as connection:
            connection.execute(statement)

    def fail() -> None:
        """Write in a transaction that is rolled back."""
        with database.connect() as connection:
            transaction = connection.begin()
            usage_table._write_records(connection, [row(rng, "never")])
            transaction.rollback()

    def some() -> list[dict[str, Any]]:
        return rng.sample(journal, min(len(journal), rng.randrange(1, 30)))

    some_record = usage_records.c.request_id.like(f"%{rng.randrange(10)}")
    steps: list[Callable[[], Any]] = [
        lambda: journal.extend(row(rng, f"r{len(journal) + n}") for n in range(10)),
        lambda: journal.extend(ended(rng, each) for each in some()),
        lambda: usage_table.write(database, some()),  # in any order, and again
        lambda: usage_table.write(database, some() * 2),
        lambda: usage_table.close_lost(database, "one"),
        lambda: usage_table.close_unreported(database, after_s=-1),
        lambda: by_sql(usage_records.delete().where(some_record)),
        lambda: by_sql(usage_records.update().where(some_record).values(billed=sa.not_(usage_records.c.billed))),
        lambda: by_sql(usage_records.update().where(some_record).values(tenant_id="moved", opened_at=FIRST_MS)),
        fail,
    ]
    steps[0]()
    for _ in range(60):
        rng.choice(steps)()
    usage_table.write(database, journal)
    assert_equal(database)
    assert len(kept(database)) > 20
    by_sql(usage_records.delete())
    assert kept(database) == {}


def test_a_record_that_is_written_again_counts_once(database: sa.Engine) -> None:
    """Budgets, reports and invoices have a record once, however often its open and closed rows are written."""
    opened = row(random.Random(1), "r", tenant_id="acme", key_id="k", opened_at=FIRST_MS, currency="CNY")
    closed = opened | {"ending": "finished", "billed": True, "input_tokens": 21, "output_tokens": 24, "amount_nanos": 9}
    for entries in ([opened], [opened], [closed], [closed], [opened], [opened, closed]):
        usage_table.write(database, entries)
    spent = usage_table.spent(database, Caller("acme", "k"), FIRST_MS, "CNY")
    assert (spent.tenant.tokens_per_month, spent.key.nanos_per_day) == (45, 9)
    [usage] = reports.usage(database, since=dt.date(2026, 12, 1), until=dt.date(2026, 12, 1))
    assert (usage["requests"], usage["amount"]) == (1, "0.000000009")
    assert_equal(database)


def test_sums_are_exact_beyond_64_bits(database: sa.Engine) -> None:
    """The amount of a day may exceed what 64 bits have in nano-units; no record is refused, and the sum is exact."""
    amount = {"ending": "finished", "billed": True, "amount_nanos": 2**63 - 1, "opened_at": FIRST_MS, "currency": "CNY"}
    records = [row(random.Random(1), f"r{number}", **amount) for number in range(50)]
    usage_table.write(database, records)
    [usage] = reports.usage(database, since=dt.date(2026, 12, 1), until=dt.date(2026, 12, 1))
    assert usage["amount"] == "461168601842.73879035"
    tenant = records[0]["tenant_id"]
    spent = usage_table.spent(database, Caller(tenant, "k"), FIRST_MS, "CNY")
    assert spent.tenant.nanos_per_month == 50 * (2**63 - 1)
    assert_equal(database)


def test_writers_of_the_same_sums_do_not_lock_each_other_out(database: sa.Engine) -> None:
    """Six processes that write records of the same tenants, in different orders, all succeed; the sums are exact."""
    failures: list[BaseException] = []

    def write(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for turn in range(10):
                opened = [row(rng, f"{seed}-{turn}-{number}", opened_at=FIRST_MS) for number in range(20)]
                usage_table.write(database, opened)
                usage_table.write(database, [ended(rng, each) for each in opened[::-1]])
        except BaseException as error:  # noqa: BLE001 - raised by the assertion below
            failures.append(error)

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert_equal(database)
    with database.connect() as connection:
        assert connection.scalar(sa.select(sa.func.sum(usage_days.c.requests))) == 1200


_WRITER = """
import random, sys
from serving.tenancy import database as databases
from serving.tenancy.ledger import usage_table
from tests.tenancy.test_usage_sums import ended, row

database, rng, number = databases.connect(sys.argv[1]), random.Random(1), 0
while True:
    opened = [row(rng, f"{number}-{each}") for each in range(200)]
    usage_table.write(database, opened)
    usage_table.write(database, [ended(rng, each) for each in opened])
    number += 1
    print(number, flush=True)
"""


@pytest.fixture
def writer(database: sa.Engine) -> Iterator[subprocess.Popen[str]]:
    """A process that writes records without a pause."""
    command = [sys.executable, "-c", _WRITER, database.url.render_as_string(hide_password=False)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_sigkill_leaves_equal_sums(database: sa.Engine, writer: subprocess.Popen[str]) -> None:
    """A process that is killed while it writes leaves either both, records and their sums, or neither."""
    assert writer.stdout is not None
    for _ in range(2):
        assert writer.stdout.readline()
    time.sleep(random.Random().random() * 0.1)
    writer.kill()
    writer.wait()
    assert sums.check(database)["sums"] > 100
    assert_equal(database)


def test_sums_that_were_changed_are_found_and_computed_again(database: sa.Engine, tmp_path: Any) -> None:
    """A sum that is changed, or missing, is found; `rebuild` corrects it and is in the audit log."""
    rng = random.Random(5)
    usage_table.write(database, [ended(rng, row(rng, f"r{number}")) for number in range(100)])
    admin = Administration(database, Pepper(b"pepper" * 8), "test")
    before, whole = kept(database), admin.check_sums()
    assert whole == {"sums": len(before), "different": 0}
    with database.begin() as connection:
        one, other = connection.execute(sa.select(*usage_days.primary_key).limit(2)).mappings()
        connection.execute(usage_days.update().filter_by(**one).values(amount_nanos=usage_days.c.amount_nanos + 1))
        connection.execute(usage_days.delete().filter_by(**other))
    assert admin.check_sums() == {"sums": len(before) - 1, "different": 2}
    assert admin.rebuild_sums() == {"sums": len(before), "corrected": 2}
    assert (kept(database), admin.check_sums()) == (before, whole)
    [entry] = admin.audit(subject="usage")
    assert (entry["action"], entry["after"]) == ("sums.rebuild", {"sums": len(before), "corrected": 2})
    assert set(COLUMNS) <= set(usage_records.c.keys())
