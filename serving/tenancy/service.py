"""What tells tenants apart, limits and bills them: the parts, and their life."""

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
from serving.tenancy.usage_session import Admissions

if TYPE_CHECKING:
    from serving.config import Settings
    from serving.tenancy.limits.limiter import Store

log = logging.getLogger(__name__)

_RETRY_S = 1.0


class Tenancy:
    """All of it, over one database."""

    def __init__(self, settings: Settings) -> None:
        self.database = open_database(settings)
        self.keys = Keyring(settings, self.database)
        self.ledger = Ledger(self.database, settings.data_dir, max_journal_bytes=settings.max_journal_bytes)
        self.limiter = Limiter(_store(settings), self.ledger.spent)
        self.admissions = Admissions(self.limiter, self.ledger, self.keys.price, metering=settings.metering)

    async def start(self) -> None:
        """Bring the tables up to date, waiting for the database if need be: without it nobody is known."""
        await self._migrate()
        await self.keys.start()
        await self.ledger.start()
        await self.limiter.start()

    async def stop(self) -> None:
        """Settle what is open. Idempotent."""
        await self.admissions.stop()
        await self.limiter.stop()
        await self.ledger.stop()
        await self.keys.stop()
        await asyncio.to_thread(self.database.dispose)

    async def _migrate(self) -> None:
        waited = False
        while True:
            try:
                await asyncio.to_thread(migrate, self.database)
            except OperationalError as error:
                if not waited:
                    log.warning("waiting for the database of tenants", extra={"error": type(error.orig).__name__})
                waited = True
                await asyncio.sleep(_RETRY_S)
            else:
                return


def _store(settings: Settings) -> Store:
    """Where limits are counted."""
    if settings.redis_url is None:
        return MemoryStore()
    # Redis' client brings OpenTelemetry with it, which nobody needs who does not trace.
    from serving.tenancy.limits.redis import RedisStore  # noqa: PLC0415

    return RedisStore(settings.redis_url.get_secret_value())
