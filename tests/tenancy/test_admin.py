"""The administration's functions, on both kinds of database."""

from __future__ import annotations

import datetime as dt
import json
import random
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from serving.tenancy import schema
from serving.tenancy.admin.service import Administration, NotFoundError
from serving.tenancy.admin.validation import InvalidChangeError
from serving.tenancy.billing import reports
from serving.tenancy.billing.prices import Price
from serving.tenancy.key_hashing import Pepper
from serving.tenancy.ledger.usage_record import now_ms
from serving.types import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

DAY_MS = 24 * 3600 * 1000


@pytest.fixture
def admin(database: sa.Engine) -> Administration:
    """The functions, with a test as actor."""
    return Administration(database, Pepper(b"a pepper of a test"), "test")


def revision(admin: Administration) -> int:
    """Return the revision, by which replicas see that something has changed."""
    with admin.database.connect() as connection:
        return int(connection.scalar(sa.select(schema.store_state.c.revision)) or 0)


def test_a_tenant_is_made_shown_and_changed(admin: Administration) -> None:
    """Values that are set are shown; the others are defaults, or left to the plan."""
    made = admin.create_tenant("acme", plan="standard", name="Acme, Inc.")
    assert made == admin.tenant("acme") == admin.tenants()[0]
    assert (made["region"], made["state"], made["plan"], made["limits"]) == ("beijing", "active", "standard", {})
    changed = admin.change_tenant("acme", state="arrears", limits={"requests_per_minute": 5, "money_per_day": "1.50"})
    assert changed["limits"] == {"money_per_day": "1.50", "requests_per_minute": 5}
    assert changed["state"] == "arrears"
    lifted = admin.change_tenant("acme", limits={"requests_per_minute": None, "money_per_day": "plan"})
    assert lifted["limits"] == {"requests_per_minute": None}
    with admin.database.connect() as connection:
        kept = connection.scalar(sa.select(schema.tenants.c.limits))
    assert kept == {"requests_per_minute": None}


