"""Administration of tenants, keys, plans and prices in the database, for the command line and the HTTP API.

Each change is one transaction, which locks `store_state`, changes rows and writes the audit log: changes wait for each
other. Triggers raise the revision, which shows every replica within `key_refresh_s` that there is a change.
"""

from __future__ import annotations

import re
import secrets
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from serving.observability.metrics import OTHER_TENANTS, UNKNOWN_TENANT
from serving.tenancy import schema
from serving.tenancy.admin.validation import (
    MOST,
    NAME_CHARACTERS,
    InvalidChangeError,
    checked_limits,
    checked_name,
    decimal,
    plan_changes,
    shown_batch,
    shown_key,
    shown_plan,
    shown_price,
    shown_tenant,
    tenant_changes,
)
from serving.tenancy.batch_table import cancellation
from serving.tenancy.billing import prices, sums
from serving.tenancy.key_hashing import PREFIX_CHARACTERS, make_key
from serving.tenancy.ledger.usage_record import now_ms
from serving.tenancy.plans import State
from serving.types import Region

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from serving.tenancy.key_hashing import Pepper

    Shown = dict[str, Any]

_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


class NotFoundError(LookupError):
    """A tenant, key or plan that does not exist."""


@dataclass(frozen=True, slots=True)
class Administration:
    """The operations. `actor`: name of the caller in the audit log."""

    database: sa.Engine
    pepper: Pepper
    actor: str

    # ---- tenants

    def tenants(self) -> list[Shown]:
        """List all tenants."""
        return self._all(schema.tenants, schema.tenants.c.id, shown_tenant)

    def tenant(self, tenant_id: str) -> Shown:
        """Return a tenant. Raises `NotFoundError`."""
        with self.database.connect() as connection:
            return shown_tenant(_one(connection, schema.tenants, schema.tenants.c.id, tenant_id))

    def create_tenant(
        self, tenant_id: str, *, region: str = Region.BEIJING, plan: str = "standard", **own: Any
    ) -> Shown:
        """Make an active tenant; `own` as for `change_tenant`. Raises `InvalidChangeError`, `NotFoundError`."""
        if not _ID.fullmatch(tenant_id):
            raise InvalidChangeError("a tenant's id has lower-case letters, digits and hyphens, 63 at most")
        if tenant_id in {OTHER_TENANTS, UNKNOWN_TENANT}:
            raise InvalidChangeError(f"a tenant's id is not {tenant_id}: metrics use this word for several tenants")
        if region not in set(Region):
            raise InvalidChangeError(f"region: {region} is none of {', '.join(Region)}")
        at = now_ms()
        row = {
            "id": tenant_id,
            "name": tenant_id,
            "region": region,
            "state": State.ACTIVE.value,
            "plan": plan,
            "limits": {},
            "free_tokens": None,
            "free_days": None,
            "free_only": False,
            "log_content": False,
            "created_at": at,
            "activated_at": at,
        } | tenant_changes(own, {})
        with self._change("tenants.create", tenant_id) as (connection, entry):
            _one(connection, schema.plans, schema.plans.c.name, row["plan"])
            if connection.scalar(sa.select(schema.tenants.c.id).where(schema.tenants.c.id == tenant_id)):
                raise InvalidChangeError(f"there is a tenant {tenant_id} already")
            connection.execute(schema.tenants.insert(), row)
            entry.after = shown_tenant(row)
        return entry.after

    def change_tenant(self, tenant_id: str, **changes: Any) -> Shown:
        """Change some of `name`, `plan`, `state`, `limits`, `free_tokens`, `free_days`, `free_only`, `log_content`.

        Of `limits` only the named ones change; `None` lifts a limit, "plan" leaves it to the plan. Raises
        `InvalidChangeError`, `NotFoundError`.
        """
        with self._change("tenants.set", tenant_id) as (connection, entry):
            row = _one(connection, schema.tenants, schema.tenants.c.id, tenant_id)
            values = tenant_changes(changes, row["limits"])
            if "plan" in values:
                _one(connection, schema.plans, schema.plans.c.name, values["plan"])
            if values:
                connection.execute(schema.tenants.update().where(schema.tenants.c.id == tenant_id), values)
            entry.before, entry.after = shown_tenant(row), shown_tenant({**row, **values})
        return entry.after

    # ---- keys

    def keys(self, tenant_id: str | None = None) -> list[Shown]:
        """List all keys, or a tenant's, revoked and expired keys included. Raises `NotFoundError`."""
        if tenant_id is not None:
            self.tenant(tenant_id)
        found = self._all(schema.keys, schema.keys.c.created_at, shown_key)
        return [key for key in found if tenant_id in {None, key["tenant"]}]

    def create_key(
        self, tenant_id: str, *, name: str = "", expires_at: int | None = None, limits: Mapping[str, Any] | None = None
    ) -> tuple[Shown, str]:
        """Make a key, valid at once and until `expires_at` (ms since the epoch); return the key and its secret.

        The secret is stored nowhere: it is returned this once. Raises `InvalidChangeError`, `NotFoundError`.
        """
        with self._change("keys.create", tenant_id) as (connection, entry):
            _one(connection, schema.tenants, schema.tenants.c.id, tenant_id)
            row, secret = self._new_key(connection, tenant_id, name, expires_at, checked_limits(limits or {}, {}))
            entry.after = shown_key(row)
        return entry.after, secret

    def rotate_key(self, key_id: str, *, overlap_s: float = 24 * 3600) -> tuple[Shown, str]:
        """Replace a key by a new one and expire the old one after the overlap; return the new key and its secret.

        The new key has the name, limits and expiry of the old one. Raises `InvalidChangeError`, `NotFoundError`.
        """
        if not 0 <= overlap_s <= 366 * 24 * 3600:
            raise InvalidChangeError(f"overlap_s: from 0 to 31622400 (a year), not {overlap_s}")
        with self._change("keys.rotate", key_id) as (connection, entry):
            old = _one(connection, schema.keys, schema.keys.c.id, key_id)
            at = now_ms()
            if old["revoked_at"] is not None or (old["expires_at"] is not None and old["expires_at"] <= at):
                raise InvalidChangeError("the key is not valid any more: create another key")
            if old["replaced_by"] is not None:
                raise InvalidChangeError(f"the key has been rotated already: {old['replaced_by']} took its place")
            row, secret = self._new_key(connection, old["tenant_id"], old["name"], old["expires_at"], old["limits"])
            ends_at = min(at + round(overlap_s * 1000), old["expires_at"] or MOST)
            ending = {"expires_at": ends_at, "replaced_by": row["id"]}
            connection.execute(schema.keys.update().where(schema.keys.c.id == key_id), ending)
            entry.before, entry.after = shown_key({**old, **ending}), shown_key(row)
        return entry.after, secret

    def revoke_key(self, key_id: str) -> Shown:
        """Revoke a key now, for good; a second time changes nothing. Raises `NotFoundError`."""
        with self._change("keys.revoke", key_id) as (connection, entry):
            row = _one(connection, schema.keys, schema.keys.c.id, key_id)
            ended = {"revoked_at": row["revoked_at"] or now_ms()}
            connection.execute(schema.keys.update().where(schema.keys.c.id == key_id), ended)
            entry.before, entry.after = shown_key(row), shown_key({**row, **ended})
        return entry.after

    def revoke_all_keys(self) -> Shown:
        """Revoke every key now, for good; the next key may then be made under another pepper."""
        keys = schema.keys
        with self._change("keys.revoke-all", "all") as (connection, entry):
            valid = keys.update().where(keys.c.revoked_at.is_(None))
            entry.after = {"revoked": connection.execute(valid, {"revoked_at": now_ms()}).rowcount}
            connection.execute(schema.store_state.update(), {"pepper_check": None})
        return entry.after

    def _new_key(
        self,
        connection: sa.Connection,
        tenant_id: str,
        name: str,
        expires_at: int | None,
        limits: Mapping[str, int | None],
    ) -> tuple[Shown, str]:
        at, secret = now_ms(), make_key()
        if expires_at is not None and expires_at <= at:
            raise InvalidChangeError("the key would have expired already")
        self._claim_pepper(connection)
        row = {
            "id": f"key-{secrets.token_hex(6)}",
            "tenant_id": tenant_id,
            "name": checked_name(name),
            "digest": self.pepper.digest(secret),
            "prefix": secret[:PREFIX_CHARACTERS],
            "limits": dict(limits),
            "created_at": at,
            "expires_at": expires_at,
            "revoked_at": None,
            "replaced_by": None,
        }
        connection.execute(schema.keys.insert(), row)
        return row, secret

    def _claim_pepper(self, connection: sa.Connection) -> None:
        """Hold all keys of a database to one pepper: a key made under another would never be found."""
        state = schema.store_state
        known = connection.scalar(sa.select(state.c.pepper_check))
        if known is None:
            connection.execute(state.update(), {"pepper_check": self.pepper.check})
        elif known != self.pepper.check:
            raise InvalidChangeError("key_pepper is not the one under which the keys in this database were hashed")

    # ---- plans and prices

    def plans(self) -> list[Shown]:
        """List all plans."""
        return self._all(schema.plans, schema.plans.c.name, shown_plan)

    def set_plan(self, name: str, **changes: Any) -> Shown:
        """Change some values of a plan, a column each: `weight`, `priority`, `tenant_limits`, `batch_price_percent` ….

        A plan that does not exist is made, without limits. Raises `InvalidChangeError`.
        """
        if not _ID.fullmatch(name):
            raise InvalidChangeError("a plan's name has lower-case letters, digits and hyphens, 63 at most")
        with self._change("plans.set", name) as (connection, entry):
            query = sa.select(*schema.values(schema.plans)).where(schema.plans.c.name == name)
            rows = connection.execute(query).mappings().all()
            before: Mapping[Any, Any] = rows[0] if rows else _NEW_PLAN | {"name": name}
            values = plan_changes(changes, before)
            if rows:
                entry.before = shown_plan(before)
                if values:
                    connection.execute(schema.plans.update().where(schema.plans.c.name == name), values)
            else:
                connection.execute(schema.plans.insert(), {**before, **values})
            entry.after = shown_plan({**before, **values})
        return entry.after

    def prices(self) -> list[Shown]:
        """List all prices of each region, the earlier first."""
        return self._all(schema.prices, (schema.prices.c.region, schema.prices.c.valid_from), shown_price)

    def set_price(self, region: str, *, currency: str, input_price: Any, output_price: Any, valid_from: int) -> Shown:
        """Set prices per 1,000 tokens from `valid_from` on (ms since the epoch). Billed amounts do not change.

        Raises `InvalidChangeError`, also for a time in the past.
        """
        if region not in set(Region):
            raise InvalidChangeError(f"region: {region} is none of {', '.join(Region)}")
        if not re.fullmatch(r"[A-Z]{3}", currency):
            raise InvalidChangeError("currency: three capital letters, such as CNY")
        if valid_from < now_ms() - 60_000:
            raise InvalidChangeError(
                "valid_from: must not lie in the past, since a price cannot change what was billed"
            )
        try:
            price = prices.Price.of(currency, decimal(input_price), decimal(output_price))
        except ValueError as error:
            raise InvalidChangeError(str(error)) from None
        table = schema.prices
        row = prices.row(Region(region), valid_from, price)
        with self._change("prices.set", region) as (connection, entry):
            # Not deleted: a deleted row would make every process read all rows.
            same = table.update().where(table.c.region == region, table.c.valid_from == valid_from)
            if not connection.execute(same, row).rowcount:
                connection.execute(table.insert(), row)
            entry.after = shown_price(row)
        return entry.after

    # ---- batches

    def batches(self, *, tenant: str | None = None, status: str | None = None, limit: int = 100) -> list[Shown]:
        """List batches, the latest first, of one tenant or with one status."""
        table = schema.batches
        query = sa.select(table).order_by(table.c.created_at.desc(), table.c.id).limit(limit)
        for column, value in ((table.c.tenant_id, tenant), (table.c.status, status)):
            query = query if value is None else query.where(column == value)
        with self.database.connect() as connection:
            return [shown_batch(row, brief=True) for row in connection.execute(query).mappings()]

    def batch(self, batch_id: str) -> Shown:
        """Return a batch. Raises `NotFoundError`."""
        with self.database.connect() as connection:
            return shown_batch(_one(connection, schema.batches, schema.batches.c.id, batch_id))

    def cancel_batch(self, batch_id: str) -> Shown:
        """Begin to cancel a batch. Raises `NotFoundError`, and `InvalidChangeError` if it has ended."""
        with self._change("batches.cancel", batch_id) as (connection, entry):
            row = _one(connection, schema.batches, schema.batches.c.id, batch_id)
            if not connection.execute(cancellation(batch_id)).rowcount:
                raise InvalidChangeError(f"a batch with the status {row['status']} cannot be cancelled")
            entry.before = {"status": row["status"]}
            entry.after = {"status": "cancelling"}
        return self.batch(batch_id)

    # ---- sums

    def check_sums(self) -> Shown:
        """Compare the kept sums of usage with all records; return the numbers of sums and of different ones."""
        return sums.check(self.database)

    def rebuild_sums(self) -> Shown:
        """Compute the kept sums of usage from all records; return their number and that of the corrected ones."""
        with self._change("sums.rebuild", "usage") as (connection, entry):
            entry.after = sums.rebuild(connection)
        return entry.after

    # ---- audit log

    def audit(self, *, subject: str | None = None, limit: int = 100) -> list[Shown]:
        """List the latest changes, the last one first."""
        log = schema.audit_log
        query = sa.select(log).order_by(log.c.id.desc()).limit(limit)
        if subject is not None:
            query = query.where(log.c.subject == subject)
        with self.database.connect() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    # ---- common

    def _all(self, table: sa.Table, order: Any, shown: Any) -> list[Shown]:
        query = sa.select(*schema.values(table)).order_by(*(order if isinstance(order, tuple) else (order,)))
        with self.database.connect() as connection:
            return [shown(row) for row in connection.execute(query).mappings()]

    @contextmanager
    def _change(self, action: str, subject: str) -> Iterator[tuple[sa.Connection, _AuditEntry]]:
        state, entry = schema.store_state, _AuditEntry()
        with self.database.begin() as connection:
            connection.execute(state.update().values(revision=state.c.revision))  # locks the row
            yield connection, entry
            row = {"at": now_ms(), "actor": self.actor[:NAME_CHARACTERS], "action": action, "subject": subject}
            connection.execute(schema.audit_log.insert(), row | {"before": entry.before, "after": entry.after})


@dataclass(slots=True)
class _AuditEntry:
    """The subject of a change before and after it, for the audit log."""

    before: Shown | None = None
    after: Shown = None  # type: ignore[assignment]  # every change sets it


_NEW_PLAN = {
    "weight": 1.0,
    "priority": 0,
    "tenant_limits": {},
    "key_limits": {},
    "free_tokens": 0,
    "free_days": 0,
    "batch_price_percent": 100,
}


def _one(connection: sa.Connection, table: sa.Table, column: Any, value: str) -> Mapping[Any, Any]:
    row = connection.execute(sa.select(*schema.values(table)).where(column == value)).mappings().first()
    if row is None:
        raise NotFoundError(
            f"there is no {table.name.removesuffix('es' if table is schema.batches else 's')} {value!r}"
        )
    return row
