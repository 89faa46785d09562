"""Statuses of batches, and the change by which callers and administrators cancel one."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from serving.tenancy.ledger.usage_record import now_ms
from serving.tenancy.schema import batches

if TYPE_CHECKING:
    import sqlalchemy as sa

_BATCHES = batches.c


class BatchStatus(enum.StrEnum):
    """OpenAI's statuses of a batch."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


UNFINISHED = tuple(
    status.value
    for status in (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS, BatchStatus.FINALIZING, BatchStatus.CANCELLING)
)
"""Statuses of batches that have not ended."""


def cancellation(batch_id: str) -> sa.Update:
    """Return the statement that begins to cancel a batch, if it can be."""
    cancellable = (BatchStatus.VALIDATING.value, BatchStatus.IN_PROGRESS.value)
    changed = {"status": BatchStatus.CANCELLING.value, "cancelling_at": now_ms()}
    return batches.update().where(_BATCHES.id == batch_id, _BATCHES.status.in_(cancellable)).values(changed)
