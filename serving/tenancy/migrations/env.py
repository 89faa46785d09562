"""Script that Alembic runs, on the caller's connection: in a transaction under the migration lock."""

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
