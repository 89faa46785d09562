"""Keys read by change: a process reads the rows that have changed, and misses none, by any writer and any clock."""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING, Any

import pytest

from serving.config import Settings
from serving.errors import AccessDenied, CaptionerError, InvalidApiKey
from serving.tenancy import schema
from serving.tenancy.admin import service as administration
from serving.tenancy.admin.service import Administration
from serving.tenancy.key_hashing import Pepper
from serving.tenancy.keys import Keyring
from serving.tenancy.ledger.usage_record import now_ms
from serving.types import Region

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import sqlalchemy as sa

PROCESSES, KEYS = 30, 10_000


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings of processes that share one pepper."""
    return Settings(engine="fake", data_dir=tmp_path, region="beijing")


@pytest.fixture
def admin(database: sa.Engine, settings: Settings) -> Administration:
    """The administration of a database with two plans and two tenants."""
    admin = Administration(database, Pepper.of(settings), "test")
    for plan in ("gold", "free"):
        admin.set_plan(plan)
        admin.create_tenant(f"tenant-{plan}", plan=plan)
    return admin


def keyring(settings: Settings, database: sa.Engine) -> Keyring:
    """Return the keys of a process that has just started."""
    started = Keyring(settings, database)
    started.refresh()
    return started


def caller(keys: Keyring, secret: str) -> Any:
    """Return the caller of a key, or the error's type."""
    try:
        return keys.authenticate({"authorization": f"Bearer {secret}"})
    except CaptionerError as error:
        return type(error)


def key_rows(count: int) -> list[dict[str, Any]]:
    """Return rows of keys of `tenant-gold`, which nobody has."""
    same = {"tenant_id": "tenant-gold", "name": "", "prefix": "sk-", "limits": {}, "created_at": 0}
    return [same | {"id": f"key-{number}", "digest": f"{number:064x}"} for number in range(count)]


def test_one_new_key_is_one_row_for_each_process(
    database: sa.Engine, settings: Settings, admin: Administration
) -> None:
    """With 10,000 keys and 30 processes, a new key makes 30 rows be read, a revoked one 30, and no change none."""
    with database.begin() as connection:
        connection.execute(schema.keys.insert(), key_rows(KEYS))
    first = keyring(settings, database)
    # Plans: two of the first migration, two of the test; two tenants; a price for each region.
    assert first.rows_read == KEYS + 4 + 2 + 2
    processes = [Keyring(settings, database) for _ in range(PROCESSES)]
    for each in processes:
        each._snapshot = first._snapshot  # what each reads when it starts

    key, secret = admin.create_key("tenant-gold")
    for each in processes:
        each.refresh()
    assert sum(each.rows_read for each in processes) == 30
    assert {caller(each, secret).key_id for each in processes} == {key["id"]}

    admin.revoke_key(key["id"])
    for each in processes:
        each.refresh()
        each.refresh()
    assert sum(each.rows_read for each in processes) == 60
    assert {caller(each, secret) for each in processes} == {InvalidApiKey}


def test_each_kind_of_change_counts(database: sa.Engine, settings: Settings, admin: Administration) -> None:
    """States, limits, plans, prices, rotations: each reads its own rows alone, and has its effect on every key."""
    secrets = [admin.create_key(tenant)[1] for tenant in ("tenant-gold", "tenant-gold", "tenant-free")]
    process = keyring(settings, database)

    def rows_read() -> int:
        before = process.rows_read
        process.refresh()
        return process.rows_read - before

    admin.change_tenant("tenant-gold", state="suspended")
    assert rows_read() == 1
    assert [caller(process, secret) is AccessDenied for secret in secrets] == [True, True, False]
    admin.change_tenant("tenant-gold", state="active", limits={"requests_per_minute": 7})
    assert rows_read() == 1
    assert [caller(process, secret).tenant_limits.requests_per_minute for secret in secrets] == [7, 7, None]
    admin.set_plan("gold", weight=3.0)
    assert rows_read() == 1
    assert [caller(process, secret).scheduling_class.weight for secret in secrets] == [3.0, 3.0, 1.0]
    admin.change_tenant("tenant-free", plan="gold")
    assert rows_read() == 1
    assert [caller(process, secret).scheduling_class.weight for secret in secrets] == [3.0, 3.0, 3.0]
    for input_price in ("0.5", "0.25"):  # the second one replaces the first
        at_ms = now_ms() + 3_600_000
        admin.set_price("beijing", currency="CNY", input_price=input_price, output_price="1", valid_from=at_ms)
        assert rows_read() == 1
        assert str(process.price(Region.BEIJING, at_ms).input_price) == input_price
    _, rotated = admin.rotate_key(admin.keys("tenant-free")[0]["id"], overlap_s=0)
    assert rows_read() == 2
    assert caller(process, secrets[2]) is InvalidApiKey
    assert caller(process, rotated).tenant_id == "tenant-free"
    assert admin.revoke_all_keys() == {"revoked": 4}
    assert rows_read() == 4
    assert [caller(process, secret) for secret in (*secrets, rotated)] == [InvalidApiKey] * 4


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM keys WHERE id = 'key-1'",
        "UPDATE keys SET id = 'other' WHERE id = 'key-1'",
        "UPDATE keys SET digest = 'none' WHERE id = 'key-1'",
        "UPDATE keys SET revoked_at = 1 WHERE id = 'key-1'",
        "UPDATE keys SET limits = '{\"requests_per_minute\": 1}' WHERE id = 'key-1'",
        "UPDATE tenants SET state = 'arrears' WHERE id = 'tenant-gold'",
        "UPDATE plans SET weight = 9 WHERE name = 'gold'",
        "DELETE FROM prices WHERE region = 'beijing'",
        "DELETE FROM keys WHERE tenant_id = 'tenant-gold'; DELETE FROM tenants WHERE id = 'tenant-gold'",
        "DELETE FROM plans WHERE name = 'unlimited'",
    ],
)
def test_a_change_by_sql_counts(database: sa.Engine, settings: Settings, admin: Administration, statement: str) -> None:
    """Rows that an operator changes or deletes by SQL count as after a restart; no number has to be raised by hand."""
    with database.begin() as connection:
        connection.execute(schema.keys.insert(), key_rows(3))
    process = keyring(settings, database)
    before = process._snapshot
    with database.begin() as connection:
        for part in statement.split("; "):
            connection.exec_driver_sql(part)
    process.refresh()
    fresh = keyring(settings, database)._snapshot
    assert process._snapshot.keys == fresh.keys
    assert process._snapshot.by_id == fresh.by_id
    assert process._snapshot.prices._by_region == fresh.prices._by_region
    if "DELETE FROM plans" not in statement:  # of which nobody is
        assert (before.keys, before.prices._by_region) != (fresh.keys, fresh.prices._by_region)
    assert admin.plans()


