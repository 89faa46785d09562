"""Metrics of the service with given settings, and the check that the alert on spending finds a tenant by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from serving.api.app import create_app
from serving.types import Usage
from tests.observability.test_rules import Case, run

if TYPE_CHECKING:
    from pathlib import Path

    from serving.config import Settings
    from serving.observability.metrics import Metrics

USUAL_THEN_300_TIMES = "0+2000x300 600000+600000x50"
"""A counter in steps of 5 minutes: 25 h at 2,000 tokens a step, then 600,000."""


def metrics_of(settings: Settings, *, in_cluster: bool = False) -> Metrics:
    """Return the metrics of the service with these settings."""
    app = create_app(settings, targets=list if in_cluster else None)
    metrics: Metrics = app.state.components.metrics
    return metrics


def series_of_bill(metrics: Metrics, tenant: str) -> list[str]:
    """Bill a caption of a tenant; return the series of tokens that a scrape reads, with the labels of one target."""
    record = metrics.begin("r", "openai")
    record.caller, record.billed = tenant, Usage(13, 24)
    metrics.finish(record, None)
    return [
        f'{sample.name}{{instance="a",tenant="{sample.labels["tenant"]}",kind="{sample.labels["kind"]}"}}'
        for family in text_string_to_metric_families(generate_latest(metrics.registry).decode())
        for sample in family.samples
        if sample.name == "captioner_tenant_tokens_total"
    ]


def check_alert(metrics: Metrics, directory: Path) -> None:
    """Check that the alert on spending fires for the tenant `acme` alone, whose use has risen."""
    rising = series_of_bill(metrics, "acme")
    steady = [series for series in series_of_bill(metrics, "zeta") if series not in rising]
    assert len(rising) == len(steady) == 3
    series = dict.fromkeys(rising, USUAL_THEN_300_TIMES) | dict.fromkeys(steady, "0+600000x400")
    run([Case("CaptionerSpendingUnusual", "27h", series, [{"tenant": "acme"}])], directory)
