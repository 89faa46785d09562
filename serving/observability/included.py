"""Metrics of another registry that are part of a scrape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric


@dataclass(frozen=True, slots=True)
class Included(Collector):
    """The metrics of another registry whose names begin with a prefix."""

    other: CollectorRegistry
    prefix: str

    def collect(self) -> Iterator[Metric]:
        return (metric for metric in self.other.collect() if metric.name.startswith(self.prefix))
