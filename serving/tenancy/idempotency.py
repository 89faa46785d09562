"""Answers by `Idempotency-Key`: a request that is repeated within 24 hours gets the same answer, and is billed once.

    claim ─► another request runs: wait          ─► its answer
          ─► an answer is stored                 ─► that answer
          ─► nothing: the request runs           ─► its answer and its usage record, stored in one transaction

A claim is a row with a lease, which is renewed while the request runs: the claim of a process that was killed lapses,
and the next request with the key runs. Requests that are not answered by a caption leave no row.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from serving.errors import IdempotencyConflict, InvalidRequest, Overloaded, StorageUnavailable
from serving.tenancy.database import failure
from serving.tenancy.ledger import usage_table
from serving.tenancy.ledger.usage_record import now_ms
from serving.tenancy.schema import idempotent_answers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from serving.tenancy.ledger.usage_record import UsageRecord
    from serving.types import Outcome

KEPT_S = 24 * 3600
MOST_PER_TENANT = 10_000
"""Answers of one tenant that are kept; of more the oldest are removed by the next sweep."""

_MAX_KEY = 255
_LEASE_S, _RENEW_S = 15.0, 5.0
_LOOK_EVERY_S = 0.25
_SWEEP_S = 60.0

_ROW = idempotent_answers.c

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer: its headers, and its body byte for byte."""

    headers: Mapping[str, str]
    body: bytes


class Claim:
    """The claim of a request to its key; also the `Commit` of its session."""

    def __init__(self, database: sa.Engine, where: sa.ColumnElement[bool], found: Answer | None) -> None:
        self.found = found
        """Answer of an earlier request: this one does not run."""
        self.answer: Answer | None = None
        """Answer of this request, once it is known."""
        self.stored = False
        self._database = database
        self._where = where

    async def __call__(self, record: UsageRecord, outcome: Outcome) -> Outcome:
        """Store the answer with its usage record; while the database is away, the answer is sent all the same."""
        await self.store(record.closed_row(outcome))
        return outcome

    async def store(self, usage: Mapping[str, Any] | None) -> None:
        """Store the answer, if there is one."""
        if self.answer is None or self.stored:
            return
        try:
            await asyncio.to_thread(self._store, self.answer, usage)
        except SQLAlchemyError as error:
            log.warning("answer of an idempotency key not stored", extra={"reason": failure(error)})
        self.stored = True

    def _store(self, answer: Answer, usage: Mapping[str, Any] | None) -> None:
        values = {"headers": dict(answer.headers), "body": answer.body, "expires_at": now_ms() + 1000 * KEPT_S}
        with self._database.begin() as connection:
            connection.execute(idempotent_answers.update().where(self._where).values(values))
            if usage is not None:
                usage_table.put(connection, dict(usage))


