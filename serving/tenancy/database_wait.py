"""Attempts that are repeated until the database, or the disk, can be used."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from sqlalchemy.exc import SQLAlchemyError

from serving.tenancy.database import address, failure, migrate

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sqlalchemy import Engine

log = logging.getLogger(__name__)

_MIN_RETRY_S, _MAX_RETRY_S = 0.5, 5.0
_LOG_EVERY_S = 30.0


def _ignore(_: Exception) -> None:
    pass


async def until_migrated(database: Engine, *, on_failure: Callable[[Exception], None] = _ignore) -> None:
    """Repeat `migrate` until it succeeds, as `until_done` does."""
    await until_done(partial(in_daemon_thread, partial(migrate, database)), database, on_failure=on_failure)


async def until_done(
    step: Callable[[], Awaitable[None]], database: Engine, *, on_failure: Callable[[Exception], None] = _ignore
) -> None:
    """Repeat `step` until it succeeds; log the host and the reason at first, when the reason changes, and each 30 s.

    `on_failure` is called after each failure. `UnusableDatabase` is raised: no repetition helps.
    """
    started_s, logged_s, logged_reason = time.monotonic(), 0.0, ""
    pause_s = _MIN_RETRY_S
    while True:
        try:
            await step()
        except (SQLAlchemyError, OSError) as error:
            now_s, reason = time.monotonic(), failure(error)
            if reason != logged_reason or now_s - logged_s >= _LOG_EVERY_S:
                log.error(  # noqa: TRY400 - the reason says it all
                    "database cannot be used, waiting for it",
                    extra={
                        "database": address(database),
                        "reason": reason,
                        "error": type(error).__name__,
                        "waited_s": round(now_s - started_s, 1),
                    },
                )
                logged_s, logged_reason = now_s, reason
            on_failure(error)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_RETRY_S)
        else:
            if logged_reason:
                log.info("database can be used", extra={"waited_s": round(time.monotonic() - started_s, 1)})
            return


async def in_daemon_thread(function: Callable[[], None]) -> None:
    """Run a blocking function in a thread for which, unlike those of `asyncio.to_thread`, the process does not wait.

    A connection attempt may last for seconds, and a signal must end the process at once.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def finish(error: BaseException | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def run() -> None:
        failed: BaseException | None = None
        try:
            function()
        except BaseException as error:  # noqa: BLE001 - raised where it is awaited
            failed = error
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(finish, failed)

    threading.Thread(target=run, name="database-start", daemon=True).start()
    await done
