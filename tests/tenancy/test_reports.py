"""Usage reports and invoices over a ledger of a few records, with sums worked out by hand."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from serving.tenancy import schema
from serving.tenancy.billing import reports
from serving.tenancy.ledger.usage_record import UsageRecord

if TYPE_CHECKING:
    from collections.abc import Iterator

DECEMBER_MS = 1_796_083_200_000  # 2026-12-01, 00:00 UTC
DAY_MS = 86_400_000
NEW_YEAR_MS = DECEMBER_MS + 31 * DAY_MS


def record(number: int, opened_at: int, tenant: str = "acme", key: str = "k1", **changes: Any) -> dict[str, Any]:
    """Return a row of the ledger: 21 + 24 tokens, not free, at the manual's price for Beijing."""
    fields: dict[str, Any] = {
        "request_id": f"r{number}",
        "tenant_id": tenant,
        "key_id": key,
        "region": "beijing",
        "dialect": "openai",
        "model": "m",
        "stream": False,
        "audio_form": "url",
        "replica": "p",
        "currency": "CNY",
        "input_price": "0.0158",
        "output_price": "0.0127",
        "opened_at": opened_at,
        "audio_ms": 1000,
        "input_tokens": 21,
        "output_tokens": 24,
        "ending": "finished",
        "billed": True,
        "amount_nanos": 636_600,
    }
    return UsageRecord(**fields | changes).row()


ROWS = [
    record(1, DECEMBER_MS - 1),
    record(2, DECEMBER_MS),
    record(3, DECEMBER_MS + DAY_MS - 1, key="k2", audio_ms=1500),
    record(4, DECEMBER_MS + DAY_MS, free_tokens=45, amount_nanos=0),
    record(5, DECEMBER_MS + DAY_MS, billed=False, ending="failed", amount_nanos=0),
    record(6, DECEMBER_MS + DAY_MS, billed=False, ending=None, amount_nanos=0, audio_ms=0),
    record(7, DECEMBER_MS + DAY_MS, tenant="umbrella", currency="USD", input_price="1", output_price="2"),
    record(8, NEW_YEAR_MS - 1, input_price="0.02", output_price="0.03", amount_nanos=1_140_000),
    record(9, NEW_YEAR_MS),
]
FIRST, SECOND, LAST = dt.date(2026, 12, 1), dt.date(2026, 12, 2), dt.date(2026, 12, 31)


@pytest.fixture(scope="module")
def database() -> Iterator[sa.Engine]:
    """A database in memory with these records."""
    engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
    schema.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(schema.usage_records.insert(), ROWS)
    yield engine
    engine.dispose()


def row(requests: int, billed: int, tokens: int, amount: str, **others: Any) -> dict[str, Any]:
    """Return a row of a report of `tokens` times 21 input and 24 output tokens."""
    sums: dict[str, Any] = {"requests": requests, "billed_requests": billed, "open_requests": 0}
    sums["audio_s"] = float(requests)
    sums |= {"input_tokens": 21 * tokens, "output_tokens": 24 * tokens, "free_tokens": 0, "amount": amount}
    return {"currency": "CNY", **sums, **others}


def test_a_report_has_both_days_and_no_more(database: sa.Engine) -> None:
    """The days from the first to the last, both included, by day and tenant; open and failed requests cost nothing."""
    assert reports.usage(database, since=FIRST, until=SECOND) == [
        row(2, 2, 2, "0.0012732", day="2026-12-01", tenant="acme", audio_s=2.5),
        row(3, 1, 1, "0.00", day="2026-12-02", tenant="acme", open_requests=1, audio_s=2.0, free_tokens=45),
        row(1, 1, 1, "0.0006366", day="2026-12-02", tenant="umbrella", currency="USD"),
    ]


def test_a_report_of_one_tenant_or_key(database: sa.Engine) -> None:
    """Only that tenant's or key's records count; currencies stay apart where nothing else is asked for."""
    period = {"since": FIRST, "until": LAST}
    assert reports.usage(database, **period, by=("key",), tenant="acme") == [  # type: ignore[arg-type]
        row(5, 3, 3, "0.0017766", key="k1", open_requests=1, audio_s=4.0, free_tokens=45),
        row(1, 1, 1, "0.0006366", key="k2", audio_s=1.5),
    ]
    assert reports.usage(database, **period, by=("tenant",), key="k2") == [  # type: ignore[arg-type]
        row(1, 1, 1, "0.0006366", tenant="acme", audio_s=1.5)
    ]
    assert reports.usage(database, **period, by=()) == [  # type: ignore[arg-type]
        row(6, 4, 4, "0.0024132", open_requests=1, audio_s=5.5, free_tokens=45),
        row(1, 1, 1, "0.0006366", currency="USD"),
    ]
    assert reports.usage(database, **period, by=("day",), tenant="nobody") == []  # type: ignore[arg-type]


