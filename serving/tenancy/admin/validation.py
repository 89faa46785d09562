"""How an administrator writes what is kept, and how it is told: limits, amounts, names, and rows without secrets."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from serving.tenancy.billing import prices
from serving.tenancy.ledger.usage_record import now_ms
from serving.tenancy.plans import LIMIT_NAMES, State

if TYPE_CHECKING:
    from collections.abc import Mapping

    Shown = dict[str, Any]

_MONEY = {"nanos_per_day": "money_per_day", "nanos_per_month": "money_per_month"}
"""Limits that are kept in nano-units, and told in units of money."""

LIMITS = tuple(_MONEY.get(name, name) for name in LIMIT_NAMES)
"""The names of limits, as an administrator writes them."""

MOST = 2**53
NAME_CHARACTERS = 128


class RefusedError(ValueError):
    """It cannot be done as asked; the message says why."""


def tenant_changes(changes: Mapping[str, Any], limits: Mapping[str, int | None]) -> dict[str, Any]:
    """Checked values of columns. Raises `RefusedError`."""
    values: dict[str, Any] = {}
    for name, value in changes.items():
        match name:
            case "name":
                values[name] = checked_name(value)
            case "plan":
                values[name] = str(value)
            case "state":
                if value not in set(State):
                    raise RefusedError(f"state: {value} is none of {', '.join(State)}")
                values[name] = str(value)
            case "limits":
                values[name] = checked_limits(value, limits)
            case "free_tokens" | "free_days":
                values[name] = None if value is None else _count(name, value)
            case "free_only" | "log_content":
                if not isinstance(value, bool):
                    raise RefusedError(f"{name}: true or false")
                values[name] = value
            case _:
                raise RefusedError(f"a tenant has no {name}")
    return values


def plan_changes(changes: Mapping[str, Any], before: Mapping[Any, Any]) -> dict[str, Any]:
    """Checked values of columns. Raises `RefusedError`."""
    values: dict[str, Any] = {}
    for name, value in changes.items():
        match name:
            case "weight":
                weight = float(decimal(value))
                if not 0 < weight <= 1000:  # noqa: PLR2004
                    raise RefusedError("weight: above 0, 1000 at most")
                values[name] = weight
            case "priority":
                if not isinstance(value, int) or not -100 <= value <= 100:  # noqa: PLR2004
                    raise RefusedError("priority: a whole number from -100 to 100")
                values[name] = value
            case "tenant_limits" | "key_limits":
                values[name] = checked_limits(value, before[name])
            case "free_tokens" | "free_days":
                values[name] = _count(name, value)
            case _:
                raise RefusedError(f"a plan has no {name}")
    return values


def checked_limits(changes: Mapping[str, Any], before: Mapping[str, int | None]) -> dict[str, int | None]:
    """Limits as they are kept, with changes as an administrator writes them. Raises `RefusedError`."""
    limits = dict(before)
    kept = {told: name for name, told in _MONEY.items()}
    for told, value in changes.items():
        if told not in LIMITS:
            raise RefusedError(f"limits: {told} is none of {', '.join(LIMITS)}")
        name = kept.get(told, told)
        if value == "plan":
            limits.pop(name, None)
        elif value is None:
            limits[name] = None
        elif told in kept:
            limits[name] = _nanos(told, value)
        else:
            limits[name] = _count(told, value)
    return limits


def _shown_limits(limits: Mapping[str, int | None]) -> dict[str, Any]:
    return {
        _MONEY.get(name, name): prices.money(value) if name in _MONEY and value is not None else value
        for name, value in sorted(limits.items())
    }


def _nanos(name: str, value: Any) -> int:
    nanos = decimal(value) * prices.NANOS
    if not 0 <= nanos <= MOST or nanos != int(nanos):
        raise RefusedError(f"{name}: an amount of money from 0 on, with at most nine decimals")
    return int(nanos)


def _count(name: str, value: Any) -> int:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST:
        raise RefusedError(f"{name}: a whole number from 0 on")
    return value


def decimal(value: Any) -> Decimal:
    """A number as it was written: one that has been a float is not."""
    if isinstance(value, float):
        value = repr(value)
    try:
        number = Decimal(value if isinstance(value, (str, int, Decimal)) else "none")
    except InvalidOperation:
        number = Decimal("NaN")
    if not number.is_finite():
        raise RefusedError(f"{value!r} is not a number")
    return number


def checked_name(value: Any) -> str:
    """A name that people read: printable, so that no table or log can be forged with it. Raises `RefusedError`."""
    if not isinstance(value, str) or len(value) > NAME_CHARACTERS or not value.isprintable():
        raise RefusedError(f"name: at most {NAME_CHARACTERS} printable characters")
    return value


def shown_tenant(row: Mapping[Any, Any]) -> Shown:
    """A tenant as it is told."""
    return {**row, "limits": _shown_limits(row["limits"])}


def shown_plan(row: Mapping[Any, Any]) -> Shown:
    """A plan as it is told."""
    return {**row, **{name: _shown_limits(row[name]) for name in ("tenant_limits", "key_limits")}}


def shown_key(row: Mapping[Any, Any]) -> Shown:
    """What anybody may see of a key: not even its digest."""
    at = now_ms()
    state = "valid"
    if row["revoked_at"] is not None:
        state = "revoked"
    elif row["expires_at"] is not None and row["expires_at"] <= at:
        state = "expired"
    shown = {"id": row["id"], "tenant": row["tenant_id"], "name": row["name"], "prefix": row["prefix"], "state": state}
    times = {name: row[name] for name in ("created_at", "expires_at", "revoked_at", "replaced_by")}
    return shown | times | {"limits": _shown_limits(row["limits"])}


def shown_price(row: Mapping[Any, Any]) -> Shown:
    """A price as it is told: per 1,000 tokens."""
    price = prices.Price(row["currency"], row["input_nanos"], row["output_nanos"])
    shown = {name: row[name] for name in ("region", "valid_from", "currency")}
    return shown | {"input_price": f"{price.input_price:f}", "output_price": f"{price.output_price:f}"}
