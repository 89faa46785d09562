"""Rows for a caller that state each of its limits, what counts in it now and what is left."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from serving.tenancy.billing.prices import money
from serving.tenancy.limits.counter_store import BUDGETS, WINDOW_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from serving.tenancy.limits.counter_store import Scope, Spent, Use
    from serving.types import Caller, Limits

COLUMNS = ("scope", "limit", "max", "used", "remaining", "unit", "resets_in_s", "ends_at")
"""Columns of a row. `scope`: `tenant`, or `key` for the key of the request alone. `max`: the limit's value."""

_TENANT, _KEY = "tenant", "key"

_COUNTED: Mapping[str, tuple[str, str, Callable[[Use], float]]] = {
    "requests_per_minute": ("requests_per_minute", "requests", lambda use: use.requests),
    "tokens_per_minute": ("tokens_per_minute", "tokens", lambda use: use.tokens),
    "audio_seconds_per_minute": ("audio_seconds_per_minute", "seconds", lambda use: use.audio_ms / 1000),
    "concurrent_requests": ("concurrent_requests", "requests", lambda use: use.running),
    "concurrent_audio_seconds": ("concurrent_audio_seconds", "seconds", lambda use: use.running_audio_ms / 1000),
    "tokens_per_day": ("tokens_per_day", "tokens", lambda use: use.tokens_per_day),
    "tokens_per_month": ("tokens_per_month", "tokens", lambda use: use.tokens_per_month),
    "nanos_per_day": ("money_per_day", "", lambda use: use.nanos_per_day),
    "nanos_per_month": ("money_per_month", "", lambda use: use.nanos_per_month),
}
"""Name for people, unit ("": the currency) and use, by the field of `Limits`."""


def without_budgets(scope: Scope) -> Scope:
    """Return the scope with the limits that the counters alone know: those of a minute and of what is running."""
    limits = replace(scope.limits, **dict.fromkeys(BUDGETS))
    return replace(scope, limits=limits, free_tokens=None, only_free=False)


def with_spent(use: Use, scope: Scope, caller: Caller, spent: Spent) -> Use:
    """Return the use with the ledger's sums of the scope, which may not be in the counters."""
    is_key = scope.name == f"{_KEY}:{caller.key_id}"
    sums = spent.key if is_key else spent.tenant
    return use._replace(
        tokens_per_day=sums.tokens_per_day,
        tokens_per_month=sums.tokens_per_month,
        nanos_per_day=sums.nanos_per_day,
        nanos_per_month=sums.nanos_per_month,
        free_tokens=0 if is_key else spent.free_tokens,
    )


def rows(
    caller: Caller, uses: Iterable[tuple[Scope, Use]], currency: str, until_next: Callable[[str], int]
) -> Sequence[Mapping[str, Any]]:
    """Return a row for each limit that is set. `until_next` returns the seconds until the next `day` or `month`."""
    found: list[Mapping[str, Any]] = []
    for scope, use in uses:
        name = _KEY if scope.name == f"{_KEY}:{caller.key_id}" else _TENANT
        found += [row | {"scope": name} for row in _rows(scope.limits, use, currency, until_next)]
        if (quota := caller.free_quota) and scope.free_tokens is not None:
            ends_at = dt.datetime.fromtimestamp(quota.ends_at, dt.UTC).isoformat(timespec="seconds")
            row = _row("free_tokens", "tokens", scope.free_tokens, use.free_tokens)
            found.append(row | {"scope": name, "ends_at": ends_at.replace("+00:00", "Z")})
    return [{column: row.get(column) for column in COLUMNS} for row in found]


def _rows(limits: Limits, use: Use, currency: str, until_next: Callable[[str], int]) -> Iterable[dict[str, Any]]:
    for field, (name, unit, used_of) in _COUNTED.items():
        if (limit := getattr(limits, field)) is None:
            continue
        used = used_of(use)
        row = _row(name, unit or currency, limit, used)
        if not unit:
            row |= {column: money(int(row[column])) for column in ("max", "used", "remaining")}
        period = name.rpartition("_")[2]
        if period == "minute":
            row["resets_in_s"] = WINDOW_S if used else 0
        elif period in {"day", "month"}:
            row["resets_in_s"] = until_next(period)
        yield row


def _row(name: str, unit: str, limit: int, used: float) -> dict[str, Any]:
    return {"limit": name, "unit": unit, "max": limit, "used": used, "remaining": max(0, limit - used)}
