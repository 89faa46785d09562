"""Errors in settings, as lines for a terminal that show no secret."""

from __future__ import annotations

import os
import re
import tomllib
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from serving.cli.settings_help import FIELDS, accepted, flag, is_secret, is_table, variable
from serving.cli.terminal import fail, similar
from serving.config import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator

SETTINGS_ERRORS = (ValidationError, SettingsError, tomllib.TOMLDecodeError, UnicodeDecodeError, OSError)
"""Everything that `Settings.load` raises for what somebody has set wrongly."""

_MOST_CHARACTERS = 100


def report(error: BaseException) -> int:
    """Print each problem of one of `SETTINGS_ERRORS` on standard error; return exit status 2."""
    for problem in problems(error):
        fail(problem)
    return 2


def problems(error: BaseException) -> Iterator[str]:
    """Yield `SETTING: message` for each problem, without any part of a secret."""
    match error:
        case ValidationError():
            yield from map(_of_value, error.errors(include_url=False))
        case SettingsError():
            yield _of_flag(str(error).removeprefix("error parsing CLI: "))
        case tomllib.TOMLDecodeError():
            yield f"config: {_file()} is not a TOML file: {error}"
        case UnicodeDecodeError():
            yield "config: the settings file or a file in CAPTIONER_SECRETS_DIR is not UTF-8 text"
        case OSError(filename=str(name), strerror=str(reason)):
            yield f"{name}: cannot read the file: {reason}"
        case _:
            yield str(error)


def _of_value(problem: Any) -> str:
    """Describe one problem of pydantic's. The value is shown, except a secret's."""
    match problem["loc"]:
        case (str(name), *_) if name not in FIELDS:
            return f"{name}: not a setting{similar(name, list(FIELDS))}; remove it from {_file()}"
        case (str(name), *_):
            shown = "" if is_secret(name) or is_table(name) else f", not {_short(problem['input'])}"
            where = f"set {flag(name)} or {variable(name)}"
            return f"{name}: must be {accepted(name)}{shown}; {where}"
    return str(problem["ctx"]["error"])  # of our validators, which begin with the setting


def _of_flag(message: str) -> str:
    """Describe one problem of the command line. What follows a flag is not shown: it may be a secret."""
    if unknown := re.match(r"unrecognized arguments: (.*)", message, re.DOTALL):
        names = re.findall(r"(?<!\S)(--[a-z][a-z0-9_-]*|-[a-zA-Z])(?=[=\s]|$)", unknown[1])
        if not names:
            return "command line: unexpected value without a flag; write --SETTING=VALUE"
        known = [flag(name) for name in FIELDS]
        return f"{names[0]}: not a setting{similar(names[0], known)}; `captioner settings` lists all settings"
    if wrong := re.match(r"argument (--[a-z0-9-]+)[^:]*: (expected one argument|ignored explicit argument)", message):
        name = wrong[1][2:].replace("-", "_")
        if wrong[2].startswith("expected"):
            return f"{name}: {wrong[1]} needs a value; it must be {accepted(name)}"
        return f"{name}: {wrong[1]} takes no value; write {wrong[1]} or --no-{wrong[1][2:]}"
    return "command line: cannot be read; write --SETTING=VALUE, as `captioner settings` lists them"


def _file() -> str:
    return os.environ.get("CAPTIONER_CONFIG") or "the settings"


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= _MOST_CHARACTERS else f"{shown[:_MOST_CHARACTERS]}…"
