"""Processes report that they live, once for all their open records; the records' progress stays in their journals."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "ledger_replicas",
        sa.Column("replica", sa.String(128), nullable=False),
        sa.Column("reported_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("replica", name="pk_ledger_replicas"),
    )
