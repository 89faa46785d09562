"""The state of batches in the database: rows of batches and of their lines, and leases.

A batch is worked on by the process that holds its lease. Each change that such a process makes is conditional on the
lease, so a process that was suspended, or cut off from the database, changes nothing once another one has taken over.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from serving.errors import InvalidRequest, NotFound
from serving.tenancy import schema
from serving.tenancy.batch_table import UNFINISHED, BatchStatus, cancellation
from serving.tenancy.ledger import usage_table
from serving.tenancy.ledger.usage_record import now_ms

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

_BATCHES, _LINES = schema.batches.c, schema.batch_lines.c

MAX_UNFINISHED = 100
"""Most batches of one tenant that have not ended, so that the table stays small for those who look for work."""

_INSERTED = 1000

LEASE_S = 15.0
"""Time after which another process takes over the batches of one that was killed."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A row of `batches`; times are ms since the epoch."""

    id: str
    tenant_id: str
    key_id: str
    endpoint: str
    input_file_id: str
    output_file_id: str | None
    error_file_id: str | None
    completion_window: str
    output_ttl_s: int | None
    metadata: dict[str, str] | None
    model: str | None
    status: str
    errors: list[dict[str, Any]] | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    total: int
    completed: int
    failed: int
    input_tokens: int
    output_tokens: int
    amount_nanos: int
    currency: str | None
    lease_owner: str | None
    lease_until: int


@dataclass(frozen=True, slots=True)
class InputLine:
    """A line of the input file: its number from 1 on, the custom id, and its bytes in the file."""

    number: int
    custom_id: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class LineResult:
    """The result of a line: the response's status and body; without a status, the error of a line that did not run."""

    completed: bool
    status_code: int | None
    body: str


