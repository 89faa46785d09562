"""`captioner tenants|keys|…` as an administrator types it."""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING, Any

import pytest

from serving.cli.main import main
from serving.config import Settings
from serving.tenancy.database import migrate, open_database

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Captioner = Callable[..., tuple[int, str, str]]


@pytest.fixture
def captioner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Captioner:
    """Run a command on a fresh database; it returns the exit status, the output and the errors."""
    monkeypatch.setenv("CAPTIONER_DATA_DIR", str(tmp_path))
    migrate(open_database(Settings()))

    def run(*words: str) -> tuple[int, str, str]:
        try:
            status = main(words)
        except SystemExit as ended:
            status = int(ended.code or 0)
        return status, *capsys.readouterr()

    return run


def answer(captioner: Captioner, *words: str) -> Any:
    """Return the JSON that a command prints."""
    status, out, err = captioner(*words, "--format=json")
    assert (status, err) == (0, "")
    return json.loads(out)


def test_the_runbooks_first_tenant(captioner: Captioner) -> None:
    """The runbook's commands work: a tenant, a key that is shown once, a rotation, a revocation."""
    captioner("tenants", "create", "acme", "--plan=standard")
    status, out, _ = captioner("keys", "create", "acme")
    assert status == 0
    shown = dict(line.split(maxsplit=1) for line in out.splitlines() if len(line.split(maxsplit=1)) == 2)
    assert shown["key"].startswith("sk-")
    status, out, _ = captioner("keys", "rotate", shown["id"], "--overlap-hours=24")
    assert (status, "sk-" in out) == (0, True)
    assert answer(captioner, "keys", "revoke", shown["id"])["state"] == "revoked"
    status, out, _ = captioner("keys", "list", "acme")
    assert (status, len(out.splitlines())) == (0, 3)
    assert shown["key"][:8] in out
    assert shown["key"] not in out


def test_limits_are_set_lifted_and_left_to_the_plan(captioner: Captioner) -> None:
    """`NAME=VALUE` sets a limit, money in units of money; `none` lifts it, `plan` leaves it to the plan."""
    captioner("tenants", "create", "acme", "--limit=requests_per_minute=5", "--limit=money_per_month=99.95")
    limits = answer(captioner, "tenants", "set", "acme", "--limit=requests_per_minute=none", "--limit=tokens_per_day=7")
    assert limits["limits"] == {"money_per_month": "99.95", "requests_per_minute": None, "tokens_per_day": 7}
    assert answer(captioner, "tenants", "set", "acme", "--limit=requests_per_minute=plan")["limits"] == {
        "money_per_month": "99.95",
        "tokens_per_day": 7,
    }


