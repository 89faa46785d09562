"""Conversions between stored rows and values of an administrator: limits, amounts, names, rows without secrets."""

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
"""Limits that are stored in nano-units, and shown in units of money."""

LIMITS = tuple(_MONEY.get(name, name) for name in LIMIT_NAMES)
"""The names of limits, as an administrator writes them."""

MOST = 2**53
NAME_CHARACTERS = 128


class InvalidChangeError(ValueError):
    """A change that is not allowed; the message has the reason."""


def tenant_changes(changes: Mapping[str, Any], limits: Mapping[str, int | None]) -> dict[str, Any]:
    """Return checked values of columns. Raises `InvalidChangeError`."""
    values: dict[str, Any] = {}
    for name, value in changes.items():
        match name:
            case "name":
                values[name] = checked_name(value)
            case "plan":
                values[name] = str(value)
            case "state":
                if value not in set(State):
                    raise InvalidChangeError(f"state: {value} is none of {', '.join(State)}")
                values[name] = str(value)
            case "limits":
                values[name] = checked_limits(value, limits)
            case "free_tokens" | "free_days":
                values[name] = None if value is None else _count(name, value)
            case "free_only" | "log_content":
                if not isinstance(value, bool):
                    raise InvalidChangeError(f"{name}: true or false")
                values[name] = value
            case _:
                raise InvalidChangeError(f"a tenant has no {name}")
    return values


def plan_changes(changes: Mapping[str, Any], before: Mapping[Any, Any]) -> dict[str, Any]:
    """Return checked values of columns. Raises `InvalidChangeError`."""
    values: dict[str, Any] = {}
    for name, value in changes.items():
        match name:
            case "weight":
                weight = float(decimal(value))
                if not 0 < weight <= 1000:  # noqa: PLR2004
                    raise InvalidChangeError("weight: above 0, 1000 at most")
                values[name] = weight
            case "priority":
                if not isinstance(value, int) or not -100 <= value <= 100:  # noqa: PLR2004
                    raise InvalidChangeError("priority: a whole number from -100 to 100")
                values[name] = value
            case "tenant_limits" | "key_limits":
                values[name] = checked_limits(value, before[name])
            case "free_tokens" | "free_days":
                values[name] = _count(name, value)
            case "batch_price_percent":
                if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 100:  # noqa: PLR2004
                    raise InvalidChangeError("batch_price_percent: a whole number from 0 to 100")
                values[name] = value
            case _:
                raise InvalidChangeError(f"a plan has no {name}")
    return values


def checked_limits(changes: Mapping[str, Any], before: Mapping[str, int | None]) -> dict[str, int | None]:
    """Return limits as they are stored, with changes as an administrator writes them. Raises `InvalidChangeError`."""
    limits = dict(before)
    stored = {shown: name for name, shown in _MONEY.items()}
    for shown, value in changes.items():
        if shown not in LIMITS:
            raise InvalidChangeError(f"limits: {shown} is none of {', '.join(LIMITS)}")
        name = stored.get(shown, shown)
        if value == "plan":
            limits.pop(name, None)
        elif value is None:
            limits[name] = None
        elif shown in stored:
            limits[name] = _nanos(shown, value)
        else:
            limits[name] = _count(shown, value)
    return limits


def _shown_limits(limits: Mapping[str, int | None]) -> dict[str, Any]:
    return {
        _MONEY.get(name, name): prices.money(value) if name in _MONEY and value is not None else value
        for name, value in sorted(limits.items())
    }


def _nanos(name: str, value: Any) -> int:
    nanos = decimal(value) * prices.NANOS
    if not 0 <= nanos <= MOST or nanos != int(nanos):
        raise InvalidChangeError(f"{name}: an amount of money from 0 on, with at most nine decimals")
    return int(nanos)


def _count(name: str, value: Any) -> int:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST:
        raise InvalidChangeError(f"{name}: a whole number from 0 on")
    return value


def decimal(value: Any) -> Decimal:
    """Convert a number exactly as it is written, a float by its shortest form. Raises `InvalidChangeError`."""
    if isinstance(value, float):
        value = repr(value)
    try:
        number = Decimal(value if isinstance(value, (str, int, Decimal)) else "none")
    except InvalidOperation:
        number = Decimal("NaN")
    if not number.is_finite():
        raise InvalidChangeError(f"{value!r} is not a number")
    return number


def checked_name(value: Any) -> str:
    """Check a name: printable, so that no table or log can be forged with it. Raises `InvalidChangeError`."""
    if not isinstance(value, str) or len(value) > NAME_CHARACTERS or not value.isprintable():
        raise InvalidChangeError(f"name: at most {NAME_CHARACTERS} printable characters")
    return value


def shown_tenant(row: Mapping[Any, Any]) -> Shown:
    """Return a tenant for an answer."""
    return {**row, "limits": _shown_limits(row["limits"])}


def shown_plan(row: Mapping[Any, Any]) -> Shown:
    """Return a plan for an answer."""
    return {**row, **{name: _shown_limits(row[name]) for name in ("tenant_limits", "key_limits")}}


def shown_key(row: Mapping[Any, Any]) -> Shown:
    """Return a key for an answer: without its digest, since anybody may see the answer."""
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
    """Return a price for an answer: per 1,000 tokens."""
    price = prices.Price(row["currency"], row["input_nanos"], row["output_nanos"])
    shown = {name: row[name] for name in ("region", "valid_from", "currency")}
    return shown | {"input_price": f"{price.input_price:f}", "output_price": f"{price.output_price:f}"}


_BRIEF = ("id", "tenant", "status", "total", "completed", "failed", "created_at", "expires_at")


def shown_batch(row: Mapping[Any, Any], *, brief: bool = False) -> Shown:
    """Return a batch for an answer: its amount in units of its currency, who works on it, and without its metadata."""
    shown = {str(name): value for name, value in row.items() if name not in {"metadata", "tenant_id", "amount_nanos"}}
    shown |= {"tenant": row["tenant_id"], "amount": prices.money(row["amount_nanos"])}
    return {name: shown[name] for name in _BRIEF} if brief else shown