@pytest.mark.parametrize("seed", range(3))
def test_random_changes_leave_what_a_restart_would_read(
    database: sa.Engine, settings: Settings, admin: Administration, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After random changes, made by processes whose clocks differ by up to a day, a process knows all of them."""
    rng = random.Random(seed)
    processes = [keyring(settings, database) for _ in range(3)]
    names = ["tenant-gold", "tenant-free"]

    def delete() -> None:
        with database.begin() as connection:
            connection.execute(schema.keys.delete().where(schema.keys.c.id == rng.choice(keys)))

    changes: list[Callable[[], Any]] = [
        lambda: admin.create_key(rng.choice(names), limits={"requests_per_minute": 1 + len(keys)}),
        lambda: admin.revoke_key(rng.choice(keys)),
        delete,
        lambda: admin.change_tenant(rng.choice(names), state=rng.choice(["active", "suspended", "arrears"])),
        lambda: admin.set_plan(rng.choice(["gold", "free"]), weight=1.0 + rng.randrange(9)),
        lambda: admin.change_tenant(rng.choice(names), plan=rng.choice(["gold", "free"])),
        lambda: names.append(admin.create_tenant(f"tenant-{len(names)}", plan="gold")["id"]),
    ]
    for _ in range(60):
        skewed = now_ms() + rng.randint(-86_400_000, 86_400_000)
        monkeypatch.setattr(administration, "now_ms", lambda skewed=skewed: skewed)
        listed = admin.keys()
        keys = [each["id"] for each in listed]
        rng.choice(changes if keys else changes[:1])()
        for each in processes:
            if rng.random() < 0.3:
                each.refresh()
    fresh = keyring(settings, database)._snapshot
    for each in processes:
        each.refresh()
        assert (each._snapshot.keys, each._snapshot.by_id) == (fresh.keys, fresh.by_id)


def test_a_slow_change_is_not_passed_by_a_fast_one(
    database: sa.Engine, settings: Settings, admin: Administration
) -> None:
    """Changes are committed in the order of their numbers: one that begins later waits for one that is still open."""
    process = keyring(settings, database)
    slow, fast = key_rows(2)
    done = threading.Event()

    def add_fast() -> None:
        with database.begin() as connection:
            connection.execute(schema.keys.insert(), fast)
        done.set()

    with database.begin() as connection:
        connection.execute(schema.keys.insert(), slow)
        other = threading.Thread(target=add_fast)
        other.start()
        assert not done.wait(0.5)
        process.refresh()
        assert process._snapshot.by_id == {}
    other.join()
    process.refresh()
    assert set(process._snapshot.by_id) == {"key-0", "key-1"}
    assert admin.keys()


def test_a_restored_or_replaced_database_is_read_again(
    database: sa.Engine, settings: Settings, admin: Administration
) -> None:
    """A smaller number, or an outage, makes a process read all rows: what it knows may not be there any more."""
    with database.begin() as connection:
        connection.execute(schema.keys.insert(), key_rows(2))
    process = keyring(settings, database)
    with database.begin() as connection:
        connection.execute(schema.keys.delete())
        connection.execute(schema.store_state.update().values(revision=1, reread_revision=0))  # as a backup has them
    process.refresh()
    assert process._snapshot.by_id == {}

    with database.begin() as connection:
        connection.execute(schema.keys.insert(), key_rows(2))
    process.refresh()
    revision = process._snapshot.rows.revision
    with database.begin() as connection:
        connection.execute(schema.keys.delete())
        connection.execute(schema.store_state.update().values(revision=revision, reread_revision=0))
    process.failing = True  # the database was away, and a standby without the last changes is in its place
    process.refresh()
    assert process._snapshot.by_id == {}
    assert admin.tenants()
