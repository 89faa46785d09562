"""The runner: takes leases of batches, and works on each until it has ended or another process has taken over.

    validating ─► in_progress ─► finalizing ─► completed | expired        cancelling ─► cancelled        failed

Every frontend has a runner. A lease is renewed every few seconds; the batches of a process that was killed are taken
over by another one once their leases have lapsed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sqlalchemy.exc import SQLAlchemyError

from serving.batch.job import Job
from serving.batch.line import LeaseLost, LineRunner
from serving.batch.pace import Pace
from serving.batch.store import LEASE_S
from serving.engine.remote.client import RemoteEngine
from serving.errors import CaptionerError
from serving.tenancy.database import failure

if TYPE_CHECKING:
    from serving.batch.files import Files
    from serving.batch.store import Batch, BatchStore
    from serving.engine.base import Engine
    from serving.tenancy.keys import Keyring

_RENEW_S, _CLAIM_S = 3.0, 1.0
_BATCHES_AT_ONCE = 8
"""Most batches that one process works on; lines of all of them take turns."""
_BACKLOG_S = 10.0
_LIVE_S, _LIVE_SHARE = 10.0, 8
"""Time after a caller's caption in which lines leave an eighth of the engine's slots, at least one, to callers."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Running:
    job: Job
    task: asyncio.Task[None] = field(init=False)


class BatchRunner:
    """Works on batches while the process runs. `lines.owner` is the name of this process in leases."""

    def __init__(self, lines: LineRunner, store: BatchStore, files: Files, keys: Keyring, engine: Engine) -> None:
        self._lines = lines
        self._store = store
        self._files = files
        self._keys = keys
        self._engine = engine
        self._live_until_s = 0.0
        self._pace = Pace(lines.settings.max_batch_lines, self._engine_is_taken)
        self._metrics = lines.metrics.batches
        self._running: dict[str, _Running] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._wake = asyncio.Event()
        self._backlog_s = 0.0
        self._failing = False

    async def start(self) -> None:
        """Begin to look for batches, unless the settings allow no line."""
        if self._lines.settings.max_batch_lines:
            self._tasks = [asyncio.create_task(self._claim_forever()), asyncio.create_task(self._renew_forever())]

    async def stop(self) -> None:
        """Stop all lines, which have no bill then, and give up the leases. Idempotent."""
        self._lines.stopping.set()
        tasks = [*self._tasks, *(running.task for running in self._running.values())]
        self._tasks = []
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def wake(self) -> None:
        """Look for a batch now: one was made, or is to be cancelled."""
        self._wake.set()

    def _engine_is_taken(self) -> bool:
        """Return whether no line may start: captions wait, or callers are active and need the slots that are left."""
        load, now_s = self._engine.load, time.monotonic()
        if self._lines.pipeline.in_flight > self._pace.running:
            self._live_until_s = now_s + _LIVE_S
        if load.waiting > 0 or now_s >= self._live_until_s:
            return load.waiting > 0
        replicas = self._engine.replicas["ready"] if isinstance(self._engine, RemoteEngine) else 1
        slots = self._lines.settings.max_num_seqs * max(1, replicas)
        # Lines that have just started are not in the engine yet.
        return max(load.running, self._pace.running) >= slots - max(1, slots // _LIVE_SHARE)

    async def _claim_forever(self) -> None:
        while True:
            self._wake.clear()
            if self._keys.waiting_for is None and len(self._running) < _BATCHES_AT_ONCE and await self._claim():
                continue
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _CLAIM_S)

    async def _claim(self) -> bool:
        """Take a lease and begin to work on its batch; return whether there was one."""
        held = [running.job.batch for running in self._running.values()]
        try:
            batch = await asyncio.to_thread(self._store.claim, self._lines.owner, LEASE_S, held)
        except SQLAlchemyError as error:
            self._failed(error)
            return False
        self._failing = False
        if batch is None:
            return False
        log.info("batch claimed", extra={"batch": batch.id, "tenant": batch.tenant_id, "status": batch.status})
        job = Job(batch, self._lines, store=self._store, files=self._files, keys=self._keys, pace=self._pace)
        running = self._running[batch.id] = _Running(job)
        running.task = asyncio.create_task(self._work(running.job))
        return True

    async def _work(self, job: Job) -> None:
        batch = job.batch
        try:
            ended = await job.run()
        except LeaseLost:
            log.warning("lease of a batch lost", extra={"batch": batch.id})
        except asyncio.CancelledError:
            await self._release(batch)
            raise
        except (CaptionerError, SQLAlchemyError) as error:  # the lease lapses, and the batch is tried again
            log.warning("batch interrupted", extra={"batch": batch.id, "error": type(error).__name__})
        except Exception:
            log.exception("batch interrupted", extra={"batch": batch.id})
        else:
            self._metrics.ended(ended)
            log.info("batch ended", extra={"batch": batch.id, "tenant": batch.tenant_id, "status": ended})
        finally:
            self._running.pop(batch.id, None)
            self._wake.set()

    async def _release(self, batch: Batch) -> None:
        try:
            await asyncio.to_thread(self._store.release, self._lines.owner, batch.id)
        except SQLAlchemyError as error:
            self._failed(error)

    async def _renew_forever(self) -> None:
        while True:
            await asyncio.sleep(_RENEW_S)
            try:
                await self._renew()
            except SQLAlchemyError as error:
                self._failed(error)

    async def _renew(self) -> None:
        """Prolong all leases; stop the jobs that have lost theirs, and tell those that are to be cancelled."""
        held = [*self._running]
        if held:
            statuses = await asyncio.to_thread(self._store.renew, self._lines.owner, held, LEASE_S)
            for batch_id in held:
                if running := self._running.get(batch_id):
                    running.job.follow(statuses.get(batch_id))
        self._metrics.running.set(self._pace.running)
        if time.monotonic() - self._backlog_s > _BACKLOG_S:
            self._backlog_s = time.monotonic()
            self._metrics.backlog.set(await asyncio.to_thread(self._store.backlog))

    def _failed(self, error: SQLAlchemyError) -> None:
        if not self._failing:
            self._failing = True
            log.warning("batches cannot use the database", extra={"reason": failure(error)})
