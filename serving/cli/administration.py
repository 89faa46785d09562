"""`captioner tenants|keys|plans|prices|batches|usage|invoice|sums|audit …` and `captioner admin`: administration."""

from __future__ import annotations

import argparse
import asyncio
import csv
import datetime as dt
import getpass
import importlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import OperationalError

from serving.cli.parser import Parser
from serving.cli.preflight import warn_of_unknown_variables
from serving.cli.settings_errors import SETTINGS_ERRORS, report
from serving.cli.settings_help import printed_help
from serving.cli.terminal import fail, note
from serving.config import Settings
from serving.observability import logging as logs
from serving.tenancy.admin import kinds
from serving.tenancy.admin.service import Administration, NotFoundError
from serving.tenancy.admin.validation import InvalidChangeError
from serving.tenancy.admin.verbs import GROUPS, VERBS
from serving.tenancy.database import UnusableDatabase, address, failure, migrate, open_database
from serving.tenancy.database_wait import until_migrated
from serving.tenancy.key_hashing import Pepper

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy import Engine

    from serving.api.admin import AdminServer
    from serving.tenancy.admin.verbs import Parameter, Verb

_TIMES = frozenset(
    (
        *("created_at", "activated_at", "expires_at", "revoked_at", "valid_from", "at", "lease_until"),
        *("in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at"),
        *("cancelling_at", "cancelled_at"),
    )
)
"""Columns in milliseconds since the epoch, which tables show as dates."""


_CREATING = frozenset({"tenants create", "plans set", "prices set"})
"""Verbs that make the database if there is none. Any other verb would find nothing in a new one."""

_REMEDY = (
    "set --config, CAPTIONER_DATA_DIR or CAPTIONER_DATABASE_URL as the service has them; the service's first start "
    "makes the database, and so does `captioner tenants create`"
)


def main(argv: Sequence[str]) -> int:
    """Run one verb; return the exit status: 2 for a wrong request, 3 if the database cannot be used."""
    given = parser().parse_args(argv)
    try:
        settings = Settings.load(["--config", given.config] if given.config else [])
    except SETTINGS_ERRORS as error:
        return report(error)
    warn_of_unknown_variables()
    try:
        database = open_database(settings)
        if given.verb.words not in _CREATING and (path := _missing_file(database)):
            return fail(f"there is no database: {path} does not exist; {_REMEDY}", 3)
        if given.format == "table":
            note(f"database {address(database)}")
        migrate(database)
        admin = Administration(database, Pepper.of(settings), f"cli:{given.actor}")
        _print(given.verb.run(admin, **_values(given.verb, given)), given.format)
    except (InvalidChangeError, NotFoundError) as error:
        return fail(str(error))
    except UnusableDatabase as error:
        return fail(str(error), 3)
    except OperationalError as error:
        return fail(f"the database does not answer: {address(database)}: {failure(error)}", 3)
    except BrokenPipeError:
        raise
    except OSError as error:  # of SQLite's lock, or of the pepper
        return fail(f"data_dir cannot be used: {failure(error)}", 3)
    database.dispose()
    return 0


def serve_api(argv: Sequence[str]) -> int:
    """Run `admin SETTINGS…`: the HTTP API alone, until a signal; return the exit status."""
    if printed_help(argv):
        return 0
    try:
        settings = Settings.load(argv[1:])
    except SETTINGS_ERRORS as error:
        return report(error)
    warn_of_unknown_variables()
    logs.configure(settings.log_level, settings.log_format)
    try:
        database = open_database(settings)
        # The HTTP server takes longer to import than all that a verb needs.
        server: AdminServer = importlib.import_module("serving.api.admin").AdminServer(settings, alone=True)
    except ValueError as error:  # UnusableDatabase too
        return fail(str(error))
    except OSError as error:  # of the pepper
        return fail(f"data_dir cannot be used: {failure(error)}", 3)
    try:
        asyncio.run(_serve(server, database))
    except UnusableDatabase as error:
        return fail(str(error))
    return 0 if server.started else 1


async def _serve(server: AdminServer, database: Engine) -> None:
    """Serve until a signal. While the database is away, requests get 503. Raises `UnusableDatabase`."""

    def stop_if_unusable(task: asyncio.Task[None]) -> None:
        server.should_exit = server.should_exit or (not task.cancelled() and task.exception() is not None)

    migrating = asyncio.create_task(until_migrated(database))
    migrating.add_done_callback(stop_if_unusable)
    await server.serve()
    if migrating.done():
        migrating.result()
    migrating.cancel()


def _missing_file(database: Engine) -> str | None:
    """Return the path of a database in a file that does not exist."""
    path = database.url.database or ""
    return path if database.dialect.name == "sqlite" and not Path(path).exists() else None


def parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs."""
    common = Parser(add_help=False)
    common.add_argument("--config", help="TOML file of settings, as of `captioner serve`; CAPTIONER_CONFIG")
    common.add_argument("--format", choices=("table", "csv", "json"), default="table")
    common.add_argument("--actor", default=getpass.getuser(), help="your name in the audit log; default: %(default)s")
    made = Parser("captioner")
    commands = made.add_subparsers(required=True, metavar="COMMAND")
    groups = {
        name: commands.add_parser(name, help=about).add_subparsers(required=True, metavar="VERB")
        for name, about in GROUPS.items()
    }
    for verb in VERBS:
        group, _, name = verb.words.rpartition(" ")
        parent = groups[group] if group else commands
        added = parent.add_parser(name, parents=[common], help=verb.help, description=verb.help)
        added.set_defaults(verb=verb)
        for parameter in verb.parameters:
            _add(added, parameter)
    return made


def _add(parser: argparse.ArgumentParser, parameter: Parameter) -> None:
    """Add a parameter as a positional word or a flag; one that is not given is absent from the namespace."""
    options: dict[str, Any] = {"help": parameter.help or None, "default": argparse.SUPPRESS}
    if parameter.kind is kinds.TRUTH:
        options["action"] = argparse.BooleanOptionalAction
    elif parameter.kind is kinds.LIMITS:
        options |= {"action": "append", "metavar": "NAME=VALUE"}
    else:
        options |= {"type": _type(parameter), "choices": parameter.choices or None}
    if parameter.word:
        parser.add_argument(
            parameter.name, metavar=parameter.word, nargs=None if parameter.required else "?", **options
        )
        return
    options["required"] = parameter.required and parameter.default is None
    flag = parameter.flag or parameter.name.replace("_", "-")
    parser.add_argument(f"--{flag}", dest=parameter.name, **options)


def _type(parameter: Parameter) -> Callable[[str], Any]:
    def convert(word: str) -> Any:
        try:
            return parameter.kind.from_words(word)
        except (ValueError, OverflowError):
            # On the command line a moment is the day on which it begins.
            phrase = kinds.DAY.phrase if parameter.kind is kinds.MOMENT else parameter.kind.phrase
            raise argparse.ArgumentTypeError(f"must be {phrase}, not {word!r}") from None

    return convert


def _values(verb: Verb, given: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of a verb's function. Raises `InvalidChangeError`."""
    values: dict[str, Any] = {}
    for parameter in verb.parameters:
        if hasattr(given, parameter.name):
            value = getattr(given, parameter.name)
            values[parameter.name] = _limits(value) if parameter.kind is kinds.LIMITS else value
        elif parameter.default is not None:
            values[parameter.name] = parameter.default()
    if verb.needs_change and not any(not each.word and each.name in values for each in verb.parameters):
        raise InvalidChangeError(f"nothing to change: see `captioner {verb.words} --help`")
    return values


def _limits(written: Sequence[str]) -> dict[str, Any]:
    """Convert `NAME=VALUE` words to a mapping. Raises `InvalidChangeError`."""
    limits: dict[str, Any] = {}
    for each in written:
        name, equals, value = each.partition("=")
        if not equals:
            raise InvalidChangeError(f"--limit {each}: NAME=VALUE is wanted")
        limits[name] = None if value == "none" else value
    return limits


def _print(answer: Any, form: str) -> None:
    """Print an answer as JSON, or as a table or CSV with a row for each item; of an invoice lines, then totals."""
    if form == "json":
        print(json.dumps(answer, indent=2, ensure_ascii=False))  # noqa: T201
        return
    if isinstance(answer, dict) and "lines" in answer:
        totals = [{"key_id": "total", **total} for total in answer["totals"]]
        answer = [*answer["lines"], *totals]
    rows = [
        {name: _cell(name, value) for name, value in row.items()}
        for row in ([answer] if isinstance(answer, dict) else answer)
    ]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if form == "csv":
        writer = csv.DictWriter(sys.stdout, columns)
        writer.writeheader()
        writer.writerows(rows)
    elif len(rows) == 1 and isinstance(answer, dict):
        wide = max(map(len, columns))
        for name in columns:
            print(f"{name:{wide}}  {rows[0][name]}")  # noqa: T201
    else:
        wide_by = {name: max(len(name), *(len(row.get(name, "")) for row in rows)) for name in columns} if rows else {}
        for row in ([{name: name for name in columns}, *rows]) if rows else []:
            print("  ".join(f"{row.get(name, ''):{wide_by[name]}}" for name in columns).rstrip())  # noqa: T201


def _cell(name: str, value: Any) -> str:
    """Format one value for people."""
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
