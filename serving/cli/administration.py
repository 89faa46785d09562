"""`captioner tenants|keys|plans|prices|usage|invoice|audit …`: administration from the command line."""

from __future__ import annotations

import argparse
import csv
import datetime as dt
import getpass
import json
import sys
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from sqlalchemy.exc import OperationalError

from serving.config import Settings
from serving.tenancy.admin.service import Administration, UnknownError
from serving.tenancy.admin.validation import LIMITS, RefusedError
from serving.tenancy.billing import reports
from serving.tenancy.database import UnusableDatabase, migrate, open_database
from serving.tenancy.key_hashing import Pepper
from serving.tenancy.plans import State
from serving.types import Region

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    _Verb = Callable[[Administration, argparse.Namespace], Any]
    _AddVerb = Callable[..., argparse.ArgumentParser]

COMMANDS = ("tenants", "keys", "plans", "prices", "usage", "invoice", "audit")

_TIMES = ("created_at", "activated_at", "expires_at", "revoked_at", "valid_from", "at")
"""Columns in milliseconds since the epoch: tables tell them as dates."""


def main(argv: Sequence[str]) -> int:
    """Run one verb; return the exit status: 2 for what was asked wrongly, 3 if the database cannot be used."""
    given = _parser().parse_args(argv)
    try:
        settings = Settings.load(["--config", given.config] if given.config else [])
        database = open_database(settings)
        migrate(database)
        admin = Administration(database, Pepper.of(settings), f"cli:{given.actor}")
        _print(given.verb(admin, given), given.format)
    except (RefusedError, UnknownError, ValidationError, FileNotFoundError) as error:
        return _fail(str(error.args[0] if isinstance(error, UnknownError) else error), 2)
    except UnusableDatabase as error:
        return _fail(str(error), 3)
    except OperationalError as error:
        return _fail(f"the database does not answer: {type(error.orig).__name__}", 3)
    database.dispose()
    return 0