def test_an_invoice_has_a_line_for_each_key_and_price(database: sa.Engine) -> None:
    """List amounts are of all tokens, amounts of those that are not free; the totals are the sums of the lines."""
    line = {"region": "beijing", "currency": "CNY", "input_price": "0.0158", "output_price": "0.0127"}
    sums = {"requests": 1, "billed_requests": 1, "audio_s": 1.0, "input_tokens": 21, "output_tokens": 24}
    assert reports.invoice(database, "acme", month="2026-12") == {
        "tenant": "acme",
        "month": "2026-12",
        "lines": [
            {
                "key_id": "k1",
                **line,
                **sums,
                "requests": 4,
                "billed_requests": 2,
                "audio_s": 3.0,
                "input_tokens": 42,
                "output_tokens": 48,
                "free_tokens": 45,
                "amount": "0.0006366",
                "list_amount": "0.0012732",
            },
            {
                "key_id": "k1",
                **line,
                "input_price": "0.02",
                "output_price": "0.03",
                **sums,
                "free_tokens": 0,
                "amount": "0.00114",
                "list_amount": "0.00114",
            },
            {
                "key_id": "k2",
                **line,
                **sums,
                "audio_s": 1.5,
                "free_tokens": 0,
                "amount": "0.0006366",
                "list_amount": "0.0006366",
            },
        ],
        "totals": [
            {
                "currency": "CNY",
                "billed_requests": 4,
                "input_tokens": 84,
                "output_tokens": 96,
                "free_tokens": 45,
                "list_amount": "0.0030498",
                "amount": "0.0024132",
            }
        ],
        "open_requests": 1,
    }


def test_invoices_of_other_months_and_tenants(database: sa.Engine) -> None:
    """A month has the records from its first millisecond to its last, and a tenant its own; months are checked."""
    assert [
        (len(found["lines"]), [total["amount"] for total in found["totals"]], found["open_requests"])
        for found in (
            reports.invoice(database, tenant, month=month)
            for tenant, month in (
                ("acme", "2026-11"),
                ("acme", "2027-01"),
                ("acme", "2027-02"),
                ("umbrella", "2026-12"),
            )
        )
    ] == [
        (1, ["0.0006366"], 0),
        (1, ["0.0006366"], 0),
        (0, [], 0),
        (1, ["0.0006366"], 0),
    ]
    assert reports.invoice(database, "umbrella", month="2026-12")["totals"][0]["list_amount"] == "0.069"
    for wrong in ("2026-13", "2026", "december", "2026-12-01"):
        with pytest.raises(ValueError, match=r"isoformat|month"):
            reports.invoice(database, "acme", month=wrong)


def test_totals_are_sorted_by_currency() -> None:
    """Each currency has its own total; a line without a billed request is left out, its open requests are counted."""
    engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
    schema.metadata.create_all(engine)
    rows = [
        record(1, DECEMBER_MS, currency="USD", amount_nanos=5),
        record(2, DECEMBER_MS, key="k0", currency="CNY", amount_nanos=7),
        record(3, DECEMBER_MS, key="k3", billed=False, ending=None, amount_nanos=9),
        record(4, DECEMBER_MS, key="k4", billed=False, ending=None, amount_nanos=9),
    ]
    with engine.begin() as connection:
        connection.execute(schema.usage_records.insert(), rows)
    invoice = reports.invoice(engine, "acme", month="2026-12")
    engine.dispose()
    assert [(total["currency"], total["amount"]) for total in invoice["totals"]] == [
        ("CNY", "0.000000007"),
        ("USD", "0.000000005"),
    ]
    assert [line["key_id"] for line in invoice["lines"]] == ["k0", "k1"]
    assert invoice["open_requests"] == 2


def test_decimals_of_postgresql_become_integers() -> None:
    """PostgreSQL's sums of big integers are decimals; a report has integers, and text as it is."""
    formatted = reports._formatted({"key": "k1", "requests": Decimal(3), "audio_ms": Decimal(1500)})
    assert repr(formatted) == "{'key': 'k1', 'requests': 3, 'audio_s': 1.5}"
