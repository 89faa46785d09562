"""Counter of money: whole nano-units inside, units of the currency in a scrape."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

_NANOS = 10**9


class MoneyCounter(Collector):
    """A counter of nano-units (1e-9 of a currency) by labels.

    A counter of floats rounds at each increment, so that its sum differs from the ledger's. Here only the exported
    value is rounded, once: it is exact to the nano-unit up to 4 million units (2^52 / 1e9).
    """

    def __init__(self, name: str, documentation: str, labels: Sequence[str], registry: CollectorRegistry) -> None:
        self._name, self._documentation, self._labels = name, documentation, labels
        self._nanos: Counter[tuple[str, ...]] = Counter()
        registry.register(self)

    def add(self, nanos: int, *values: str) -> None:
        """Add an amount to the series with these values of the labels."""
        self._nanos[values] += nanos

    def collect(self) -> Iterator[Metric]:
        """Yield the metric, with a sample for each series."""
        family = CounterMetricFamily(self._name, self._documentation, labels=self._labels)
        for values, nanos in [*self._nanos.items()]:
            family.add_metric(values, nanos / _NANOS)
        yield family
