"""Metrics of the quality guard: defective captions, and second samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import Counter

from serving.types import Defect

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from serving.observability.request_record import RequestRecord


class QualityMetrics:
    """Counters of answered captions by defect."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._defects = Counter(
            "captioner_caption_defects",
            "Captions that were delivered with a defect, by defect: loop (stopped where it repeated itself), blank (no "
            "text), short (one token), cut (at its max_tokens).",
            ("defect",),
            registry=registry,
        )
        self._retries = Counter(
            "captioner_caption_retries",
            "Second samples of defective captions, by defect of the first (loop, blank, short) and result: cured, kept "
            "(the second was no better, and the first was delivered).",
            ("defect", "result"),
            registry=registry,
        )
        for defect in Defect:
            self._defects.labels(defect)
            if defect is not Defect.CUT:
                for result in ("cured", "kept"):
                    self._retries.labels(defect, result)

    def count(self, record: RequestRecord) -> None:
        """Count an answered caption."""
        if record.defect is not None:
            self._defects.labels(record.defect).inc()
        if record.retried is not None:
            self._retries.labels(record.retried, "kept" if record.defect else "cured").inc()
