"""Rows of plans, tenants, keys and prices in this process, and reads of those that have changed.

Triggers number the changes (migrations/access_triggers.py): a process that has seen the change N reads the rows with a
larger number. Numbers are committed in their order, so no change can appear behind a process that has passed it, and
no clock decides what is read.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from serving.tenancy import schema

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    Row = Mapping[Any, Any]

_STATE = schema.store_state.c
_KEYS = schema.keys.c
_KEY_COLUMNS = (_KEYS.id, _KEYS.tenant_id, _KEYS.digest, _KEYS.limits, _KEYS.expires_at, _KEYS.revoked_at)


@dataclass(frozen=True, slots=True)
class AccessRows:
    """All plans, tenants and prices, and the keys that were valid when they were read. `revision`: the last change."""

    revision: int = -1
    plans: Mapping[str, Row] = field(default_factory=dict)
    tenants: Mapping[str, Row] = field(default_factory=dict)
    keys: Mapping[str, Row] = field(default_factory=dict)
    prices: Mapping[tuple[str, int], Row] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Changes:
    """Rows after a read, and what differs from those before. `everything`: all rows were read."""

    rows: AccessRows
    everything: bool
    keys: frozenset[str]
    """Ids of the keys that were read, or whose tenant or plan was."""
    rows_read: int


@dataclass(frozen=True, slots=True)
class StoreState:
    """The row of `store_state`."""

    revision: int
    reread_revision: int
    pepper_check: str | None


def read_state(connection: sa.Connection) -> StoreState:
    """Read the number of the last change."""
    row = connection.execute(sa.select(_STATE.revision, _STATE.reread_revision, _STATE.pepper_check)).one()
    return StoreState(row.revision, row.reread_revision, row.pepper_check)


def read(connection: sa.Connection, state: StoreState, known: AccessRows) -> Changes:
    """Read what has changed since `known`, in the transaction that has read `state`.

    All rows are read by a process that knows none, after a row was deleted, and if the number of the last change is
    smaller than the known one: the database was restored from a backup.
    """
    everything = known.revision < 0 or not state.reread_revision <= known.revision <= state.revision
    after, base = (-1, AccessRows()) if everything else (known.revision, known)
    plans = {row["name"]: row for row in _changed(connection, schema.plans, after)}
    tenants = {row["id"]: row for row in _changed(connection, schema.tenants, after)}
    prices = {(row["region"], row["valid_from"]): row for row in _changed(connection, schema.prices, after)}
    query = sa.select(*_KEY_COLUMNS).where(_KEYS.revision > after)
    if everything:
        query = query.where(_KEYS.revoked_at.is_(None), _KEYS.expires_at.is_(None) | (_KEYS.expires_at > _now_ms()))
    keys = {row["id"]: row for row in connection.execute(query).mappings()}
    rows = AccessRows(
        state.revision,
        {**base.plans, **plans},
        {**base.tenants, **tenants},
        {name: row for name, row in {**base.keys, **keys}.items() if row["revoked_at"] is None},
        {**base.prices, **prices},
    )
    touched = tenants.keys() | {name for name, row in rows.tenants.items() if row["plan"] in plans}
    affected = keys.keys() | {name for name, row in base.keys.items() if row["tenant_id"] in touched}
    return Changes(rows, everything, frozenset(affected), len(plans) + len(tenants) + len(prices) + len(keys))


def _changed(connection: sa.Connection, table: sa.Table, after: int) -> Iterator[Row]:
    query = sa.select(*schema.values(table)).where(table.c.revision > after)
    return iter(connection.execute(query).mappings())


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
