"""Authentication: keys are checked against a snapshot of the database in memory, which a background task refreshes.

After a change only the rows that have changed are read (access_rows.py).

A look-up is one HMAC and one dictionary access under its result: a wrong key takes as long as a valid one, and the time
does not depend on how much of it was right. While the database is away the last snapshot stays in use.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from serving.errors import AccessDenied, Arrearage, InvalidApiKey, MissingApiKey, NotReady
from serving.tenancy import access_rows, plans, schema
from serving.tenancy.access_rows import AccessRows
from serving.tenancy.billing import prices
from serving.tenancy.billing.prices import Price, PriceList
from serving.tenancy.database import UnusableDatabase
from serving.tenancy.key_hashing import Pepper, make_key
from serving.tenancy.plans import State
from serving.types import Caller, Region, SchedulingClass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from serving.config import Settings

log = logging.getLogger(__name__)

STATIC_TENANT, DEVELOPMENT_TENANT, ANONYMOUS = "default", "development", "anonymous"
"""Tenants of keys in the settings, of the key generated when there is none, and of callers without authentication."""

_UNLIMITED = {"weight": 1.0, "priority": 0, "tenant_limits": {}, "key_limits": {}, "free_tokens": 0, "free_days": 0}
_UNLIMITED |= {"batch_price_percent": 100}
_KEYS = schema.keys.c


@dataclass(frozen=True, slots=True)
class _Entry:
    caller: Caller
    state: State
    expires_at: float
    """Seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class _Snapshot:
    rows: AccessRows = field(default_factory=AccessRows)
    keys: Mapping[str, _Entry] = field(default_factory=dict)
    """Entries by the digest of the key."""
    by_id: Mapping[str, _Entry] = field(default_factory=dict)
    """The same entries by the id of the key."""
    prices: PriceList = field(default_factory=lambda: PriceList([]))


