"""Sums of usage by day, key and price are kept, so that budgets, reports and invoices need not read all records."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from serving.tenancy.migrations import usage_triggers

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Make the table and the triggers that keep it, and fill it from the records that exist."""
    sums = ("requests", "open_requests", "billed_requests", "audio_ms", "input_tokens", "output_tokens")
    op.create_table(
        "usage_days",
        sa.Column("day", sa.BigInteger(), nullable=False),
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("region", sa.String(16), nullable=False),
        sa.Column("currency", sa.String(3), nullable=False),
        sa.Column("input_price", sa.String(32), nullable=False),
        sa.Column("output_price", sa.String(32), nullable=False),
        *(
            sa.Column(name, sa.BigInteger(), nullable=False)
            for name in (*sums, "free_tokens", "amount_units", "amount_nanos")
        ),
        sa.PrimaryKeyConstraint(*usage_triggers.NAMES, name="pk_usage_days"),
    )
    op.create_index("ix_usage_days_tenant_id_day", "usage_days", ["tenant_id", "day"])
    op.create_index("ix_usage_days_key_id_day", "usage_days", ["key_id", "day"])
    connection = op.get_bind()
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET LOCAL statement_timeout = 0")  # ten million records take half a minute
    # The triggers first: to make them locks the records against writers until this transaction ends.
    for statement in usage_triggers.statements(connection.dialect.name):
        connection.exec_driver_sql(statement)
    connection.exec_driver_sql(usage_triggers.FILL)
