"""The components that identify, limit and bill tenants, over one database, and their start and stop."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING

from serving.tenancy.account import Accounts
from serving.tenancy.database import open_database
from serving.tenancy.database_wait import until_done, until_migrated
from serving.tenancy.idempotency import IdempotentAnswers
from serving.tenancy.keys import Keyring
from serving.tenancy.ledger.ledger import Ledger
from serving.tenancy.limits.limiter import Limiter
from serving.tenancy.limits.memory import MemoryStore
from serving.tenancy.usage_session import UsageSessions

if TYPE_CHECKING:
    from collections.abc import Callable

    from serving.config import Settings
    from serving.tenancy.ledger.copies import CopyStore
    from serving.tenancy.limits.counter_store import CounterStore

log = logging.getLogger(__name__)

_DATABASE = "the database"
_FIRST_ATTEMPT_S, _FIRST_CONNECTION_S = 10.0, 2.0
"""Time within which the start usually succeeds, with a file and over a network; the port is bound after it."""


class Tenancy:
    """Keys, ledger, limits and usage sessions of this process."""

    def __init__(self, settings: Settings, copies: CopyStore | None = None) -> None:
        self.database = open_database(settings)
        self.keys = Keyring(settings, self.database)
        self.keys.waiting_for = _DATABASE
        self.ledger = Ledger(
            self.database, settings.data_dir, max_journal_bytes=settings.max_journal_bytes, copies=copies
        )
        self.limiter = Limiter(_counter_store(settings), self.ledger.spent)
        self.usage_sessions = UsageSessions(self.limiter, self.ledger, self.keys.price, metering=settings.metering)
        self.accounts = Accounts(self.database, self.usage_sessions)
        self.idempotency = IdempotentAnswers(self.database)
        self._shares_limits = settings.redis_url is not None
        self._starting: asyncio.Task[None] | None = None
        self._failed_once = asyncio.Event()

    async def start(self) -> None:
        """Migrate the tables and start all components, in the background if the database is away.

        Returns when that is done, after the first failure, or after some seconds. Until it is done callers are refused
        as `NotReady`: without the database no caller is known.
        """
        self._starting = asyncio.create_task(self._start())
        failed = asyncio.create_task(self._failed_once.wait())
        within_s = _FIRST_CONNECTION_S if self.database.url.host else _FIRST_ATTEMPT_S
        await asyncio.wait((self._starting, failed), timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
        failed.cancel()

    async def started(self) -> None:
        """Wait until all components have started. Raises `UnusableDatabase`: then they never will."""
        if self._starting is not None:
            await asyncio.shield(self._starting)

    async def stop(self) -> None:
        """Settle open requests and stop all components. Idempotent."""
        if self._starting is not None:
            self._starting.cancel()
            with suppress(asyncio.CancelledError, Exception):  # `started` has raised it
                await self._starting
        await self.idempotency.stop()
        await self.usage_sessions.stop()
        await self.limiter.stop()
        await self.ledger.stop()
        await self.keys.stop()
        await asyncio.to_thread(self.database.dispose)

    async def _start(self) -> None:
        await until_migrated(self.database, on_failure=self._waits_for(_DATABASE))
        await until_done(self.ledger.start, self.database, on_failure=self._waits_for("the disk of data_dir"))
        await self.limiter.start()
        if not self._shares_limits and (others := await asyncio.to_thread(self.ledger.neighbours)):
            log.warning(
                "other processes use this data_dir; without redis_url each process counts limits alone",
                extra={"processes": others},
            )
        await self.idempotency.start()
        await until_done(self.keys.start, self.database, on_failure=self._waits_for(_DATABASE))
        self.keys.waiting_for, self.keys.failing = None, False

    def _waits_for(self, resource: str) -> Callable[[Exception], None]:
        def failed(_: Exception) -> None:
            self.keys.waiting_for, self.keys.failing = resource, resource == _DATABASE
            self._failed_once.set()

        return failed


def _counter_store(settings: Settings) -> CounterStore:
    """Return the store in which limits are counted: Redis if the settings name one, else this process."""
    if settings.redis_url is None:
        return MemoryStore()
    # Imported late: Redis' client imports OpenTelemetry, which only traced services need.
    from serving.tenancy.limits.redis import RedisStore  # noqa: PLC0415

    return RedisStore(settings.redis_url.get_secret_value())
