"""A tenant's own view of its account: what it used, and what is left of its limits."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from serving.errors import StorageUnavailable
from serving.scheduling.shared_capacity import SharedCapacity
from serving.tenancy import schema
from serving.tenancy.billing import reports
from serving.tenancy.billing.prices import NANOS, money
from serving.tenancy.ledger.usage_record import now_ms
from serving.tenancy.limits import remaining
from serving.tenancy.limits.limiter import until_next

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Iterable, Mapping, Sequence

    from serving.tenancy.usage_session import UsageSessions
    from serving.types import Caller

    Row = Mapping[str, Any]

log = logging.getLogger(__name__)

GROUPS = ("day", "key")
"""Groups of a tenant's usage report."""

_SUMS = ("requests", "billed_requests", "open_requests", "input_tokens", "output_tokens", "free_tokens")

_AT_ONCE = 2
"""Reports of one process that read the database at the same time: its threads are the ledger's and the limits', too."""

_WAITING, _ALPHA = 32, 1.0
"""Reports of one process that run or wait for that; one tenant alone may have half of them."""


def columns(by: Sequence[str]) -> list[str]:
    """Return the columns of a usage report by some of `GROUPS`."""
    groups = [*(["day"] if "day" in by else []), *(["key", "key_name"] if "key" in by else [])]
    return [*groups, "currency", *_SUMS, "audio_seconds", "amount"]


class Accounts:
    """Reports for tenants, of their own data alone."""

    def __init__(self, database: sa.Engine, usage_sessions: UsageSessions) -> None:
        self._database = database
        self._sessions = usage_sessions
        self._places = SharedCapacity(_WAITING, reason="usage", alpha=_ALPHA)
        self._reading = asyncio.Semaphore(_AT_ONCE)

    async def usage(self, caller: Caller, *, since: dt.date, until: dt.date, by: Sequence[str]) -> dict[str, Any]:
        """Return the caller's tenant's usage from `since` to `until`, both included, by some of `GROUPS`.

        `totals` are the sums of `data`, one entry for each currency. Amounts are exact decimals, as text. Raises
        `Overloaded`, and `StorageUnavailable` if the database does not answer.
        """
        with self._places.acquire(caller.scheduling_class):
            async with self._reading:
                try:
                    data = await asyncio.to_thread(self._usage, caller, since, until, by)
                except SQLAlchemyError as error:
                    log.warning("cannot read the usage of a tenant", extra={"error": type(error).__name__})
                    raise StorageUnavailable("The usage cannot be read now, please try again later.") from None
        return {
            "object": "usage",
            "tenant": caller.tenant_id,
            "since": since.isoformat(),
            "until": until.isoformat(),
            "metered": self._sessions.metering,
            "data": data,
            "totals": _totals(data),
        }

    async def limits(self, caller: Caller) -> dict[str, Any]:
        """Return the limits of the caller's tenant and key, what is left of each, and the price now.

        Raises `Overloaded` if what was billed cannot be read.
        """
        at_ms = now_ms()
        price = self._sessions.prices(caller.region, at_ms)
        data: Sequence[Row] = []
        if self._sessions.metering:
            with self._places.acquire(caller.scheduling_class):
                async with self._reading:
                    uses = await self._sessions.limiter.uses(caller, at_ms=at_ms, currency=price.currency)
            data = remaining.rows(caller, uses, price.currency, lambda period: until_next(month=period == "month"))
        return {
            "object": "limits",
            "tenant": caller.tenant_id,
            "key": caller.key_id,
            "metered": self._sessions.metering,
            "price": {
                "currency": price.currency,
                "per_tokens": 1000,
                "input": f"{price.input_price:f}",
                "output": f"{price.output_price:f}",
            },
            "data": data,
        }

    def _usage(self, caller: Caller, since: dt.date, until: dt.date, by: Sequence[str]) -> list[Row]:
        found = reports.usage(self._database, since=since, until=until, by=by, tenant=caller.tenant_id)
        names: Mapping[str, str] = {}
        if "key" in by:
            keys = schema.keys.c
            with self._database.connect() as connection:
                named = connection.execute(sa.select(keys.id, keys.name).where(keys.tenant_id == caller.tenant_id))
                names = {row.id: row.name for row in named}
        more = [{"audio_seconds": row["audio_s"], "key_name": names.get(row.get("key", ""), "")} for row in found]
        return [
            {name: values[name] for name in columns(by)}
            for values in (row | extra for row, extra in zip(found, more, strict=True))
        ]


def _totals(data: Iterable[Row]) -> list[Row]:
    """Return the sums of the rows, by currency: amounts of different currencies are never added."""
    sums: defaultdict[str, dict[str, Decimal]] = defaultdict(dict)
    for row in data:
        total = sums[row["currency"]]
        for name in (*_SUMS, "audio_seconds", "amount"):
            total[name] = total.get(name, Decimal(0)) + Decimal(str(row[name]))
    return [
        {
            "currency": currency,
            **{name: int(total[name]) for name in _SUMS},
            "audio_seconds": float(total["audio_seconds"]),
            "amount": money(int(total["amount"] * NANOS)),
        }
        for currency, total in sorted(sums.items())
    ]
