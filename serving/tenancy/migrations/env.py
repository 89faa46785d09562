"""What Alembic runs. The caller hands its connection over, in a transaction that it holds a lock in."""

from __future__ import annotations

from alembic import context

from serving.tenancy.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    compare_type=True,
)
context.run_migrations()
