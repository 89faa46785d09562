"""The first tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "audit_log",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("actor", sa.String(128), nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("subject", sa.String(128), nullable=False),
        sa.Column("before", sa.JSON()),
        sa.Column("after", sa.JSON()),
        sa.PrimaryKeyConstraint("id", name="pk_audit_log"),
    )
    op.create_index("ix_audit_log_subject", "audit_log", ["subject"])

    op.create_table(
        "plans",
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("weight", sa.Float(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("tenant_limits", sa.JSON(), nullable=False),
        sa.Column("key_limits", sa.JSON(), nullable=False),
        sa.Column("free_tokens", sa.BigInteger(), nullable=False),
        sa.Column("free_days", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_plans"),
    )
    op.create_table(
        "prices",
        sa.Column("region", sa.String(16), nullable=False),
        sa.Column("valid_from", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.String(3), nullable=False),
        sa.Column("input_nanos", sa.BigInteger(), nullable=False),
        sa.Column("output_nanos", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("region", "valid_from", name="pk_prices"),
    )
    op.create_table(
        "store_state",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("pepper_check", sa.String(64)),
        sa.PrimaryKeyConstraint("id", name="pk_store_state"),
    )
    op.create_table(
        "usage_records",
        sa.Column("request_id", sa.String(64), nullable=False),
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("region", sa.String(16), nullable=False),
        sa.Column("dialect", sa.String(16), nullable=False),
        sa.Column("model", sa.String(128), nullable=False),
        sa.Column("stream", sa.Boolean(), nullable=False),
        sa.Column("audio_form", sa.String(16), nullable=False),
        sa.Column("replica", sa.String(128), nullable=False),
        sa.Column("opened_at", sa.BigInteger(), nullable=False),
        sa.Column("reported_at", sa.BigInteger(), nullable=False),
        sa.Column("prepared_at", sa.BigInteger()),
        sa.Column("first_token_at", sa.BigInteger()),
        sa.Column("closed_at", sa.BigInteger()),
        sa.Column("audio_ms", sa.BigInteger(), nullable=False),
        sa.Column("input_tokens", sa.BigInteger(), nullable=False),
        sa.Column("output_tokens", sa.BigInteger(), nullable=False),
        sa.Column("engine_input_tokens", sa.BigInteger(), nullable=False),
        sa.Column("engine_output_tokens", sa.BigInteger(), nullable=False),
        sa.Column("ending", sa.String(32)),
        sa.Column("finish_reason", sa.String(16)),
        sa.Column("billed", sa.Boolean(), nullable=False),
        sa.Column("free_tokens", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.String(3), nullable=False),
        sa.Column("input_price", sa.String(32), nullable=False),
        sa.Column("output_price", sa.String(32), nullable=False),
        sa.Column("amount_nanos", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("request_id", name="pk_usage_records"),
    )
    op.create_index("ix_usage_records_key_id_opened_at", "usage_records", ["key_id", "opened_at"])
    op.create_index(
        "ix_usage_records_open",
        "usage_records",
        ["replica"],
        sqlite_where=sa.text("ending IS NULL"),
        postgresql_where=sa.text("ending IS NULL"),
    )
    op.create_index("ix_usage_records_tenant_id_opened_at", "usage_records", ["tenant_id", "opened_at"])

    op.create_table(
        "tenants",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("region", sa.String(16), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("plan", sa.String(128), nullable=False),
        sa.Column("limits", sa.JSON(), nullable=False),
        sa.Column("free_tokens", sa.BigInteger()),
        sa.Column("free_days", sa.Integer()),
        sa.Column("free_only", sa.Boolean(), nullable=False),
        sa.Column("log_content", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("activated_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["plan"], ["plans.name"], name="fk_tenants_plan"),
        sa.PrimaryKeyConstraint("id", name="pk_tenants"),
    )
    op.create_table(
        "keys",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("prefix", sa.String(16), nullable=False),
        sa.Column("limits", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger()),
        sa.Column("revoked_at", sa.BigInteger()),
        sa.Column("replaced_by", sa.String(64)),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_keys_tenant_id"),
        sa.PrimaryKeyConstraint("id", name="pk_keys"),
        sa.UniqueConstraint("digest", name="uq_keys_digest"),
    )
    op.create_index("ix_keys_tenant_id", "keys", ["tenant_id"])

    plans = sa.table(
        "plans",
        *(sa.column(name) for name in ("name", "weight", "priority", "free_tokens", "free_days")),
        sa.column("tenant_limits", sa.JSON),
        sa.column("key_limits", sa.JSON),
    )
    published = {"requests_per_minute": 60, "tokens_per_minute": 100_000}
    op.bulk_insert(
        plans,
        [
            {
                "name": "standard",
                "weight": 1.0,
                "priority": 0,
                "tenant_limits": published,
                "key_limits": {},
                "free_tokens": 1_000_000,
                "free_days": 90,
            },
            {
                "name": "unlimited",
                "weight": 1.0,
                "priority": 0,
                "tenant_limits": {},
                "key_limits": {},
                "free_tokens": 0,
                "free_days": 0,
            },
        ],
    )
    op.bulk_insert(sa.table("store_state", sa.column("id"), sa.column("revision")), [{"id": 1, "revision": 1}])
