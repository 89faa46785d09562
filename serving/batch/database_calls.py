"""Calls of the database off the event loop, whose faults are answered as those of the storage."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from serving.errors import StorageUnavailable
from serving.tenancy.database import failure

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

T = TypeVar("T")


async def in_database(call: Callable[[], T]) -> T:
    """Run a blocking call in a thread. Raises `StorageUnavailable` if the database cannot be used."""
    try:
        return await asyncio.to_thread(call)
    except SQLAlchemyError as error:
        log.warning("files and batches cannot use the database", extra={"reason": failure(error)})
        raise StorageUnavailable from None
