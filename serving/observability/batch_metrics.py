"""Metrics of batches: lines by outcome, ended batches by status, running lines, and the backlog."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge

if TYPE_CHECKING:
    from collections.abc import Callable

    from prometheus_client import CollectorRegistry

    from serving.observability.request_record import RequestRecord

_OUTCOMES = ("completed", "failed", "repeated")
_STATUSES = ("completed", "failed", "expired", "cancelled")


class BatchMetrics:
    """Counters and gauges of the batches that this process works on. `count_bill` counts what a record bills.

    Lines have no place in the metrics of requests: nobody waits for one, and its times would hide the callers'.
    """

    def __init__(self, registry: CollectorRegistry, count_bill: Callable[[RequestRecord], None]) -> None:
        self._count_bill = count_bill
        self._lines = Counter(
            "captioner_batch_lines",
            "Attempts of lines of batches that have ended, by outcome: completed, failed (an error line), repeated (no "
            "result yet: a limit, an overload or a fault of the service).",
            ("outcome",),
            registry=registry,
        )
        self._batches = Counter(
            "captioner_batches",
            "Batches that this process has ended, by status: completed, failed, expired, cancelled.",
            ("status",),
            registry=registry,
        )
        self.running = Gauge(
            "captioner_batch_lines_running", "Lines of batches that this process captions.", registry=registry
        )
        self.backlog = Gauge(
            "captioner_batch_lines_waiting",
            "Lines of all batches in the database that have no result yet; every frontend exports the same number.",
            registry=registry,
        )
        for outcome in _OUTCOMES:
            self._lines.labels(outcome)
        for status in _STATUSES:
            self._batches.labels(status)

    def finish_line(self, record: RequestRecord, error: BaseException | None, *, stored: bool) -> None:
        """Write the record of an attempt of a line: its outcome, its bill and its log line."""
        record.close()
        outcome, code = record.conclude(error)
        self._lines.labels(("completed" if error is None else "failed") if stored else "repeated").inc()
        self._count_bill(record)
        record.log(outcome, code, None)

    def ended(self, status: str) -> None:
        """Count a batch that has ended."""
        self._batches.labels(status).inc()
