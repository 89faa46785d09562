"""Triggers that number the changes of plans, tenants, keys and prices, so that processes read only changed rows.

Used by the migration 0003 and by `schema.py`. These statements are never edited: a change of them is a migration with
other statements.

Each statement that changes one of the tables raises `store_state.revision`, and each row that it inserts or updates
gets the new number in its column `revision`. The row of `store_state` stays locked until the transaction ends, so
transactions with changes are committed in the order of their numbers, also those of the version before, and of an
operator by SQL. No clock is involved.

A row that is deleted, or that gets another id, leaves nothing to be found by its number: `store_state.reread_revision`
is the number of the last such change, and a process that has not read since then reads all rows.
"""

from __future__ import annotations

COLUMNS = {
    "plans": (
        "name",
        "weight",
        "priority",
        "tenant_limits",
        "key_limits",
        "free_tokens",
        "free_days",
        "batch_price_percent",
    ),
    "tenants": (
        "id",
        "name",
        "region",
        "state",
        "plan",
        "limits",
        "free_tokens",
        "free_days",
        "free_only",
        "log_content",
        "created_at",
        "activated_at",
    ),
    "keys": (
        "id",
        "tenant_id",
        "name",
        "digest",
        "prefix",
        "limits",
        "created_at",
        "expires_at",
        "revoked_at",
        "replaced_by",
    ),
    "prices": ("region", "valid_from", "currency", "input_nanos", "output_nanos"),
}
"""Columns whose change is a change of the row."""

_IDENTITY = {"plans": ("name",), "tenants": ("id",), "keys": ("id",), "prices": ("region", "valid_from")}

_REREAD = "UPDATE store_state SET revision = revision + 1, reread_revision = revision + 1;"

_POSTGRESQL_FUNCTIONS = (
    """
    CREATE FUNCTION access_changes() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
    BEGIN
        UPDATE store_state SET revision = revision + 1;
        RETURN NULL;
    END $$
    """,
    f"""
    CREATE FUNCTION access_removes() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
    BEGIN
        {_REREAD}
        RETURN NULL;
    END $$
    """,
    """
    CREATE FUNCTION access_numbers() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
    BEGIN
        NEW.revision := COALESCE((SELECT revision FROM store_state), 0);
        RETURN NEW;
    END $$
    """,
)


def statements(dialect: str) -> list[str]:
    """Return the statements that make the triggers, for `sqlite` or `postgresql`."""
    if dialect == "postgresql":
        return [*_POSTGRESQL_FUNCTIONS, *(each for table in COLUMNS for each in _of_postgresql(table))]
    return [each for table in COLUMNS for each in _of_sqlite(table)]


def _of_postgresql(table: str) -> list[str]:
    renamed = " OR ".join(f"OLD.{name} IS DISTINCT FROM NEW.{name}" for name in _IDENTITY[table])
    return [
        f"CREATE TRIGGER {table}_{event} {when} ON {table} FOR EACH {scope} EXECUTE FUNCTION {function}()"
        for event, when, scope, function in (
            ("changed", "BEFORE INSERT OR UPDATE", "STATEMENT", "access_changes"),
            ("numbered", "BEFORE INSERT OR UPDATE", "ROW", "access_numbers"),
            ("removed", "BEFORE DELETE OR TRUNCATE", "STATEMENT", "access_removes"),
            ("renamed", "AFTER UPDATE", f"ROW WHEN ({renamed})", "access_removes"),
        )
    ]


def _of_sqlite(table: str) -> list[str]:
    raise_revision = "UPDATE store_state SET revision = revision + 1;"
    last = "COALESCE((SELECT revision FROM store_state), 0)"
    number = f"UPDATE {table} SET revision = {last} WHERE rowid = NEW.rowid;"  # noqa: S608
    renamed = " OR ".join(f"OLD.{name} IS NOT NEW.{name}" for name in _IDENTITY[table])
    columns, identity = (", ".join(names[table]) for names in (COLUMNS, _IDENTITY))
    return [
        f"CREATE TRIGGER {table}_{event} AFTER {when} BEGIN {then} END"
        for event, when, then in (
            ("inserted", f"INSERT ON {table}", f"{raise_revision} {number}"),
            ("updated", f"UPDATE OF {columns} ON {table}", f"{raise_revision} {number}"),
            ("removed", f"DELETE ON {table}", _REREAD),
            ("renamed", f"UPDATE OF {identity} ON {table} WHEN {renamed}", _REREAD),
        )
    ]
