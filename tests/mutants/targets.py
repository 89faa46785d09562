"""Modules of money, access, admission and the wire, and the narrow tests of each, those that fail soonest first."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

TARGETS: dict[str, Sequence[str]] = {
    "serving/tenancy/billing/prices.py": ("tests/tenancy/test_prices.py",),
    "serving/tenancy/limits/spending.py": ("tests/tenancy/test_spending.py",),
    "serving/api/request_head.py": ("tests/api/test_head_rules.py",),
    "serving/scheduling/fair_queue.py": ("tests/scheduling/test_queue_rules.py",),
}
"""Path of the module, and arguments of pytest. Tests that start a server for each fault are left out where others hold
the module: a run is as long as the number of faults times the time of these tests."""