class Keyring:
    """Identifies callers by their keys, and has the prices."""

    def __init__(self, settings: Settings, database: sa.Engine) -> None:
        self._database = database
        self._pepper = Pepper.of(settings)
        self._region = Region(settings.region)
        self._auth = settings.auth
        self._refresh_s = settings.key_refresh_s
        self._static = {key.get_secret_value(): STATIC_TENANT for key in settings.api_keys}
        if settings.development_key is not None:
            self._static[settings.development_key.get_secret_value()] = DEVELOPMENT_TENANT
        self._snapshot = _Snapshot()
        self._checked_s = time.monotonic()
        self._refreshing: asyncio.Task[None] | None = None
        self.failures = 0
        """Number of refreshes in which the database did not answer."""
        self.failing = False
        """True if the last refresh failed."""
        self.rows_read = 0
        """Number of rows of plans, tenants, keys and prices that this process has read."""
        self.waiting_for: str | None = None
        """Resource that the start of keys, limits and ledger waits for; callers are refused until then."""

    @property
    def age_s(self) -> float:
        """Seconds since the snapshot was last known to equal the database."""
        return time.monotonic() - self._checked_s

    @property
    def nobody_has_a_key(self) -> bool:
        """True if a key is required and no key is valid, so that every request is refused."""
        return self._auth and not self._snapshot.keys

    async def start(self) -> None:
        """Read the tables, which must have been migrated; from then on, read them again after each change.

        Raises `UnusableDatabase` if keys were hashed under another pepper.
        """
        await asyncio.to_thread(self.refresh)
        self._refreshing = asyncio.create_task(self._refresh_forever())

    async def stop(self) -> None:
        """Stop refreshing. Idempotent."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.wait((self._refreshing,))
            self._refreshing = None

    def authenticate(self, headers: Mapping[str, str]) -> Caller:
        """Return the caller, identified by the `authorization` header alone. `headers` has lower-case names.

        Raises `NotReady` before the start has succeeded; `MissingApiKey`; `InvalidApiKey` if the key is unknown,
        expired, revoked or of the other region; `AccessDenied` if the tenant is suspended, `Arrearage` if it is in
        arrears.
        """
        if self.waiting_for is not None:
            raise NotReady
        scheme, _, key = headers.get("authorization", "").partition(" ")
        key = key.strip() if scheme.lower() == "bearer" else ""
        if not self._auth:
            return self._anonymous(key)
        if not key:
            raise MissingApiKey
        return self._valid(self._snapshot.keys.get(self._pepper.digest(key)))

    def holder(self, tenant_id: str, key_id: str) -> Caller:
        """Return the caller that has a key, by the key's id, for a request that carries a signed policy and no key.

        Raises what `authenticate` raises if the key is not valid any more.
        """
        if not self._auth:
            return Caller(tenant_id, ANONYMOUS, self._region, SchedulingClass(tenant_id))
        caller = self._valid(self._snapshot.by_id.get(key_id))
        if caller.tenant_id != tenant_id:
            raise InvalidApiKey
        return caller

    def _valid(self, entry: _Entry | None) -> Caller:
        if entry is None or entry.expires_at <= time.time() or entry.caller.region != self._region:
            raise InvalidApiKey
        if entry.state is State.SUSPENDED:
            raise AccessDenied
        if entry.state is State.ARREARS:
            raise Arrearage
        return entry.caller

    def check_ready(self) -> None:
        """Raise `NotReady` before the start has succeeded."""
        if self.waiting_for is not None:
            raise NotReady(f"The service waits for {self.waiting_for}; the log has the reason.")

    def price(self, region: Region, at_ms: int) -> Price:
        """Return the price of a request that is opened at that time."""
        return self._snapshot.prices.at(region, at_ms)

    def refresh(self) -> None:
        """Read the rows that have changed. Blocking."""
        with self._database.connect() as connection:
            if connection.dialect.name == "postgresql":  # SQLite's transactions see one state anyway
                connection = connection.execution_options(isolation_level="REPEATABLE READ")  # noqa: PLW2901
            with connection.begin():
                state = access_rows.read_state(connection)
                if state.pepper_check not in {None, self._pepper.check}:
                    raise UnusableDatabase(
                        "key_pepper is not the one under which the keys in this database were hashed: give all "
                        "processes that share a database the same one, as the setting or as the file `pepper` in "
                        "their data_dir"
                    )
                # A database that was away may have been restored, or replaced by a standby without the last changes.
                known = AccessRows() if self.failing else self._snapshot.rows
                if state.revision != known.revision:
                    changes = access_rows.read(connection, state, known)
                    self.rows_read += changes.rows_read
                    self._snapshot = self._after(changes)
        self._checked_s = time.monotonic()

    async def _refresh_forever(self) -> None:
        while True:
            await asyncio.sleep(self._refresh_s)
            try:
                await asyncio.to_thread(self.refresh)
            except Exception as error:  # noqa: BLE001 - of any kind, such as a state by SQL that is none: it must go on
                self.failures += 1
                if not self.failing:
                    log.warning(
                        "cannot read keys and tenants, the last snapshot stays in use",
                        extra={"error": type(error).__name__},
                    )
                self.failing = True
            else:
                self.failing = False

    def _after(self, changes: access_rows.Changes) -> _Snapshot:
        """Return the snapshot after these changes; entries that they do not affect are those of the last one."""
        rows, last = changes.rows, self._snapshot
        found: dict[str, _Entry] = {}
        if not changes.everything:
            gone = {last.rows.keys[name]["digest"] for name in changes.keys & last.rows.keys.keys()}
            found = {digest: entry for digest, entry in last.keys.items() if digest not in gone}
        for key, tenant_id in self._static.items():
            digest = self._pepper.digest(key)
            row: Mapping[Any, Any] = {"id": f"{tenant_id}-{digest[:8]}", "limits": {}, "expires_at": None}
            # A tenant of this name in the database can limit or suspend these keys.
            tenant = rows.tenants.get(tenant_id) or self._default_tenant(tenant_id)
            found[digest] = _entry(rows.plans.get(tenant["plan"], _UNLIMITED), tenant, row)
        for name in changes.keys & rows.keys.keys():
            row = rows.keys[name]
            tenant = rows.tenants[row["tenant_id"]]
            found[row["digest"]] = _entry(rows.plans[tenant["plan"]], tenant, row)
        by_id = {entry.caller.key_id: entry for entry in found.values()}
        return _Snapshot(rows, found, by_id, prices.price_list(rows.prices.values()))

    def _default_tenant(self, tenant_id: str) -> Mapping[Any, Any]:
        """Return the row of a tenant that is not in the database."""
        row = {"id": tenant_id, "region": self._region, "state": State.ACTIVE, "plan": "", "limits": {}}
        return row | {"free_tokens": 0, "free_days": 0, "free_only": False, "activated_at": 0, "log_content": False}

    def _anonymous(self, key: str) -> Caller:
        """Return a caller that is not authenticated; callers are distinguished by the key that they send, if any."""
        tenant_id = f"{ANONYMOUS}-{self._pepper.digest(key)[:12]}" if key else ANONYMOUS
        return Caller(tenant_id, ANONYMOUS, self._region, SchedulingClass(tenant_id))


def development_key(settings: Settings, database: sa.Engine) -> str | None:
    """Return a key for this run, stored nowhere, if there is no key at all; else `None`. The tables must exist."""
    if not settings.auth or settings.api_keys:
        return None
    with database.connect() as connection:
        return None if connection.scalar(sa.select(_KEYS.id).limit(1)) else make_key()


def _entry(plan: Mapping[Any, Any], tenant: Mapping[Any, Any], key: Mapping[Any, Any]) -> _Entry:
    expires_at = float("inf") if key["expires_at"] is None else key["expires_at"] / 1000
    return _Entry(plans.caller(plan, tenant, key), State(tenant["state"]), expires_at)
