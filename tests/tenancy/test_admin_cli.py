"""`captioner tenants|keys|…` as an administrator types it."""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING, Any

import pytest

from serving.cli.main import main

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Captioner = Callable[..., tuple[int, str, str]]


@pytest.fixture
def captioner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Captioner:
    """Run a command on a database of one's own; the exit status, and what was told."""
    monkeypatch.setenv("CAPTIONER_DATA_DIR", str(tmp_path))

    def run(*words: str) -> tuple[int, str, str]:
        try:
            status = main(words)
        except SystemExit as ended:
            status = int(ended.code or 0)
        return status, *capsys.readouterr()

    return run


def told(captioner: Captioner, *words: str) -> Any:
    """What a command tells as JSON."""
    status, out, err = captioner(*words, "--format=json")
    assert (status, err) == (0, "")
    return json.loads(out)


def test_the_runbooks_first_tenant(captioner: Captioner) -> None:
    """As the runbook has it: a tenant, a key that is shown once, a rotation, a revocation."""
    captioner("tenants", "create", "acme", "--plan=standard")
    status, out, _ = captioner("keys", "create", "acme")
    assert status == 0
    shown = dict(line.split(maxsplit=1) for line in out.splitlines() if len(line.split(maxsplit=1)) == 2)
    assert shown["key"].startswith("sk-")
    status, out, _ = captioner("keys", "rotate", shown["id"], "--overlap-hours=24")
    assert (status, "sk-" in out) == (0, True)
    assert told(captioner, "keys", "revoke", shown["id"])["state"] == "revoked"
    status, out, _ = captioner("keys", "list", "acme")
    assert (status, len(out.splitlines())) == (0, 3)
    assert shown["key"][:8] in out
    assert shown["key"] not in out


def test_limits_are_set_lifted_and_left_to_the_plan(captioner: Captioner) -> None:
    """`NAME=VALUE`, money in units of money."""
    captioner("tenants", "create", "acme", "--limit=requests_per_minute=5", "--limit=money_per_month=99.95")
    limits = told(captioner, "tenants", "set", "acme", "--limit=requests_per_minute=none", "--limit=tokens_per_day=7")
    assert limits["limits"] == {"money_per_month": "99.95", "requests_per_minute": None, "tokens_per_day": 7}
    assert told(captioner, "tenants", "set", "acme", "--limit=requests_per_minute=plan")["limits"] == {
        "money_per_month": "99.95",
        "tokens_per_day": 7,
    }


def test_suspending_and_serving_again(captioner: Captioner) -> None:
    """Words for the two states that one changes in a hurry."""
    captioner("tenants", "create", "acme")
    assert told(captioner, "tenants", "suspend", "acme")["state"] == "suspended"
    assert told(captioner, "tenants", "activate", "acme")["state"] == "active"
    log = told(captioner, "audit", "--subject=acme")
    assert [entry["action"] for entry in log] == ["tenants.set", "tenants.set", "tenants.create"]
    assert all(entry["actor"].startswith("cli:") for entry in log)


@pytest.mark.parametrize(
    ("words", "status", "told_why"),
    [
        (("tenants", "show", "nobody"), 2, "captioner: there is no tenant 'nobody'\n"),
        (("keys", "create", "nobody"), 2, "captioner: there is no tenant 'nobody'\n"),
        (("keys", "revoke", "key-0"), 2, "captioner: there is no key 'key-0'\n"),
        (("tenants", "create", "A B"), 2, "captioner: a tenant's id has lower-case letters"),
        (("tenants", "create", "a", "--limit=speed=1"), 2, "captioner: limits: speed is none of"),
        (("tenants", "create", "a", "--limit=speed"), 2, "captioner: --limit speed: NAME=VALUE is wanted"),
        (("tenants", "paint", "a"), 2, "usage: captioner tenants"),
        (("usage", "--by=week"), 2, "usage: captioner usage"),
        (("invoice", "a", "--month=2026-13"), 2, "usage: captioner invoice"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_asked_wrongly_says_so(
    captioner: Captioner, words: tuple[str, ...], status: int, told_why: str
) -> None:
    """In one line, with exit status 2, and nothing on standard output."""
    ended, out, err = captioner(*words)
    assert (ended, out) == (status, "")
    assert err.startswith(told_why)


def test_a_database_that_is_away_says_so(captioner: Captioner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit status 3, and no traceback; the address with its password is not told."""
    monkeypatch.setenv("CAPTIONER_DATABASE_URL", "postgresql://user:secret@127.0.0.1:1/name")
    status, out, err = captioner("tenants", "list")
    assert (status, out) == (3, "")
    assert err.startswith("captioner: the database does not answer")
    assert "secret" not in err


def test_usage_as_csv(captioner: Captioner) -> None:
    """A header and rows that a spreadsheet reads; an empty ledger is an empty table."""
    assert captioner("usage", "--format=csv")[:2] == (0, "\r\n")
    captioner("tenants", "create", "acme", "--name=Müller, Söhne")
    (row,) = csv.DictReader(io.StringIO(captioner("tenants", "list", "--format=csv")[1]))
    assert (row["id"], row["name"]) == ("acme", "Müller, Söhne")