def _fail(message: str, status: int) -> int:
    print(f"captioner: {message}", file=sys.stderr)  # noqa: T201
    return status


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    common.add_argument("--config", help="TOML file of settings, as of `captioner serve`; CAPTIONER_CONFIG")
    common.add_argument("--format", choices=("table", "csv", "json"), default="table")
    common.add_argument("--actor", default=getpass.getuser(), help="who it is, for the audit log; default: %(default)s")
    parser = argparse.ArgumentParser("captioner", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def verb(group: Any, name: str, does: _Verb, about: str, of: str = "") -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = group.add_parser(name, parents=[common], help=about, description=about)
        made.set_defaults(verb=does)
        if of:
            made.add_argument("id", metavar=of)
        return made

    def group(name: str, about: str) -> Any:
        return commands.add_parser(name, help=about).add_subparsers(required=True, metavar="VERB")

    _tenant_verbs(verb, group("tenants", "who is served"))
    _key_verbs(verb, group("keys", "by which tenants call"))
    _plan_verbs(verb, group("plans", "limits, weight and priority that tenants have in common"))
    _price_verbs(verb, group("prices", "what 1,000 tokens cost"))
    _report_verbs(verb, commands)
    return parser


def _tenant_verbs(verb: _AddVerb, group: Any) -> None:
    verb(group, "list", lambda admin, _: admin.tenants(), "all tenants")
    verb(group, "show", lambda admin, given: admin.tenant(given.id), "one tenant", "TENANT")
    create = verb(group, "create", _create_tenant, "make a tenant", "TENANT")
    create.add_argument("--region", choices=[*Region], default=Region.BEIJING.value)
    create.add_argument("--plan", default="standard")
    change = verb(group, "set", _set_tenant, "change a tenant", "TENANT")
    change.add_argument("--plan")
    change.add_argument("--state", choices=[*State])
    for each in (create, change):
        each.add_argument("--name", help="what it is called")
        each.add_argument("--free-tokens", type=int, help="instead of the plan's")
        each.add_argument("--free-days", type=int, help="instead of the plan's")
        each.add_argument("--free-only", action=argparse.BooleanOptionalAction, help="serve nothing after free tokens")
        each.add_argument("--log-content", action=argparse.BooleanOptionalAction, help="its captions may be logged")
        _limit_flags(each)
    suspended, active = {"state": State.SUSPENDED.value}, {"state": State.ACTIVE.value}
    verb(
        group, "suspend", lambda admin, given: admin.change_tenant(given.id, **suspended), "serve it no more", "TENANT"
    )
    verb(group, "activate", lambda admin, given: admin.change_tenant(given.id, **active), "serve it again", "TENANT")


def _key_verbs(verb: _AddVerb, group: Any) -> None:
    listed = verb(group, "list", lambda admin, given: admin.keys(given.id), "all keys, or a tenant's")
    listed.add_argument("id", metavar="TENANT", nargs="?")
    made = verb(group, "create", _create_key, "make a key for a tenant; it is shown this once", "TENANT")
    made.add_argument("--name", default="", help="what it is for")
    made.add_argument("--expires", type=_day, help="the first day on which it is not valid (2027-01-31, UTC)")
    _limit_flags(made)
    rotated = verb(group, "rotate", _rotate_key, "put a new key in a key's place; it is shown this once", "KEY_ID")
    rotated.add_argument("--overlap-hours", type=float, default=24, help="how long the old one is valid still (24)")
    verb(group, "revoke", lambda admin, given: admin.revoke_key(given.id), "end a key now", "KEY_ID")
    verb(group, "revoke-all", lambda admin, _: admin.revoke_all_keys(), "end all keys now, before a change of pepper")


def _plan_verbs(verb: _AddVerb, group: Any) -> None:
    verb(group, "list", lambda admin, _: admin.plans(), "all plans")
    plan = verb(group, "set", _set_plan, "make a plan, or change one", "NAME")
    plan.add_argument("--weight", help="its tenants' share of what is short")
    plan.add_argument("--priority", type=int, help="a higher one goes first")
    plan.add_argument("--free-tokens", type=int, help="tokens that cost nothing, once")
    plan.add_argument("--free-days", type=int, help="days from a tenant's activation for these")
    _limit_flags(plan)
    plan.add_argument("--key-limit", action="append", default=[], metavar="NAME=VALUE", help="the same, of each key")


def _price_verbs(verb: _AddVerb, group: Any) -> None:
    verb(group, "list", lambda admin, _: admin.prices(), "all prices")
    price = verb(group, "set", _set_price, "charge other prices from a day on")
    price.add_argument("--region", choices=[*Region], required=True)
    price.add_argument("--currency", default="CNY")
    price.add_argument("--input", required=True, help="of 1,000 input tokens")
    price.add_argument("--output", required=True, help="of 1,000 output tokens")
    price.add_argument("--valid-from", type=_day, help="the first day (UTC); default: now")


def _report_verbs(verb: _AddVerb, group: Any) -> None:
    today = dt.datetime.now(dt.UTC).date()
    usage = verb(group, "usage", _usage, "what was used, by day, tenant and key")
    usage.add_argument("--since", type=_day, default=today.replace(day=1), help="first day; default: of this month")
    usage.add_argument("--until", type=_day, default=today, help="last day; default: today")
    usage.add_argument("--by", type=_groups, default=("day", "tenant"), help="some of day,tenant,key (day,tenant)")
    usage.add_argument("--tenant")
    usage.add_argument("--key", metavar="KEY_ID")
    bill = verb(group, "invoice", _invoice, "what a tenant owes for a month", "TENANT")
    bill.add_argument("--month", type=_month, default=today.isoformat()[:7], help="such as 2026-11; default: this one")
    log = verb(group, "audit", _audit, "who changed what, the last change first")
    log.add_argument("--subject", help="only changes of this tenant, key, plan or region")
    log.add_argument("--limit", type=int, default=100)


def _limit_flags(verb: argparse.ArgumentParser) -> None:
    about = f"{', '.join(LIMITS)}; VALUE `none` lifts it, `plan` leaves it to the plan; may be repeated"
    verb.add_argument("--limit", action="append", default=[], metavar="NAME=VALUE", help=about)


def _create_tenant(admin: Administration, given: argparse.Namespace) -> Any:
    return admin.create_tenant(given.id, region=given.region, plan=given.plan, **_own(given))


def _set_tenant(admin: Administration, given: argparse.Namespace) -> Any:
    changes = {name: value for name in ("plan", "state") if (value := getattr(given, name)) is not None} | _own(given)
    if not changes:
        raise RefusedError("nothing to change: see `captioner tenants set --help`")
    return admin.change_tenant(given.id, **changes)


def _own(given: argparse.Namespace) -> dict[str, Any]:
    names = ("name", "free_tokens", "free_days", "free_only", "log_content")
    own = {name: value for name in names if (value := getattr(given, name)) is not None}
    return own | ({"limits": _limits(given.limit)} if given.limit else {})


def _create_key(admin: Administration, given: argparse.Namespace) -> Any:
    expires_at = _ms(given.expires) if given.expires else None
    key, secret = admin.create_key(given.id, name=given.name, expires_at=expires_at, limits=_limits(given.limit))
    return {"key": secret, **key}


def _rotate_key(admin: Administration, given: argparse.Namespace) -> Any:
    key, secret = admin.rotate_key(given.id, overlap_s=given.overlap_hours * 3600)
    return {"key": secret, **key}


def _set_plan(admin: Administration, given: argparse.Namespace) -> Any:
    names = ("weight", "priority", "free_tokens", "free_days")
    changes: dict[str, Any] = {name: value for name in names if (value := getattr(given, name)) is not None}
    for name, written in (("tenant_limits", given.limit), ("key_limits", given.key_limit)):
        changes |= {name: _limits(written)} if written else {}
    return admin.set_plan(given.id, **changes)


def _set_price(admin: Administration, given: argparse.Namespace) -> Any:
    now = dt.datetime.now(dt.UTC)
    valid_from = _ms(given.valid_from) if given.valid_from else int(now.timestamp() * 1000)
    return admin.set_price(
        given.region,
        currency=given.currency,
        input_price=given.input,
        output_price=given.output,
        valid_from=valid_from,
    )


def _usage(admin: Administration, given: argparse.Namespace) -> Any:
    return reports.usage(
        admin.database, since=given.since, until=given.until, by=given.by, tenant=given.tenant, key=given.key
    )


def _audit(admin: Administration, given: argparse.Namespace) -> Any:
    return admin.audit(subject=given.subject, limit=given.limit)


def _invoice(admin: Administration, given: argparse.Namespace) -> Any:
    return reports.invoice(admin.database, given.id, month=given.month)


def _limits(written: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` as a mapping. Raises `RefusedError`."""
    limits: dict[str, Any] = {}
    for each in written:
        name, equals, value = each.partition("=")
        if not equals:
            raise RefusedError(f"--limit {each}: NAME=VALUE is wanted")
        limits[name] = None if value == "none" else value
    return limits


def _day(text: str) -> dt.date:
    return dt.date.fromisoformat(text)


def _month(text: str) -> str:
    dt.date.fromisoformat(f"{text}-01")
    return text


def _groups(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(reports.GROUPS):
        raise ValueError(text)
    return names


def _ms(day: dt.date) -> int:
    return int(dt.datetime.combine(day, dt.time(), dt.UTC).timestamp() * 1000)


def _print(told: Any, form: str) -> None:
    """As JSON whole; as a table or CSV a row each. Of an invoice the lines, and under them the totals."""
    if form == "json":
        print(json.dumps(told, indent=2, ensure_ascii=False))  # noqa: T201
        return
    if isinstance(told, dict) and "lines" in told:
        totals = [{"key_id": "total", **total} for total in told["totals"]]
        told = [*told["lines"], *totals]
    rows = [
        {name: _cell(name, value) for name, value in row.items()}
        for row in ([told] if isinstance(told, dict) else told)
    ]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if form == "csv":
        writer = csv.DictWriter(sys.stdout, columns)
        writer.writeheader()
        writer.writerows(rows)
    elif len(rows) == 1 and isinstance(told, dict):
        wide = max(map(len, columns))
        for name in columns:
            print(f"{name:{wide}}  {rows[0][name]}")  # noqa: T201
    else:
        wide_by = {name: max(len(name), *(len(row.get(name, "")) for row in rows)) for name in columns} if rows else {}
        for row in ([{name: name for name in columns}, *rows]) if rows else []:
            print("  ".join(f"{row.get(name, ''):{wide_by[name]}}" for name in columns).rstrip())  # noqa: T201


def _cell(name: str, value: Any) -> str:
    """One value as a person reads it."""
    match value:
        case None:
            return ""
        case int() if name in _TIMES:
            return dt.datetime.fromtimestamp(value / 1000, dt.UTC).strftime("%Y-%m-%d %H:%M:%S")
        case dict():
            return " ".join(f"{key}={'none' if of is None else of}" for key, of in value.items())
        case bool():
            return "yes" if value else "no"
    return str(value)
