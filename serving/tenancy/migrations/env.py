"""Migration environment of Alembic. The caller passes its connection, within a transaction that holds a lock."""

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
