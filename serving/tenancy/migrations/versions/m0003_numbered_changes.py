"""Changes of plans, tenants, keys and prices are numbered, so that processes read only changed rows."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from serving.tenancy.migrations import access_triggers

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the numbers, and the triggers that set them. Rows from before have the number 0."""
    for table in ("plans", "tenants", "keys", "prices"):
        op.add_column(table, sa.Column("revision", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("store_state", sa.Column("reread_revision", sa.BigInteger(), nullable=False, server_default="0"))
    op.create_index("ix_tenants_revision", "tenants", ["revision"])
    op.create_index("ix_keys_revision", "keys", ["revision"])
    connection = op.get_bind()
    for statement in access_triggers.statements(connection.dialect.name):
        connection.exec_driver_sql(statement)
