"""Callers made from the database's rows of plans, tenants and keys."""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING, Any

from serving.tenancy.billing.prices import has_free_quota
from serving.types import Caller, FreeQuota, Limits, Region, SchedulingClass

if TYPE_CHECKING:
    from collections.abc import Mapping

    Row = Mapping[Any, Any]

DAY_MS = 24 * 3600 * 1000

LIMIT_NAMES = tuple(field.name for field in dataclasses.fields(Limits))


class State(enum.StrEnum):
    """State of a tenant: served, locked out, or in arrears."""

    ACTIVE = "active"
    SUSPENDED = "suspended"
    ARREARS = "arrears"


def limits(of_plan: Mapping[str, int | None], own: Mapping[str, int | None]) -> Limits:
    """Return the plan's limits, overridden by those of the tenant or key; `None` there lifts a limit.

    Unknown names are limits of a later version, which this version cannot enforce.
    """
    return Limits(**{name: value for name, value in {**of_plan, **own}.items() if name in LIMIT_NAMES})


def free_quota(plan: Row, tenant: Row) -> FreeQuota | None:
    """Return the tenant's free quota; `None` if it has none and pays.

    The plan's free tokens apply only in regions that have a free quota, the tenant's own ones in all.
    """
    of_plan = plan["free_tokens"] if has_free_quota(Region(tenant["region"])) else 0
    tokens = of_plan if tenant["free_tokens"] is None else tenant["free_tokens"]
    days = plan["free_days"] if tenant["free_days"] is None else tenant["free_days"]
    if not tokens and not tenant["free_only"]:
        return None
    return FreeQuota(tokens, (tenant["activated_at"] + days * DAY_MS) / 1000, only=tenant["free_only"])


def caller(plan: Row, tenant: Row, key: Row) -> Caller:
    """Return the caller that this key identifies."""
    return Caller(
        tenant["id"],
        key["id"],
        Region(tenant["region"]),
        SchedulingClass(tenant["id"], plan["weight"], plan["priority"]),
        limits(plan["tenant_limits"], tenant["limits"]),
        limits(plan["key_limits"], key["limits"]),
        free_quota(plan, tenant),
        log_content=tenant["log_content"],
        batch_price_percent=plan["batch_price_percent"],
    )
