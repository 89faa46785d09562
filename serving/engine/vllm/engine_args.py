"""`engine_args` of the settings, checked by vLLM's `AsyncEngineArgs`: names by its fields, values by their types.

As a program it checks the JSON table on standard input, for commands that do not import vLLM: exit status 2 with the
problem on standard output if vLLM refuses it.
"""

from __future__ import annotations

import difflib
import enum
import importlib.util
import json
import re
import sys
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, get_args

import vllm
from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUndefinedAnnotation
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER

from serving.observability.redaction import HIDDEN, redact
from serving.settings.engine_args import InvalidEngineArgs, reserved_problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_PACKAGES = {
    "bitsandbytes": "bitsandbytes",
    "fastsafetensors": "fastsafetensors",
    "runai_streamer": "runai_model_streamer",
    "runai_streamer_sharded": "runai_model_streamer",
    "tensorizer": "tensorizer",
}
"""Modules that a `load_format` imports in the engine process, where a missing one would be one line of a traceback."""

_MOST_CHARACTERS = 600


def checked(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with their values in vLLM's types. Raises `InvalidEngineArgs`."""
    if problem := reserved_problem(dict(arguments)):
        raise InvalidEngineArgs(problem)
    known = {field.name: field.type for field in fields(AsyncEngineArgs) if not field.name.startswith("_")}
    for name in arguments:
        if name not in known:
            raise InvalidEngineArgs(
                f"engine_args: {name}: vLLM {vllm.__version__} has no such argument{_similar(name, known)}"
            )
    values = {name: _value(name, known[name], value) for name, value in arguments.items()}
    load_format = str(values.get("load_format", "auto"))
    if load_format not in _LOAD_FORMAT_TO_MODEL_LOADER:
        formats = ", ".join(_LOAD_FORMAT_TO_MODEL_LOADER)
        raise InvalidEngineArgs(
            f"engine_args: load_format: must be one of {formats}{_similar(load_format, _LOAD_FORMAT_TO_MODEL_LOADER)}"
        )
    module = _PACKAGES.get(load_format)
    if module and importlib.util.find_spec(module) is None:
        raise InvalidEngineArgs(
            f"engine_args: load_format: {load_format} needs the package {module.replace('_', '-')}, which is "
            "not installed here"
        )
    return values


@contextmanager
def refusals_named(arguments: Mapping[str, Any]) -> Iterator[None]:
    """Raise `InvalidEngineArgs` for what vLLM refuses while it makes a configuration of the arguments."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, AssertionError, LookupError, ImportError) as error:
        if not arguments:
            raise
        text = "; ".join(_details(error)) if isinstance(error, ValidationError) else str(error) or type(error).__name__
        text = text.lstrip(".: ")
        named = [name for name in arguments if name in text or name.replace("_", "-") in text] or list(arguments)
        shown = _without_secrets(arguments, text)
        raise InvalidEngineArgs(f"engine_args: {', '.join(named)}: vLLM refuses: {shown}") from None


def _value(name: str, kind: Any, value: Any) -> Any:
    """Return the value in the type that vLLM declares for the argument."""
    choices: list[enum.EnumMeta] = [each for each in (kind, *get_args(kind)) if isinstance(each, enum.EnumMeta)]
    if choices and isinstance(value, str):
        members: dict[str, Any] = dict(choices[0].__members__)
        if value.upper() not in members:
            raise InvalidEngineArgs(
                f"engine_args: {name}: must be one of {', '.join(members)}{_similar(value.upper(), members)}"
            )
        return members[value.upper()]
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        candidates = [field.name for each in (kind, *get_args(kind)) if is_dataclass(each) for field in fields(each)]
        text = "; ".join(dict.fromkeys(_details(error, value, candidates)))
        raise InvalidEngineArgs(f"engine_args: {name}{_without_secrets({name: value}, text)}") from None
    except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation):
        return value  # a type of which only vLLM knows the values
    except (ValueError, TypeError, AssertionError, LookupError) as error:
        raise InvalidEngineArgs(f"engine_args: {name}: {_without_secrets({name: value}, str(error))}") from None


def _details(error: ValidationError, value: Any = None, names: list[str] | None = None) -> Iterator[str]:
    """Yield `.FIELD: message` for each problem, without the value."""
    for problem in error.errors(include_url=False, include_input=False):
        parts = [str(part) for part in problem["loc"] if re.fullmatch(r"[a-z]\w*_\w+|\w{5,}|\d+", str(part))]
        message = problem["msg"][:1].lower() + problem["msg"][1:]
        if problem["type"] == "unexpected_keyword_argument" and parts:
            message = f"no such key{_similar(parts[-1], names or [])}"
        elif problem["type"] == "literal_error" and isinstance(value, str):
            message += _similar(value, re.findall(r"'([^']*)'", str(problem.get("ctx", {}).get("expected", ""))))
        yield "".join(f".{part}" for part in parts) + f": {message}"


def _similar(name: str, known: Any) -> str:
    found = difflib.get_close_matches(name.replace("-", "_").removeprefix("__"), list(known), n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def _without_secrets(arguments: Any, text: str) -> str:
    """Return vLLM's text in one line without the given values: any may be a secret, in the wrong place, too."""
    text = " ".join(text.split())
    for value in sorted(_texts(arguments), key=len, reverse=True):
        text = re.sub(rf"(?<![\w-]){re.escape(value)}(?![\w-])", HIDDEN, text)
    text = redact(text)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"


def _texts(value: Any) -> set[str]:
    match value:
        case dict():
            return set().union(*map(_texts, value.values()))
        case list() | tuple():
            return set().union(*map(_texts, value))
        case str() if len(value) > 3:  # noqa: PLR2004
            return {value}
    return set()


def main() -> int:
    """Check the table on standard input; return the exit status."""
    try:
        checked(json.load(sys.stdin))
    except InvalidEngineArgs as error:
        print(error)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
