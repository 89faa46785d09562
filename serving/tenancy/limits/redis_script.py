"""The script `redis.lua` with the constants, the names and the orders of fields that it shares with Python.

They are defined once, here and in counter_store.py, and put into the script when this module is imported.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from serving.tenancy.limits import spending
from serving.tenancy.limits.counter_store import BURST_S, WINDOW_S, Reason, Scope, Use
from serving.types import Limits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from serving.tenancy.limits.counter_store import Reservation

_TEXTS = ("step", "holder", "day", "month", "currency")
_UNSET = -1


class Numbers(NamedTuple):
    """Numbers of a step, in the order of the script's arguments."""

    audio_ms: int = 0
    # Of a request that begins: see `spending.Amounts`.
    input_tokens: int = 0
    expected_output_tokens: int = 0
    max_output_tokens: int = 0
    input_nanos: int = 0
    output_token_nanos: int = 0
    min_token_nanos: int = 0
    # Billed.
    tokens: int = 0
    nanos: int = 0
    free_tokens: int = 0
    # Of a reservation: see `counter_store.Reservation`.
    expected_tokens: int = 0
    max_tokens: int = 0
    max_nanos: int = 0
    free_left: int = 0
    charged_s: int = 0

    @classmethod
    def of(cls, reservation: Reservation) -> Numbers:
        """Return the numbers of a reservation."""
        return cls(
            audio_ms=reservation.audio_ms,
            expected_tokens=reservation.expected_tokens,
            max_tokens=reservation.max_tokens,
            max_nanos=reservation.max_nanos,
            free_left=reservation.free_left,
            charged_s=reservation.charged_s,
        )


class Reply(NamedTuple):
    """Fields of the script's answer, in their order; what is in use in each scope follows."""

    reason: int
    retry_after_s: int
    free_tokens: int
    free_left: int
    now_s: int
    output_tokens: int


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
        "USE": Use._fields,
    }
    shared = ("SHARE", "MIN_SHARE_TOKENS", "RESERVED_RETRY_S", "NO_BUDGET")
    constants = [
        f"local WINDOW_S, BURST_S, UNSET = {WINDOW_S}, {BURST_S}, {_UNSET}",
        *(f"local {name} = {getattr(spending, name)}" for name in shared),
        f"local Reason = {{{reasons}}}",
        *(f"local {name} = {{{', '.join(map(repr, values))}}}" for name, values in names.items()),
    ]
    return template.replace(marker, "\n".join(constants))


SCRIPT = _render(Path(__file__).with_name("redis.lua").read_text())
