"""What tells tenants apart, limits and bills them: the parts, and their life."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

from sqlalchemy.exc import OperationalError

from serving.tenancy.admission import Admissions
from serving.tenancy.keys import Keys
from serving.tenancy.ledger import Ledger
from serving.tenancy.limits import Limiter
from serving.tenancy.limits_memory import MemoryStore
from serving.tenancy.store import migrate, open_database
from serving.types import Caller, Region, Share

if TYPE_CHECKING:
    from collections.abc import Mapping

    from serving.config import Settings

log = logging.getLogger(__name__)

_RETRY_S = 1.0


class Tenancy:
    """All of it, over one database."""

    def __init__(self, settings: Settings) -> None:
        self.database = open_database(settings)
        self.keys = StaticKeys(settings)
        self.ledger = Ledger(self.database, settings.data_dir, max_journal_bytes=settings.max_journal_bytes)
        self.limiter = Limiter(MemoryStore(), self.ledger.spent)
        self.admissions = Admissions(self.limiter, self.ledger, price)

    async def start(self) -> None:
        """Bring the tables up to date, waiting for the database if need be: without it nobody is known."""
        await self._migrate()
        await self.ledger.start()
        await self.limiter.start()

    async def stop(self) -> None:
        """Settle what is open. Idempotent."""
        await self.limiter.stop()
        await self.ledger.stop()
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


class StaticKeys:
    """Callers by the keys of the settings."""

    def __init__(self, settings: Settings) -> None:
        self._keys = Keys(settings.api_keys)

    def authenticate(self, headers: Mapping[str, str]) -> Caller:
        """Return who calls. Raises `MissingApiKey` or `InvalidApiKey`."""
        name = self._keys.authenticate(headers)
        return Caller(name, name, share=Share(name))


@dataclass(frozen=True, slots=True)
class Price:
    """A price per 1,000 tokens."""

    currency: str
    input_price: Decimal
    output_price: Decimal

    def amount_nanos(self, input_tokens: int, output_tokens: int) -> int:
        """Exactly, in nano-units."""
        return int(1_000_000 * (input_tokens * self.input_price + output_tokens * self.output_price))


_PRICES = {
    Region.BEIJING: Price("CNY", Decimal("0.0158"), Decimal("0.0127")),
    Region.SINGAPORE: Price("CNY", Decimal("0.027962"), Decimal("0.022458")),
}


def price(region: Region, at_ms: int) -> Price:
    """The price of the manual."""
    del at_ms
    return _PRICES[region]