class BatchStore:
    """Batches of all tenants. All calls block; a batch that is unknown or another tenant's is not found."""

    def __init__(self, database: sa.Engine) -> None:
        self._database = database

    # ---- for callers

    def create(
        self,
        *,
        tenant_id: str,
        key_id: str,
        endpoint: str,
        input_file_id: str,
        completion_window: str,
        window_s: int,
        output_ttl_s: int | None,
        metadata: dict[str, str] | None,
    ) -> Batch:
        """Make a batch, to be validated. Raises `InvalidRequest` if the tenant has too many that have not ended."""
        at = now_ms()
        row: dict[str, Any] = dict.fromkeys(_BATCHES.keys()) | dict.fromkeys(_SUMS, 0)
        row |= {
            "id": f"batch_{secrets.token_hex(16)}",
            "tenant_id": tenant_id,
            "key_id": key_id,
            "endpoint": endpoint,
            "input_file_id": input_file_id,
            "completion_window": completion_window,
            "output_ttl_s": output_ttl_s,
            "metadata": metadata,
            "status": BatchStatus.VALIDATING.value,
            "created_at": at,
            "expires_at": at + 1000 * window_s,
            "lease_until": 0,
        }
        unfinished = sa.select(sa.func.count()).where(_BATCHES.tenant_id == tenant_id, _BATCHES.status.in_(UNFINISHED))
        with self._database.begin() as connection:
            connection.execute(schema.batches.insert(), row)
            if (connection.scalar(unfinished) or 0) > MAX_UNFINISHED:
                raise InvalidRequest(f"You have {MAX_UNFINISHED} batches that have not ended: wait, or cancel some.")
        return Batch(**row)

    def get(self, tenant_id: str, batch_id: str) -> Batch:
        """Return a batch. Raises `NotFound`."""
        query = sa.select(schema.batches).where(_BATCHES.id == batch_id, _BATCHES.tenant_id == tenant_id)
        with self._database.connect() as connection:
            row = connection.execute(query).mappings().first()
        if row is None:
            raise NotFound(f"No batch found with id '{batch_id[:64]}'.")
        return _batch(row)

    def page(self, tenant_id: str, *, after: str | None, limit: int) -> tuple[list[Batch], bool]:
        """Return batches of a tenant, the latest first, and whether there are more. Raises `NotFound`."""
        keys = (_BATCHES.created_at, _BATCHES.id)
        query = sa.select(schema.batches).where(_BATCHES.tenant_id == tenant_id)
        if after is not None:
            last = self.get(tenant_id, after)
            query = query.where(sa.tuple_(*keys) < sa.tuple_(sa.literal(last.created_at), sa.literal(last.id)))
        query = query.order_by(*(key.desc() for key in keys)).limit(limit + 1)
        with self._database.connect() as connection:
            found = [_batch(row) for row in connection.execute(query).mappings()]
        return found[:limit], len(found) > limit

    def cancel(self, tenant_id: str, batch_id: str) -> Batch:
        """Begin to cancel a batch. Raises `NotFound`, and `InvalidRequest` if it has ended."""
        with self._database.begin() as connection:
            connection.execute(cancellation(batch_id).where(_BATCHES.tenant_id == tenant_id))
        batch = self.get(tenant_id, batch_id)
        if batch.cancelling_at is None:
            raise InvalidRequest(f"Cannot cancel a batch with status '{batch.status}'.")
        return batch

    # ---- leases

    def claim(self, owner: str, lease_s: float, running: Collection[Batch]) -> Batch | None:
        """Take the lease of the oldest batch that nobody works on, if there is one of a tenant with none `running`.

        `running`: batches that `owner` works on; their leases may have lapsed while the database was away.
        """
        at = now_ms()
        free = (
            _BATCHES.status.in_(UNFINISHED),
            _BATCHES.lease_until < at,
            _BATCHES.id.not_in([batch.id for batch in running]),
        )
        last = sa.case((_BATCHES.tenant_id.in_([batch.tenant_id for batch in running]), 1), else_=0)
        query = sa.select(_BATCHES.id).where(*free).order_by(last, _BATCHES.created_at).limit(1)
        with self._database.connect() as connection:
            batch_id = connection.scalar(query)
        if batch_id is None:
            return None
        leased = {"lease_owner": owner, "lease_until": at + round(1000 * lease_s)}
        claim = schema.batches.update().where(_BATCHES.id == batch_id, *free).values(leased)
        with self._database.begin() as connection:
            if not connection.execute(claim).rowcount:
                return None
            row = connection.execute(sa.select(schema.batches).where(_BATCHES.id == batch_id)).mappings().one()
        return _batch(row)

    def renew(self, owner: str, batch_ids: Sequence[str], lease_s: float) -> dict[str, str]:
        """Prolong leases; return the statuses of those batches that `owner` still works on."""
        held = (_BATCHES.id.in_(batch_ids), _BATCHES.lease_owner == owner)
        until = {"lease_until": now_ms() + round(1000 * lease_s)}
        with self._database.begin() as connection:
            connection.execute(schema.batches.update().where(*held).values(until))
            return {
                row.id: row.status for row in connection.execute(sa.select(_BATCHES.id, _BATCHES.status).where(*held))
            }

    def release(self, owner: str, batch_id: str) -> None:
        """Give up a lease, so that another process may work on the batch at once."""
        with self._database.begin() as connection:
            connection.execute(_held(owner, batch_id).values(lease_until=0, lease_owner=None))

    # ---- for the process that holds the lease

    def fail(self, owner: str, batch_id: str, errors: list[dict[str, Any]]) -> bool:
        """End a batch whose input file is wrong; return whether the batch is still held and not cancelled."""
        ended = {"status": BatchStatus.FAILED.value, "failed_at": now_ms(), "errors": errors, "lease_until": 0}
        failing = _held(owner, batch_id).where(_BATCHES.status == BatchStatus.VALIDATING.value)
        with self._database.begin() as connection:
            return bool(connection.execute(failing.values(ended)).rowcount)

    def begin_lines(self, owner: str, batch_id: str, lines: Sequence[InputLine], model: str | None) -> bool:
        """Store the lines of a valid input file; return whether the batch is still held and not cancelled."""
        started = {"status": BatchStatus.IN_PROGRESS.value, "in_progress_at": now_ms(), "total": len(lines)}
        starting = _held(owner, batch_id).where(_BATCHES.status == BatchStatus.VALIDATING.value)
        with self._database.begin() as connection:
            if not connection.execute(starting.values(model=model, **started)).rowcount:
                return False
            for start in range(0, len(lines), _INSERTED):
                rows = [
                    {
                        "batch_id": batch_id,
                        "line": line.number,
                        "custom_id": line.custom_id,
                        "offset": line.offset,
                        "length": line.length,
                    }
                    for line in lines[start : start + _INSERTED]
                ]
                connection.execute(schema.batch_lines.insert(), rows)
        return True

    def pending(self, batch_id: str, *, after: int, limit: int) -> list[InputLine]:
        """Return the next lines without a result."""
        columns = (_LINES.line, _LINES.custom_id, _LINES.offset, _LINES.length)
        query = sa.select(*columns).where(_LINES.batch_id == batch_id, _LINES.line > after, _LINES.outcome.is_(None))
        with self._database.connect() as connection:
            return [InputLine(*row) for row in connection.execute(query.order_by(_LINES.line).limit(limit))]

    def finish_line(
        self, owner: str, batch_id: str, number: int, result: LineResult, usage: Mapping[str, Any] | None
    ) -> bool:
        """Store a line's result, its usage record and the sums of its batch, all or none.

        Returns whether that was done: not if another process has the lease, or the line has a result.
        """
        counted: dict[str, Any] = _count(completed=int(result.completed), failed=int(not result.completed))
        if usage is not None and usage["billed"]:
            counted |= {
                name: _BATCHES[name] + usage[name] for name in ("input_tokens", "output_tokens", "amount_nanos")
            }
            counted["currency"] = usage["currency"]
        with self._database.connect() as connection, connection.begin() as transaction:
            held = connection.execute(_held(owner, batch_id).values(counted)).rowcount
            if not held or not connection.execute(_result_of(batch_id, result).where(_LINES.line == number)).rowcount:
                transaction.rollback()
                return False
            if usage is not None:
                usage_table.put(connection, dict(usage))
        return True

    def end_lines(self, owner: str, batch_id: str, rest: LineResult, *, expired: bool) -> int | None:
        """Give all lines without a result the one of `rest`, and begin to finalize the batch.

        Returns the number of those lines; `None` if another process has the lease. The batch has expired if `expired`
        and there were any.
        """
        at = now_ms()
        cancelling = _BATCHES.status == BatchStatus.CANCELLING.value
        status = sa.case((cancelling, BatchStatus.CANCELLING.value), else_=BatchStatus.FINALIZING.value)
        with self._database.connect() as connection, connection.begin() as transaction:
            if not connection.execute(_held(owner, batch_id).values(status=status, finalizing_at=at)).rowcount:
                transaction.rollback()
                return None
            number = connection.execute(_result_of(batch_id, rest)).rowcount
            values = _count(failed=number) | ({"expired_at": at} if expired and number else {})
            connection.execute(_held(owner, batch_id).values(values))
        return number

    def results(
        self, batch_id: str, *, completed: bool, after: int, limit: int
    ) -> list[tuple[int, str, int | None, str]]:
        """Return number, custom id, status and body of the next lines that were completed, or that failed."""
        outcome = "completed" if completed else "failed"
        columns = (_LINES.line, _LINES.custom_id, _LINES.status_code, _LINES.body)
        query = sa.select(*columns).where(_LINES.batch_id == batch_id, _LINES.line > after, _LINES.outcome == outcome)
        with self._database.connect() as connection:
            return [(*row,) for row in connection.execute(query.order_by(_LINES.line).limit(limit))]

    def finish(
        self, owner: str, batch_id: str, *, output_file_id: str | None, error_file_id: str | None
    ) -> Batch | None:
        """End a batch whose output files are stored, and remove its lines; `None` if it is not held any more."""
        status = sa.case(
            (_BATCHES.cancelling_at.is_not(None), BatchStatus.CANCELLED.value),
            (_BATCHES.expired_at.is_not(None), BatchStatus.EXPIRED.value),
            else_=BatchStatus.COMPLETED.value,
        )
        values: dict[str, Any] = {"status": status, "lease_until": 0, "lease_owner": None}
        values |= {"output_file_id": output_file_id, "error_file_id": error_file_id}
        cancelled, at = _BATCHES.cancelling_at.is_not(None), now_ms()
        values["cancelled_at"] = sa.case((cancelled, at), else_=None)
        values["completed_at"] = sa.case((cancelled | _BATCHES.expired_at.is_not(None), None), else_=at)
        with self._database.begin() as connection:
            if not connection.execute(_held(owner, batch_id).values(values)).rowcount:
                return None
            connection.execute(schema.batch_lines.delete().where(_LINES.batch_id == batch_id))
            return _batch(connection.execute(sa.select(schema.batches).where(_BATCHES.id == batch_id)).mappings().one())

    def backlog(self) -> int:
        """Return the number of lines without a result, of all batches that have been validated."""
        query = sa.select(sa.func.sum(_BATCHES.total - _BATCHES.completed - _BATCHES.failed))
        with self._database.connect() as connection:
            return int(connection.scalar(query.where(_BATCHES.status.in_(UNFINISHED))) or 0)


_SUMS = ("total", "completed", "failed", "input_tokens", "output_tokens", "amount_nanos")


def _held(owner: str, batch_id: str) -> sa.Update:
    return schema.batches.update().where(_BATCHES.id == batch_id, _BATCHES.lease_owner == owner)


def _count(**counts: int) -> dict[str, Any]:
    return {name: _BATCHES[name] + number for name, number in counts.items()}


def _result_of(batch_id: str, result: LineResult) -> sa.Update:
    values = {"outcome": "completed" if result.completed else "failed"}
    values |= {"status_code": result.status_code, "body": result.body}  # type: ignore[dict-item]
    return schema.batch_lines.update().where(_LINES.batch_id == batch_id, _LINES.outcome.is_(None)).values(values)


def _batch(row: Mapping[Any, Any]) -> Batch:
    return Batch(**{str(name): value for name, value in row.items()})
