"""Estimates of captions' lengths: from a tenant's own captions, in bounded memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serving.scheduling.output_estimate import OutputEstimate, TenantOutputEstimates

if TYPE_CHECKING:
    import pytest


def test_a_tenants_captions_change_only_its_own_estimate() -> None:
    """Other tenants' estimates stay as they are, however long one tenant's captions are."""
    estimates = TenantOutputEstimates()
    for _ in range(100):
        estimates.update("long", 32_768, cut=False)
        estimates.update("short", 10, cut=False)
    assert 30_000 < estimates.tokens("long") <= 32_768
    assert 10 <= estimates.tokens("short") < 20
    assert estimates.tokens("other") == 450


def test_the_first_caption_moves_the_estimates_by_a_sixteenth() -> None:
    """A caption of 466 tokens moves a tenant's estimate from 450 to 451, and the mean with two deviations to 594."""
    estimates, overall = TenantOutputEstimates(), OutputEstimate()
    assert (estimates.tokens("a"), overall.tokens) == (450, 600)
    estimates.update("a", 466, cut=False)
    overall.update(466)
    # 75 + (16 - 75) / 16 = 71.3125; 451 + 2 * 71.3125 = 593.625
    assert (estimates.tokens("a"), overall.tokens) == (451, 594)


def test_captions_that_were_cut_short_do_not_count() -> None:
    """A caption that was cut counts only if it is at least as long as expected."""
    estimates = TenantOutputEstimates()
    for _ in range(100):
        estimates.update("a", 1, cut=True)
    assert estimates.tokens("a") == 450
    estimates.update("a", 2050, cut=True)
    assert estimates.tokens("a") == 550


def test_memory_is_bounded_by_dropping_the_tenant_seen_least_recently(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant beyond the bound replaces the one whose last caption is the oldest."""
    monkeypatch.setattr("serving.scheduling.output_estimate._MAX_TENANTS", 2)
    estimates = TenantOutputEstimates()
    for tenant in ("a", "b", "a", "c"):
        estimates.update(tenant, 10, cut=False)
    assert estimates.tokens("b") == 450
    assert estimates.tokens("a") < 450
    assert len(estimates._estimates) == 2
