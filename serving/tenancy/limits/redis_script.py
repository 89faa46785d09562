"""The script `redis.lua` with the constants, the names and the orders of fields that it shares with Python.

They are defined once, here and in counter_store.py, and put into the script when this module is imported.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from serving.tenancy.limits.counter_store import BURST_S, WINDOW_S, Reason, Scope
from serving.types import Limits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_TEXTS = ("step", "holder", "day", "month")
_UNSET = -1


class Numbers(NamedTuple):
    """Numbers of a step, in the order of the script's arguments."""

    audio_ms: int = 0
    tokens: int = 0
    nanos: int = 0
    free_tokens: int = 0
    charged_s: int = 0
    reserved_tokens: int = 0
    reserved_nanos: int = 0
    free_left: int = 0


class Reply(NamedTuple):
    """Fields of the script's answer, in their order; what is in use in each scope follows."""

    reason: int
    retry_after_s: int
    free_tokens: int
    free_left: int
    now_s: int


def _limits_of(scope: Scope) -> Mapping[str, int | None]:
    """Return the limits under the names and in the order that the script has; `None` is not set."""
    return {
        **dataclasses.asdict(scope.limits),
        "burst": scope.burst,
        "free_tokens": scope.free_tokens,
        "only_free": scope.only_free or None,
        "has_budget": scope.has_budget or None,
    }


@functools.lru_cache(4096)
def limit_values(scope: Scope) -> Sequence[int]:
    """Return the limits of a scope as arguments of the script."""
    return [_UNSET if value is None else int(value) for value in _limits_of(scope).values()]


def _render(template: str) -> str:
    """Replace the script's marker line by the constants that it shares with Python."""
    marker = next(line for line in template.splitlines() if line.startswith("--@constants"))
    reasons = ", ".join(f"{reason.name} = {reason.value}" for reason in Reason)
    names = {
        "TEXTS": _TEXTS,
        "NUMBERS": Numbers._fields,
        "LIMITS": _limits_of(Scope("", Limits(), 0)),
        "REPLY": Reply._fields,
    }
    constants = [
        f"local WINDOW_S, BURST_S, UNSET = {WINDOW_S}, {BURST_S}, {_UNSET}",
        f"local Reason = {{{reasons}}}",
        *(f"local {name} = {{{', '.join(map(repr, values))}}}" for name, values in names.items()),
    ]
    return template.replace(marker, "\n".join(constants))


SCRIPT = _render(Path(__file__).with_name("redis.lua").read_text())