class IdempotentAnswers:
    """The store of answers. The database is used only by requests that have a key."""

    def __init__(self, database: sa.Engine) -> None:
        self._database = database
        self._sweeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to remove answers that have expired."""
        self._sweeping = asyncio.create_task(self._sweep_forever())

    async def stop(self) -> None:
        """Stop sweeping. Idempotent."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.wait((self._sweeping,))
            self._sweeping = None

    @asynccontextmanager
    async def claim(self, tenant_id: str, key: str, request_digest: str, *, within_s: float) -> AsyncIterator[Claim]:
        """Claim a key for a request; wait up to `within_s` while another request with the key runs.

        Raises `InvalidRequest` for a key that is none, `IdempotencyConflict`, `Overloaded` if the other one still
        runs, and `StorageUnavailable` if the database is away: without it a request could be billed twice.
        """
        if not 0 < len(key) <= _MAX_KEY or not key.isprintable():
            message = f"Idempotency-Key must be 1 to {_MAX_KEY} printable characters."
            raise InvalidRequest(message, param="Idempotency-Key")
        claim = await self._acquired(tenant_id, hashlib.sha256(key.encode()).hexdigest(), request_digest, within_s)
        if claim.found is not None:
            yield claim
            return
        renewing = asyncio.create_task(self._renew_forever(claim))
        try:
            yield claim
        finally:
            renewing.cancel()
            await asyncio.wait((renewing,))
            await asyncio.shield(self._leave(claim))

    async def sweep(self) -> None:
        """Remove answers that have expired, and the oldest ones of tenants that have too many."""
        await asyncio.to_thread(self._sweep)

    async def _acquired(self, tenant_id: str, key_digest: str, request_digest: str, within_s: float) -> Claim:
        deadline_s = asyncio.get_running_loop().time() + within_s
        acquire = partial(self._acquire, tenant_id, key_digest, request_digest)
        while True:
            try:
                claim = await asyncio.to_thread(acquire)
            except SQLAlchemyError as error:
                log.warning("idempotency keys cannot use the database", extra={"reason": failure(error)})
                raise StorageUnavailable from None
            if claim is not None:
                return claim
            if asyncio.get_running_loop().time() > deadline_s:
                raise Overloaded("The first request with this Idempotency-Key still runs.")
            await asyncio.sleep(_LOOK_EVERY_S)

    def _acquire(self, tenant_id: str, key_digest: str, request_digest: str) -> Claim | None:
        """Return a claim, or one with the answer that was found; `None` while another request runs."""
        at, owner = now_ms(), secrets.token_hex(16)
        key = (_ROW.tenant_id == tenant_id) & (_ROW.key_digest == key_digest)
        values = {
            "request_digest": request_digest,
            "owner": owner,
            "lease_until": at + round(1000 * _LEASE_S),
            "expires_at": at + 1000 * KEPT_S,
            "headers": None,
            "body": None,
        }
        insert: Any = {"postgresql": postgresql.insert, "sqlite": sqlite.insert}[self._database.dialect.name]
        new = insert(idempotent_answers).values(tenant_id=tenant_id, key_digest=key_digest, **values)
        lapsed = (_ROW.expires_at < at) | (_ROW.body.is_(None) & (_ROW.lease_until < at))
        with self._database.begin() as connection:
            claimed = connection.execute(new.on_conflict_do_nothing()).rowcount
            claimed = (
                claimed or connection.execute(idempotent_answers.update().where(key, lapsed).values(values)).rowcount
            )
            if claimed:
                return Claim(self._database, key & (_ROW.owner == owner), None)
            row = connection.execute(sa.select(idempotent_answers).where(key)).mappings().first()
        if row is None:
            return None  # removed meanwhile: try again
        if row["request_digest"] != request_digest:
            raise IdempotencyConflict
        return None if row["body"] is None else Claim(self._database, key, Answer(row["headers"], row["body"]))

    async def _leave(self, claim: Claim) -> None:
        """Store an answer that nothing was metered for; remove the row of a request without an answer."""
        await claim.store(None)
        if claim.answer is None:
            with suppress(SQLAlchemyError):  # the lease lapses
                await asyncio.to_thread(self._change, idempotent_answers.delete().where(claim._where))  # noqa: SLF001

    async def _renew_forever(self, claim: Claim) -> None:
        while True:
            await asyncio.sleep(_RENEW_S)
            renewed = {"lease_until": now_ms() + round(1000 * _LEASE_S)}
            with suppress(SQLAlchemyError):
                update = idempotent_answers.update().where(claim._where).values(renewed)  # noqa: SLF001
                await asyncio.to_thread(self._change, update)

    def _change(self, statement: sa.Update | sa.Delete) -> None:
        with self._database.begin() as connection:
            connection.execute(statement)

    def _sweep(self) -> None:
        self._change(idempotent_answers.delete().where(_ROW.expires_at < now_ms()))
        counts = sa.select(_ROW.tenant_id).group_by(_ROW.tenant_id).having(sa.func.count() > MOST_PER_TENANT)
        with self._database.connect() as connection:
            tenants = [*connection.scalars(counts)]
        for tenant_id in tenants:
            own = sa.select(_ROW.expires_at).where(_ROW.tenant_id == tenant_id).order_by(_ROW.expires_at.desc())
            with self._database.connect() as connection:
                oldest = connection.scalar(own.offset(MOST_PER_TENANT - 1).limit(1))
            expired = (_ROW.tenant_id == tenant_id, _ROW.expires_at < oldest, _ROW.body.is_not(None))
            self._change(idempotent_answers.delete().where(*expired))

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            try:
                await self.sweep()
            except SQLAlchemyError as error:
                log.warning("idempotency sweep failed", extra={"reason": failure(error)})
