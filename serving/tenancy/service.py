"""The components that identify, limit and bill tenants, over one database, and their start and stop."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from sqlalchemy.exc import OperationalError

from serving.tenancy.database import migrate, open_database
from serving.tenancy.keys import Keyring
from serving.tenancy.ledger.ledger import Ledger
from serving.tenancy.limits.limiter import Limiter
from serving.tenancy.limits.memory import MemoryStore
from serving.tenancy.usage_session import UsageSessions

if TYPE_CHECKING:
    from serving.config import Settings
    from serving.tenancy.limits.counter_store import CounterStore

log = logging.getLogger(__name__)

_RETRY_S = 1.0


class Tenancy:
    """Keys, ledger, limits and usage sessions of this process."""

    def __init__(self, settings: Settings) -> None:
        self.database = open_database(settings)
        self.keys = Keyring(settings, self.database)
        self.ledger = Ledger(self.database, settings.data_dir, max_journal_bytes=settings.max_journal_bytes)
        self.limiter = Limiter(_counter_store(settings), self.ledger.spent)
        self.usage_sessions = UsageSessions(self.limiter, self.ledger, self.keys.price, metering=settings.metering)

    async def start(self) -> None:
        """Migrate the tables and start all components. Waits for the database: without it no caller is known."""
        await self._migrate()
        await self.keys.start()
        await self.ledger.start()
        await self.limiter.start()

    async def stop(self) -> None:
        """Settle open requests and stop all components. Idempotent."""
        await self.usage_sessions.stop()
        await self.limiter.stop()
        await self.ledger.stop()
        await self.keys.stop()
        await asyncio.to_thread(self.database.dispose)

    async def _migrate(self) -> None:
        logged = False
        while True:
            try:
                await asyncio.to_thread(migrate, self.database)
            except OperationalError as error:
                if not logged:
                    log.warning("database not reachable, waiting", extra={"error": type(error.orig).__name__})
                logged = True
                await asyncio.sleep(_RETRY_S)
            else:
                return


def _counter_store(settings: Settings) -> CounterStore:
    """Return the store in which limits are counted: Redis if the settings name one, else this process."""
    if settings.redis_url is None:
        return MemoryStore()
    # Imported late: Redis' client imports OpenTelemetry, which only traced services need.
    from serving.tenancy.limits.redis import RedisStore  # noqa: PLC0415

    return RedisStore(settings.redis_url.get_secret_value())
