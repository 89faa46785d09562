"""Callers made from rows of plans, tenants and keys: limits, scheduling class and free quota."""

from __future__ import annotations

from typing import Any

import pytest

from serving.tenancy import plans
from serving.tenancy.plans import State
from serving.types import Caller, FreeQuota, Limits, Region, SchedulingClass

PLAN: dict[str, Any] = {
    "name": "gold",
    "weight": 3.0,
    "priority": 1,
    "tenant_limits": {"requests_per_minute": 60, "tokens_per_day": 1000},
    "key_limits": {"requests_per_minute": 6},
    "free_tokens": 1_000_000,
    "free_days": 90,
    "batch_price_percent": 50,
}
TENANT: dict[str, Any] = {
    "id": "acme",
    "region": "beijing",
    "limits": {},
    "free_tokens": None,
    "free_days": None,
    "free_only": False,
    "log_content": False,
    "activated_at": 1_000_000,
}
KEY: dict[str, Any] = {"id": "k1", "limits": {}}


def test_a_caller_has_the_class_and_limits_of_its_plan() -> None:
    """Weight and priority are the plan's; the quota ends 90 days after the activation, in seconds."""
    assert plans.caller(PLAN, TENANT, KEY) == Caller(
        "acme",
        "k1",
        Region.BEIJING,
        SchedulingClass("acme", 3.0, 1),
        Limits(requests_per_minute=60, tokens_per_day=1000),
        Limits(requests_per_minute=6),
        FreeQuota(1_000_000, 7_777_000.0),
        log_content=False,
        batch_price_percent=50,
    )
    assert plans.caller(PLAN, TENANT | {"log_content": True}, KEY).log_content is True


def test_limits_of_tenant_and_key_override_those_of_the_plan() -> None:
    """A value replaces the plan's, `None` lifts it, and names of a later version are passed over."""
    tenant = TENANT | {"limits": {"tokens_per_day": None, "concurrent_requests": 2, "of_a_later_version": 1}}
    caller = plans.caller(PLAN, tenant, KEY | {"limits": {"requests_per_minute": 7}})
    assert caller.tenant_limits == Limits(requests_per_minute=60, concurrent_requests=2)
    assert caller.key_limits == Limits(requests_per_minute=7)


@pytest.mark.parametrize(
    ("plan", "tenant", "quota"),
    [
        ({}, {"free_days": 1}, FreeQuota(1_000_000, 87_400.0)),
        ({}, {"free_days": 0}, FreeQuota(1_000_000, 1000.0)),
        ({}, {"free_tokens": 5}, FreeQuota(5, 7_777_000.0)),
        ({}, {"free_tokens": 0}, None),
        ({"free_tokens": 0}, {}, None),
        ({"free_tokens": 0}, {"free_only": True}, FreeQuota(0, 7_777_000.0, only=True)),
        ({"free_tokens": 1}, {"free_only": True}, FreeQuota(1, 7_777_000.0, only=True)),
        ({}, {"region": "singapore"}, None),
        ({}, {"region": "singapore", "free_tokens": 5}, FreeQuota(5, 7_777_000.0)),
    ],
)
def test_the_free_quota(plan: dict[str, Any], tenant: dict[str, Any], quota: FreeQuota | None) -> None:
    """The tenant's own tokens and days come before the plan's; a plan's tokens count in Beijing alone."""
    assert plans.free_quota(PLAN | plan, TENANT | tenant) == quota


def test_names_that_the_database_has() -> None:
    """States and limits are columns and JSON keys of existing databases."""
    assert [state.value for state in State] == ["active", "suspended", "arrears"]
    assert plans.DAY_MS == 86_400_000
    assert sorted(plans.LIMIT_NAMES) == [
        "audio_seconds_per_minute",
        "concurrent_audio_seconds",
        "concurrent_requests",
        "nanos_per_day",
        "nanos_per_month",
        "requests_per_minute",
        "tokens_per_day",
        "tokens_per_minute",
        "tokens_per_month",
    ]