def test_suspending_and_serving_again(captioner: Captioner) -> None:
    """`suspend` and `activate` change the state, with an entry in the audit log each."""
    captioner("tenants", "create", "acme")
    assert answer(captioner, "tenants", "suspend", "acme")["state"] == "suspended"
    assert answer(captioner, "tenants", "activate", "acme")["state"] == "active"
    log = answer(captioner, "audit", "--subject=acme")
    assert [entry["action"] for entry in log] == ["tenants.set", "tenants.set", "tenants.create"]
    assert all(entry["actor"].startswith("cli:") for entry in log)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("tenants", "show", "nobody"), 2, "captioner: there is no tenant 'nobody'\n"),
        (("keys", "create", "nobody"), 2, "captioner: there is no tenant 'nobody'\n"),
        (("keys", "revoke", "key-0"), 2, "captioner: there is no key 'key-0'\n"),
        (("tenants", "create", "A B"), 2, "captioner: a tenant's id has lower-case letters"),
        (("tenants", "create", "a", "--limit=speed=1"), 2, "captioner: limits: speed is none of"),
        (("tenants", "create", "a", "--limit=speed"), 2, "captioner: --limit speed: NAME=VALUE is wanted"),
        (("tenants", "paint", "a"), 2, "captioner: unknown command 'paint'; choose from list,"),
        (("usage", "--by=week"), 2, "captioner: argument --by: must be some of day, tenant, key, not 'week'; see"),
        (("invoice", "a", "--month=2026-13"), 2, "captioner: argument --month: must be a month"),
        (("invoice", "a", "--month=9999-12"), 2, "captioner: argument --month: must be a month"),
        (("usage", "--until=9999-12-31"), 2, "captioner: argument --until: must be a day"),
        (("keys", "create", "a", "--expires=9999-12-31"), 2, "captioner: argument --expires: must be a day from"),
        (("keys", "rotate", "key-0", "--overlap-hours=nan"), 2, "captioner: argument --overlap-hours: must be"),
        (("tenants", "set", "a", "--pln=x"), 2, "captioner: unknown option --pln (did you mean --plan?); see"),
        (("tenants", "create", "a", "--plan=none"), 2, "captioner: there is no plan 'none'"),
        (("tenants", "set", "a"), 2, "captioner: nothing to change: see `captioner tenants set --help`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_request_is_refused(captioner: Captioner, words: tuple[str, ...], status: int, message: str) -> None:
    """The message names the problem, the exit status is 2, and nothing is on standard output."""
    ended, out, err = captioner(*words)
    assert (ended, out) == (status, "")
    (line,) = [line for line in err.splitlines() if not line.startswith("captioner: database ")]
    assert line.startswith(message.rstrip())


def test_an_unreachable_database_exits_with_3(captioner: Captioner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has no traceback, and no address with its password."""
    monkeypatch.setenv("CAPTIONER_DATABASE_URL", "postgresql://user:secret@127.0.0.1:1/name")
    status, out, err = captioner("tenants", "list")
    assert (status, out) == (3, "")
    assert err.splitlines()[0] == "captioner: database 127.0.0.1:1/name"
    assert err.splitlines()[1].startswith("captioner: the database does not answer")
    assert "secret" not in err


def test_usage_as_csv(captioner: Captioner) -> None:
    """CSV has a header and rows that a spreadsheet reads; an empty ledger is an empty table."""
    assert captioner("usage", "--format=csv")[:2] == (0, "\r\n")
    captioner("tenants", "create", "acme", "--name=Müller, Söhne")
    (row,) = csv.DictReader(io.StringIO(captioner("tenants", "list", "--format=csv")[1]))
    assert (row["id"], row["name"]) == ("acme", "Müller, Söhne")


def test_a_wrong_word_is_named(captioner: Captioner) -> None:
    """The message has the flag, the values that it accepts, and the word."""
    status, _, err = captioner("usage", "--since=2026-13-01")
    assert status == 2
    expected = "argument --since: must be a day from 0001-01-01 to 9998-12-31, such as 2026-11-01, not '2026-13-01'"
    assert err == f"captioner: {expected}; see `captioner usage --help`\n"


def test_a_wrong_directory_stays_as_it_is(
    captioner: Captioner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a database that does not exist names its path, exits with 3 and creates nothing."""
    wrong = tmp_path / "wrong"
    monkeypatch.setenv("CAPTIONER_DATA_DIR", str(wrong))
    for words in (("tenants", "list"), ("usage",), ("keys", "create", "acme"), ("tenants", "set", "acme", "--name=a")):
        status, out, err = captioner(*words)
        assert (status, out) == (3, "")
        assert err.startswith(f"captioner: there is no database: {wrong / 'captioner.db'} does not exist; set --config")
        assert not wrong.exists()
    assert captioner("tenants", "create", "acme")[0] == 0


def test_a_table_names_its_database(captioner: Captioner, tmp_path: Path) -> None:
    """The line is on standard error, so that a pipe gets the table alone; JSON and CSV have none."""
    assert captioner("tenants", "list") == (0, "", f"captioner: database {tmp_path / 'captioner.db'}\n")
    assert captioner("tenants", "list", "--format=json") == (0, "[]\n", "")


def test_keys_plans_and_prices(captioner: Captioner) -> None:
    """Flags arrive at the functions: days as moments, hours as seconds, limits of plans and of keys apart."""
    answer(captioner, "tenants", "create", "acme", "--free-only", "--free-tokens=5")
    key = answer(captioner, "keys", "create", "acme", "--name=ci", "--expires=2999-01-01")
    assert (key["name"], key["expires_at"]) == ("ci", 32472144000000)
    answer(captioner, "keys", "rotate", key["id"], "--overlap-hours=0.5")
    (entry,) = answer(captioner, "audit", f"--subject={key['id']}", "--limit=1")
    assert entry["before"]["expires_at"] - entry["at"] == pytest.approx(1_800_000, abs=60_000)
    plan = answer(
        captioner, "plans", "set", "gold", "--weight=2", "--limit=tokens_per_day=9", "--key-limit=tokens_per_day=3"
    )
    assert (plan["weight"], plan["tenant_limits"], plan["key_limits"]) == (
        2.0,
        {"tokens_per_day": 9},
        {"tokens_per_day": 3},
    )
    price = answer(captioner, "prices", "set", "--region=singapore", "--input=0.02", "--output=0.01")
    assert (price["currency"], price["input_price"], price["output_price"]) == ("CNY", "0.02", "0.01")
    assert answer(captioner, "keys", "revoke-all") == {"revoked": 2}