def test_money_is_kept_exactly(admin: Administration) -> None:
    """A budget is stored in whole nano-units, without the error of a binary fraction."""
    admin.create_tenant("acme", limits={"money_per_month": "0.1"})
    with admin.database.connect() as connection:
        assert connection.scalar(sa.select(schema.tenants.c.limits)) == {"nanos_per_month": 100_000_000}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": "platinum"}, "there is no plan 'platinum'"),
        ({"state": "happy"}, "state: happy is none of active, suspended, arrears"),
        ({"limits": {"requests_per_hour": 1}}, "limits: requests_per_hour is none of requests_per_minute"),
        ({"limits": {"requests_per_minute": -1}}, "requests_per_minute: a whole number from 0 on"),
        ({"limits": {"requests_per_minute": True}}, "requests_per_minute: a whole number from 0 on"),
        ({"limits": {"money_per_day": "NaN"}}, "'NaN' is not a number"),
        ({"limits": {"money_per_day": "0.0000000001"}}, "money_per_day: an amount of money"),
        ({"name": "a\nb"}, "name: at most 128 printable characters"),
        ({"free_only": "yes"}, "free_only: true or false"),
        ({"colour": "red"}, "a tenant has no colour"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_invalid_change_is_refused_and_changes_nothing(
    admin: Administration, change: dict[str, Any], message: str
) -> None:
    """The message names the problem; the tenant, the audit log and the revision stay as they were."""
    before, log, at = admin.create_tenant("acme"), admin.audit(), revision(admin)
    with pytest.raises((InvalidChangeError, NotFoundError)) as refused:
        admin.change_tenant("acme", **change)
    assert str(refused.value.args[0]).startswith(message)
    assert (admin.tenant("acme"), admin.audit(), revision(admin)) == (before, log, at)


def test_a_second_tenant_of_the_same_id_is_refused(admin: Administration) -> None:
    """An existing tenant is not overwritten, and ids are plain words."""
    admin.create_tenant("acme")
    with pytest.raises(InvalidChangeError, match="there is a tenant acme already"):
        admin.create_tenant("acme")
    for bad in ("", "Acme", "a b", "../etc", "x" * 64, "a;drop table tenants"):
        with pytest.raises(InvalidChangeError, match="a tenant's id has"):
            admin.create_tenant(bad)


@pytest.mark.parametrize("word", ["other", "none"])
def test_a_tenant_is_not_named_as_a_label_of_several(admin: Administration, word: str) -> None:
    """The labels that metrics use for all further tenants and for strangers are no tenant's id."""
    with pytest.raises(InvalidChangeError, match="metrics use this word"):
        admin.create_tenant(word)


def test_a_key_is_returned_once_and_stored_as_a_hash(admin: Administration) -> None:
    """The database has the hash and the first characters of a key, but not the key."""
    admin.create_tenant("acme")
    shown, secret = admin.create_key("acme", name="laptop")
    assert secret.startswith("sk-")
    assert len(secret) >= 43
    assert (shown["prefix"], shown["state"], shown["tenant"]) == (secret[:8], "valid", "acme")
    with admin.database.connect() as connection:
        (row,) = connection.execute(sa.select(schema.keys)).mappings()
    assert secret not in json.dumps(dict(row), default=str)
    assert row["digest"] == admin.pepper.digest(secret)
    assert "digest" not in shown
    assert secret not in json.dumps(admin.audit())


def test_rotation_overlaps(admin: Administration) -> None:
    """The old key expires after the overlap, the new key has its name and limits; a key is rotated once."""
    admin.create_tenant("acme")
    old, _ = admin.create_key("acme", name="laptop", limits={"requests_per_minute": 7})
    new, _ = admin.rotate_key(old["id"], overlap_s=3600)
    by_id = {key["id"]: key for key in admin.keys("acme")}
    assert by_id[old["id"]]["replaced_by"] == new["id"]
    assert by_id[old["id"]]["expires_at"] == pytest.approx(now_ms() + 3_600_000, abs=60_000)
    assert (new["name"], new["limits"], new["expires_at"]) == ("laptop", {"requests_per_minute": 7}, None)
    with pytest.raises(InvalidChangeError, match="has been rotated already"):
        admin.rotate_key(old["id"])
    admin.revoke_key(new["id"])
    with pytest.raises(InvalidChangeError, match="not valid any more"):
        admin.rotate_key(new["id"])


def test_revoking_again_changes_nothing(admin: Administration) -> None:
    """The time of the first revocation stays."""
    admin.create_tenant("acme")
    key, _ = admin.create_key("acme")
    first = admin.revoke_key(key["id"])
    assert first["state"] == "revoked"
    assert admin.revoke_key(key["id"]) == first


def test_keys_are_made_under_one_pepper(admin: Administration) -> None:
    """A key under another pepper, which no replica could find, is not made."""
    admin.create_tenant("acme")
    admin.create_key("acme")
    other = Administration(admin.database, Pepper(b"another pepper of a test"), "test")
    with pytest.raises(InvalidChangeError, match="key_pepper is not the one"):
        other.create_key("acme")


def test_another_pepper_needs_all_keys_revoked(admin: Administration) -> None:
    """After all keys are revoked, keys are made under another pepper, and no earlier key is valid."""
    admin.create_tenant("acme")
    old, _ = admin.create_key("acme")
    assert admin.revoke_all_keys() == {"revoked": 1}
    other = Administration(admin.database, Pepper(b"another pepper of a test"), "test")
    new, _ = other.create_key("acme")
    states = {key["id"]: key["state"] for key in other.keys("acme")}
    assert states == {old["id"]: "revoked", new["id"]: "valid"}
    assert admin.audit(subject="all")[0]["after"] == {"revoked": 1}


def test_plans_are_made_and_changed(admin: Administration) -> None:
    """A plan that does not exist is made; the published plan exists from the start."""
    assert {plan["name"] for plan in admin.plans()} == {"standard", "unlimited"}
    standard = next(plan for plan in admin.plans() if plan["name"] == "standard")
    assert standard["tenant_limits"] == {"requests_per_minute": 60, "tokens_per_minute": 100_000}
    assert (standard["free_tokens"], standard["free_days"]) == (1_000_000, 90)
    made = admin.set_plan("gold", weight="3", priority=1, key_limits={"concurrent_requests": 4})
    assert (made["weight"], made["priority"], made["key_limits"]) == (3.0, 1, {"concurrent_requests": 4})
    assert admin.set_plan("gold", weight=2)["key_limits"] == {"concurrent_requests": 4}
    for bad in ({"weight": 0}, {"weight": "Infinity"}, {"priority": 1.5}, {"speed": 1}):
        with pytest.raises(InvalidChangeError):
            admin.set_plan("gold", **bad)


def test_prices_are_for_later_only(admin: Administration) -> None:
    """The shipped prices are the manual's; a new price is exact, and cannot change billed amounts."""
    assert [(price["region"], price["input_price"], price["output_price"]) for price in admin.prices()] == [
        ("beijing", "0.0158", "0.0127"),
        ("singapore", "0.027962", "0.022458"),
    ]
    tomorrow = now_ms() + DAY_MS
    admin.set_price("beijing", currency="CNY", input_price="0.02", output_price="0.01", valid_from=tomorrow)
    assert len(admin.prices()) == 3
    with pytest.raises(InvalidChangeError, match="must not lie in the past"):
        admin.set_price("beijing", currency="CNY", input_price="1", output_price="1", valid_from=now_ms() - DAY_MS)
    with pytest.raises(InvalidChangeError, match="at most six decimals"):
        admin.set_price("beijing", currency="CNY", input_price="0.0000001", output_price="1", valid_from=tomorrow)


def test_every_change_is_in_the_audit_log(admin: Administration) -> None:
    """An entry has actor, time, action, before and after; the last is first, and each change raises the revision."""
    at, began = revision(admin), now_ms()
    admin.create_tenant("acme")
    admin.change_tenant("acme", state="suspended")
    last, first = admin.audit(subject="acme")
    assert (first["action"], first["before"], last["action"]) == ("tenants.create", None, "tenants.set")
    assert (last["before"]["state"], last["after"]["state"], last["actor"]) == ("active", "suspended", "test")
    assert began <= first["at"] <= last["at"]
    assert revision(admin) == at + 2


def records(admin: Administration, count: int) -> list[dict[str, Any]]:
    """Write random records of two tenants, three keys, all endings and two months to the ledger; return them."""
    rng = random.Random(7)
    price = Price.of("CNY", Decimal("0.027962"), Decimal("0.022458"))
    rows = []
    for number in range(count):
        ending = rng.choice([*Outcome, None])
        billed = ending in {Outcome.FINISHED, Outcome.PARTIAL} or (
            ending is Outcome.DISCONNECTED and rng.random() < 0.5
        )
        tokens = rng.randint(21, 30_008), rng.randint(0, 900)
        free = rng.choice([0, 0, sum(tokens) // 3, sum(tokens)]) if billed else 0
        nanos = price.amount_nanos(*tokens)
        rows.append(
            dict.fromkeys(("prepared_at", "first_token_at", "closed_at", "finish_reason"))
            | dict.fromkeys(("engine_input_tokens", "engine_output_tokens"), 0)
            | {
                "request_id": f"request-{number}",
                "tenant_id": rng.choice(["acme", "other"]),
                "key_id": rng.choice(["one", "two", "three"]),
                "opened_at": rng.randint(DAY[0], DAY[1] - 1),
                "reported_at": 0,
                "audio_ms": rng.randint(1, 2_400_000),
                "input_tokens": tokens[0],
                "output_tokens": tokens[1],
                "ending": ending,
                "billed": billed,
                "free_tokens": free,
                "amount_nanos": -(-nanos * (sum(tokens) - free) // sum(tokens)) if billed else 0,
            }
            | {"region": "singapore", "dialect": "openai", "model": "m", "stream": True, "audio_form": "url"}
            | {"replica": "r", "currency": "CNY", "input_price": "0.027962", "output_price": "0.022458"}
        )
    with admin.database.begin() as connection:
        connection.execute(schema.usage_records.insert(), rows)
    return rows


DAY = tuple(int(dt.datetime(2026, month, 1, tzinfo=dt.UTC).timestamp() * 1000) for month in (10, 12))


def total(rows: list[dict[str, Any]], name: str, keep: Callable[[dict[str, Any]], bool]) -> int:
    """Return the sum of a column over the billed records for which `keep` is true."""
    return sum(row[name] for row in rows if row["billed"] and keep(row))


def test_an_invoice_reconciles_with_the_ledger_to_the_token(admin: Administration) -> None:
    """Lines add up to the totals, and the totals equal the sums of the month's records, to the nano-unit."""
    rows = records(admin, 400)
    first = int(dt.datetime(2026, 11, 1, tzinfo=dt.UTC).timestamp() * 1000)
    bill = reports.invoice(admin.database, "acme", month="2026-11")
    (totals,) = bill["totals"]

    def mine(row: dict[str, Any]) -> bool:
        return bool(row["tenant_id"] == "acme" and row["opened_at"] >= first)

    for name in ("input_tokens", "output_tokens", "free_tokens"):
        assert totals[name] == total(rows, name, mine) == sum(line[name] for line in bill["lines"])

    assert Decimal(totals["amount"]) * 10**9 == total(rows, "amount_nanos", mine)
    assert sum(Decimal(line["amount"]) for line in bill["lines"]) == Decimal(totals["amount"])
    listed = total(rows, "input_tokens", mine) * 27_962 + total(rows, "output_tokens", mine) * 22_458
    assert Decimal(totals["list_amount"]) * 10**9 == listed
    assert bill["open_requests"] == sum(mine(row) and row["ending"] is None for row in rows)
    with pytest.raises(ValueError, match="month"):
        reports.invoice(admin.database, "acme", month="2026-13")


@pytest.mark.parametrize("by", [("day",), ("tenant",), ("key",), ("day", "tenant", "key")], ids="-".join)
def test_usage_adds_up_in_every_grouping(admin: Administration, by: tuple[str, ...]) -> None:
    """Usage by day, tenant, key or all of them has the same sums, of the requested days."""
    rows = records(admin, 200)
    since, until = dt.date(2026, 10, 5), dt.date(2026, 11, 20)
    rows_of_usage = reports.usage(admin.database, since=since, until=until, by=by)
    first, after = (
        int(dt.datetime.combine(day, dt.time(), dt.UTC).timestamp() * 1000)
        for day in (since, until + dt.timedelta(days=1))
    )

    def asked(row: dict[str, Any]) -> bool:
        return bool(first <= row["opened_at"] < after)

    assert len(rows_of_usage) == len({tuple(row[name] for name in by) for row in rows_of_usage}) > 1
    assert sum(row["requests"] for row in rows_of_usage) == sum(map(asked, rows))
    assert sum(row["input_tokens"] for row in rows_of_usage) == total(rows, "input_tokens", asked)
    assert sum(row["audio_s"] for row in rows_of_usage) == pytest.approx(
        sum(row["audio_ms"] for row in rows if asked(row)) / 1000
    )
    if "day" in by:
        assert {row["day"] for row in rows_of_usage} <= {str(since + dt.timedelta(days=n)) for n in range(60)}
