"""The tables. Each change of them is a migration in `migrations/versions`; a test holds the two equal.

Times are milliseconds since the epoch, UTC. Money is integer nano-units (1e-9) of the record's currency, so that sums
are exact in SQL too.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from serving.tenancy.migrations import access_triggers, usage_triggers

metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
    }
)

_ID = sa.String(64)
_NAME = sa.String(128)


def _revision() -> sa.Column[int]:
    """Return the column for the number of a row's last change, which a trigger sets."""
    return sa.Column("revision", sa.BigInteger, nullable=False, server_default="0")


store_state = sa.Table(
    "store_state",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("pepper_check", sa.String(64)),
    sa.Column("reread_revision", sa.BigInteger, nullable=False, server_default="0"),
)
"""One row. Triggers raise `revision` with each change of plans, tenants, keys and prices, and `reread_revision` when a
row is deleted. `pepper_check` shows whether a process has the pepper under which keys were hashed."""

plans = sa.Table(
    "plans",
    metadata,
    sa.Column("name", _NAME, primary_key=True),
    sa.Column("weight", sa.Float, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("tenant_limits", sa.JSON, nullable=False),
    sa.Column("key_limits", sa.JSON, nullable=False),
    sa.Column("free_tokens", sa.BigInteger, nullable=False),
    sa.Column("free_days", sa.Integer, nullable=False),
    sa.Column("batch_price_percent", sa.Integer, nullable=False, server_default="100"),
    _revision(),
)
"""`batch_price_percent`: price of a token in a batch, in percent of the list price."""

tenants = sa.Table(
    "tenants",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("name", _NAME, nullable=False),
    sa.Column("region", sa.String(16), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("plan", _NAME, sa.ForeignKey(plans.c.name), nullable=False),
    sa.Column("limits", sa.JSON, nullable=False),
    sa.Column("free_tokens", sa.BigInteger),
    sa.Column("free_days", sa.Integer),
    sa.Column("free_only", sa.Boolean, nullable=False),
    sa.Column("log_content", sa.Boolean, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("activated_at", sa.BigInteger, nullable=False),
    _revision(),
    sa.Index(None, "revision"),
)
"""`limits`, `free_tokens`, `free_days`: overrides of the plan."""

keys = sa.Table(
    "keys",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("tenant_id", _ID, sa.ForeignKey(tenants.c.id), nullable=False, index=True),
    sa.Column("name", _NAME, nullable=False),
    sa.Column("digest", sa.String(64), nullable=False, unique=True),
    sa.Column("prefix", sa.String(16), nullable=False),
    sa.Column("limits", sa.JSON, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("expires_at", sa.BigInteger),
    sa.Column("revoked_at", sa.BigInteger),
    sa.Column("replaced_by", _ID),
    _revision(),
    sa.Index(None, "revision"),
)
"""`digest`: HMAC-SHA256 of the key under the pepper, in hexadecimal digits. `prefix`: the key's first characters."""

prices = sa.Table(
    "prices",
    metadata,
    sa.Column("region", sa.String(16), primary_key=True),
    sa.Column("valid_from", sa.BigInteger, primary_key=True),
    sa.Column("currency", sa.String(3), nullable=False),
    sa.Column("input_nanos", sa.BigInteger, nullable=False),
    sa.Column("output_nanos", sa.BigInteger, nullable=False),
    _revision(),
)
"""Prices in nano-units per token."""

audit_log = sa.Table(
    "audit_log",
    metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("at", sa.BigInteger, nullable=False),
    sa.Column("actor", _NAME, nullable=False),
    sa.Column("action", sa.String(64), nullable=False),
    sa.Column("subject", _NAME, nullable=False, index=True),
    sa.Column("before", sa.JSON),
    sa.Column("after", sa.JSON),
)
"""Changes by administrators: actor, action, subject, time, values before and after. Rows are only added."""

usage_records = sa.Table(
    "usage_records",
    metadata,
    sa.Column("request_id", _ID, primary_key=True),
    sa.Column("tenant_id", _ID, nullable=False),
    sa.Column("key_id", _ID, nullable=False),
    sa.Column("region", sa.String(16), nullable=False),
    sa.Column("dialect", sa.String(16), nullable=False),
    sa.Column("model", _NAME, nullable=False),
    sa.Column("stream", sa.Boolean, nullable=False),
    sa.Column("audio_form", sa.String(16), nullable=False),
    sa.Column("replica", _NAME, nullable=False),
    sa.Column("opened_at", sa.BigInteger, nullable=False),
    sa.Column("reported_at", sa.BigInteger, nullable=False),
    sa.Column("prepared_at", sa.BigInteger),
    sa.Column("first_token_at", sa.BigInteger),
    sa.Column("closed_at", sa.BigInteger),
    sa.Column("audio_ms", sa.BigInteger, nullable=False),
    sa.Column("input_tokens", sa.BigInteger, nullable=False),
    sa.Column("output_tokens", sa.BigInteger, nullable=False),
    sa.Column("engine_input_tokens", sa.BigInteger, nullable=False),
    sa.Column("engine_output_tokens", sa.BigInteger, nullable=False),
    sa.Column("ending", sa.String(32)),
    sa.Column("finish_reason", sa.String(16)),
    sa.Column("billed", sa.Boolean, nullable=False),
    sa.Column("free_tokens", sa.BigInteger, nullable=False),
    sa.Column("currency", sa.String(3), nullable=False),
    sa.Column("input_price", sa.String(32), nullable=False),
    sa.Column("output_price", sa.String(32), nullable=False),
    sa.Column("amount_nanos", sa.BigInteger, nullable=False),
    sa.Index(None, "tenant_id", "opened_at"),
    sa.Index(None, "key_id", "opened_at"),
    sa.Index(
        "ix_usage_records_open",
        "replica",
        sqlite_where=sa.text("ending IS NULL"),
        postgresql_where=sa.text("ending IS NULL"),
    ),
)
"""One row for each admitted request. `ending`, its outcome, is null while it runs. Tenants and keys are named, not
referenced: a record stays true after they are gone. Prices are per 1,000 tokens, as written in the price list."""

files = sa.Table(
    "files",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("tenant_id", _ID, nullable=False),
    sa.Column("purpose", sa.String(16), nullable=False),
    sa.Column("filename", sa.String(255), nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("expires_at", sa.BigInteger, nullable=False, index=True),
    sa.Index(None, "tenant_id", "created_at"),
)
"""Files of `/v1/files`. Their bytes are in the object store, or in the directory of files, under the id."""

batches = sa.Table(
    "batches",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("tenant_id", _ID, nullable=False),
    sa.Column("key_id", _ID, nullable=False),
    sa.Column("endpoint", sa.String(64), nullable=False),
    sa.Column("input_file_id", _ID, nullable=False),
    sa.Column("output_file_id", _ID),
    sa.Column("error_file_id", _ID),
    sa.Column("completion_window", sa.String(8), nullable=False),
    sa.Column("output_ttl_s", sa.BigInteger),
    sa.Column("metadata", sa.JSON),
    sa.Column("model", _NAME),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("errors", sa.JSON),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("in_progress_at", sa.BigInteger),
    sa.Column("expires_at", sa.BigInteger),
    sa.Column("finalizing_at", sa.BigInteger),
    sa.Column("completed_at", sa.BigInteger),
    sa.Column("failed_at", sa.BigInteger),
    sa.Column("expired_at", sa.BigInteger),
    sa.Column("cancelling_at", sa.BigInteger),
    sa.Column("cancelled_at", sa.BigInteger),
    sa.Column("total", sa.Integer, nullable=False),
    sa.Column("completed", sa.Integer, nullable=False),
    sa.Column("failed", sa.Integer, nullable=False),
    sa.Column("input_tokens", sa.BigInteger, nullable=False),
    sa.Column("output_tokens", sa.BigInteger, nullable=False),
    sa.Column("amount_nanos", sa.BigInteger, nullable=False),
    sa.Column("currency", sa.String(3)),
    sa.Column("lease_owner", _NAME),
    sa.Column("lease_until", sa.BigInteger, nullable=False),
    sa.Index(None, "tenant_id", "created_at"),
    sa.Index(None, "status", "created_at"),
)
"""Batches of `/v1/batches`. `total`, `completed` and `failed` count lines; tokens and amount are sums of the lines'
usage records that are billed. The process that works on a batch holds its lease until `lease_until`."""

batch_lines = sa.Table(
    "batch_lines",
    metadata,
    sa.Column("batch_id", _ID, primary_key=True),
    sa.Column("line", sa.Integer, primary_key=True),
    sa.Column("custom_id", sa.Text, nullable=False),
    sa.Column("offset", sa.BigInteger, nullable=False),
    sa.Column("length", sa.Integer, nullable=False),
    sa.Column("outcome", sa.String(16)),
    sa.Column("status_code", sa.Integer),
    sa.Column("body", sa.Text),
)
"""Lines of the input file of each unfinished batch: the bytes of a line in the file, and its result. `outcome` is null
until the line has one: `completed`, or `failed`. Rows are removed once the output files are stored."""

idempotent_answers = sa.Table(
    "idempotent_answers",
    metadata,
    sa.Column("tenant_id", _ID, primary_key=True),
    sa.Column("key_digest", sa.String(64), primary_key=True),
    sa.Column("request_digest", sa.String(64), nullable=False),
    sa.Column("owner", sa.String(32), nullable=False),
    sa.Column("lease_until", sa.BigInteger, nullable=False),
    sa.Column("expires_at", sa.BigInteger, nullable=False, index=True),
    sa.Column("headers", sa.JSON),
    sa.Column("body", sa.LargeBinary),
)
"""Answers of requests with an `Idempotency-Key`. While the request runs, `body` is null, and `owner` renews the lease;
afterwards the answer stays until `expires_at`."""

usage_days = sa.Table(
    "usage_days",
    metadata,
    sa.Column("day", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("tenant_id", _ID, primary_key=True),
    sa.Column("key_id", _ID, primary_key=True),
    sa.Column("region", sa.String(16), primary_key=True),
    sa.Column("currency", sa.String(3), primary_key=True),
    sa.Column("input_price", sa.String(32), primary_key=True),
    sa.Column("output_price", sa.String(32), primary_key=True),
    sa.Column("requests", sa.BigInteger, nullable=False),
    sa.Column("open_requests", sa.BigInteger, nullable=False),
    sa.Column("billed_requests", sa.BigInteger, nullable=False),
    sa.Column("audio_ms", sa.BigInteger, nullable=False),
    sa.Column("input_tokens", sa.BigInteger, nullable=False),
    sa.Column("output_tokens", sa.BigInteger, nullable=False),
    sa.Column("free_tokens", sa.BigInteger, nullable=False),
    sa.Column("amount_units", sa.BigInteger, nullable=False),
    sa.Column("amount_nanos", sa.BigInteger, nullable=False),
    sa.Index(None, "tenant_id", "day"),
    sa.Index(None, "key_id", "day"),
)
"""Sums of `usage_records`, which triggers keep equal to the rows. `day`: days since the epoch, UTC, of the admission.
Tokens and amounts are those billed; requests and audio are those of all records. An amount is `amount_units` whole
units of the currency and `amount_nanos` nano-units, which may be more than a unit."""

ledger_replicas = sa.Table(
    "ledger_replicas",
    metadata,
    sa.Column("replica", _NAME, primary_key=True),
    sa.Column("reported_at", sa.BigInteger, nullable=False),
)
"""Processes with open records, and when each was last known to live, by the database's clock."""


def values(table: sa.Table) -> list[sa.Column[Any]]:
    """Return the columns of a table without the number of the last change, which no answer has."""
    return [column for column in table.c if column.name != "revision"]


@sa.event.listens_for(metadata, "after_create")
def _create_triggers(_: Any, connection: sa.Connection, **__: Any) -> None:
    """Make the triggers where tables are made without migrations."""
    dialect = connection.dialect.name
    for statement in (*access_triggers.statements(dialect), *usage_triggers.statements(dialect)):
        connection.exec_driver_sql(statement)
