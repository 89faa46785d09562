"""The list of settings for `--help`, and the example TOML file, from the declarations in `settings.groups`."""

from __future__ import annotations

import json
import sys
import textwrap
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import SecretStr

from serving.cli.setting_headings import GROUPS
from serving.settings.types import Example, Size, Table, size_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pydantic.fields import FieldInfo

FIELDS: dict[str, FieldInfo] = {name: field for group in GROUPS for name, field in group.fields.model_fields.items()}
"""Every setting in the order of the groups."""

_WIDTH = 118
_NO_SETTING = {"config"}
"""Settings that a TOML file cannot give."""


def main(argv: Sequence[str]) -> int:
    """Run `settings [--toml]`: print the list or the example file; return the exit status."""
    match list(argv[1:]):
        case ["--toml"]:
            print(example_file(), end="")  # noqa: T201
        case [] | ["--help"] | ["-h"]:
            print(help_text("settings"))  # noqa: T201
        case _:
            print("captioner: settings: takes only --toml", file=sys.stderr)  # noqa: T201
            return 2
    return 0


def help_of(argv: Sequence[str]) -> int:
    """Run `COMMAND --help` of a command that takes settings; return the exit status."""
    print(help_text(argv[0]))  # noqa: T201
    return 0


def printed_help(argv: Sequence[str]) -> bool:
    """Print the list of settings if `COMMAND …` asks for help; return whether it did."""
    asked = "--help" in argv or "-h" in argv
    if asked:
        print(help_text(argv[0]))  # noqa: T201
    return asked


def flag(name: str) -> str:
    """Return the command-line flag of a setting."""
    return f"--{name.replace('_', '-')}"


def variable(name: str) -> str:
    """Return the environment variable of a setting."""
    return f"CAPTIONER_{name.upper()}"


def is_secret(name: str) -> bool:
    """Return whether a value of the setting must never be printed. Unknown names count as secret."""
    return name not in FIELDS or _type(FIELDS[name])[0] is SecretStr


def is_table(name: str) -> bool:
    """Return whether a setting is a table, of whose values some may be secrets."""
    return any(isinstance(mark, Table) for mark in FIELDS[name].metadata)


def accepted(name: str) -> str:
    """Describe the values that a setting accepts: `a whole number, 0 to 65535`."""
    field = FIELDS[name]
    kind, several = _type(field)
    if several:
        return {int: "whole numbers", str: "words", SecretStr: "secrets"}[kind] + " separated by commas"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if is_table(name):
        return 'a table, or JSON such as {"name": "value"}'
    if _is_size(field):
        noun = "a size such as 10MiB or 10485760"
    else:
        named = {bool: "true or false", int: "a whole number", float: "a number", Path: "a path", SecretStr: "a secret"}
        noun = named.get(kind, "a text")
    bounds = _bounds(field)
    return f"{noun}, {bounds}" if bounds else noun


def help_text(command: str) -> str:
    """Return the list of all settings under their headings, for `captioner COMMAND --help`."""
    usage = (
        "usage: captioner settings [--toml]"
        if command == "settings"
        else f"usage: captioner {command} [--SETTING=VALUE …]"
    )
    about = (
        "Each setting is a flag, a variable, a file named as the variable in lower case in the directory "
        "CAPTIONER_SECRETS_DIR, or a key in the TOML file of --config (with underscores); the first of these counts. "
        'A SIZE is a number of bytes, such as 10MiB, "512 KiB" or 1048576. `captioner settings --toml` prints an '
        "example of the file."
    )
    lines = [usage, "", *textwrap.wrap(about, _WIDTH)]
    for group in GROUPS:
        lines += ["", f"{group.title}: {_summary(group.fields)}", f"  Example: {group.example}"]
        for name, field in group.fields.model_fields.items():
            lines += ["", f"  {_usage(name, field):48}  {variable(name)}"]
            lines += textwrap.wrap(describe(name), _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def example_file() -> str:
    """Return an example TOML file with every setting, commented out, in the order of the groups."""
    about = (
        "Every setting of the service with its default, or with an example where there is no default. Made by "
        "`captioner settings --toml`. Remove the `#` before a setting to set it, and pass the file as "
        "--config or in CAPTIONER_CONFIG. Flags, variables and files in CAPTIONER_SECRETS_DIR come before this file; "
        "keep secrets in them."
    )
    lines = list(_comment(about))
    for group in GROUPS:
        names = [name for name in group.fields.model_fields if name not in _NO_SETTING]
        if not names:
            continue
        lines += ["", "", f"# ---- {group.title}: {_summary(group.fields)}"]
        for name in names:
            lines += ["", *_comment(describe(name)), f"# {name} = {_toml(_example(name))}"]
    return "\n".join(lines) + "\n"


def describe(name: str) -> str:
    """Return a setting's description, the values that it accepts, and its default, as sentences."""
    field = FIELDS[name]
    text = f"{(field.description or '').rstrip('.')}."
    if bounds := _bounds(field):
        text += f" Range: {bounds}."
    if "Unset: " not in text and "Default: " not in text:
        text += f" Default: {_shown(field)}."
    return text


def _summary(fields: type[Any]) -> str:
    return (fields.__doc__ or "").rstrip(".")


def _usage(name: str, field: FieldInfo) -> str:
    kind, several = _type(field)
    if kind is bool:
        return f"{flag(name)}, --no-{flag(name)[2:]}"
    if get_origin(kind) is Literal:
        return f"{flag(name)} {'|'.join(get_args(kind))}"
    word = {int: "NUMBER", float: "NUMBER", Path: "PATH", SecretStr: "SECRET"}.get(kind, "TEXT")
    word = "JSON" if is_table(name) else word
    word = "SIZE" if _is_size(field) else word
    return f"{flag(name)} {word}{',…' if several else ''}"


def _type(field: FieldInfo) -> tuple[Any, bool]:
    """Return the type of a setting without `None`, of its items if it is a list, and whether it is a list."""
    kind = field.annotation
    if get_origin(kind) in {Union, types.UnionType}:
        (kind,) = (part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is tuple:
        return get_args(kind)[0], True
    return kind, False


def _is_size(field: FieldInfo) -> bool:
    return any(isinstance(mark, Size) for mark in field.metadata)


def _bounds(field: FieldInfo) -> str:
    shown: Any = size_text if _is_size(field) else str
    least, most = "", ""
    for mark in field.metadata:
        match mark:
            case Ge(ge=bound):
                least = shown(bound)
            case Gt(gt=bound):
                least = f"above {shown(bound)}"
            case Le(le=bound):
                most = shown(bound)
            case MinLen(min_length=length):
                return f"{length} characters or more"
    if most:
        return f"{least} to {most}"
    return least if least.startswith("above") or not least else f"{least} or more"


def _shown(field: FieldInfo) -> str:
    """Format a default for people."""
    default = field.default
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return ",".join(map(str, default)) or "empty"
    return size_text(default) if _is_size(field) else str(default)


def _example(name: str) -> Any:
    """Return the value of a setting in the example file: its default, or else its `Example`."""
    field = FIELDS[name]
    for mark in field.metadata:
        if isinstance(mark, Example):
            return mark.value
    if field.default is None:  # secrets alone: nobody should use one that is published here
        return f"<{accepted(name)}>"
    size = size_text(field.default) if _is_size(field) else ""
    return field.default if size.isdecimal() or not size else size


def _toml(value: Any) -> str:
    """Format a value for TOML."""
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{name} = {_toml(each)}' for name, each in value.items())} }}"
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def _comment(text: str) -> Iterator[str]:
    yield from textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="# ")
