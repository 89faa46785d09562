"""The work on one batch whose lease this process holds: check the input, caption the lines, write the output files."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import orjson

from serving.batch.input_file import InputRules, check_input
from serving.batch.line import Exhausted, Finished, Later, LeaseLost
from serving.batch.output import write_output
from serving.batch.store import LEASE_S, LineResult
from serving.errors import CaptionerError, NotFound
from serving.tenancy.batch_table import BatchStatus
from serving.tenancy.ledger.usage_record import now_ms

if TYPE_CHECKING:
    from pathlib import Path

    from serving.batch.files import Files
    from serving.batch.line import LineRunner
    from serving.batch.pace import Pace
    from serving.batch.store import Batch, BatchStore, InputLine
    from serving.tenancy.keys import Keyring

_PAGE = 500
"""Lines that are read from the database at once."""
_GRACE_S = 30.0
"""Time for the lines that run when their batch is cancelled or expires."""

_LOOK_EVERY_S = 1.0
"""Longest time until a batch notices that it has expired."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Try:
    line: InputLine
    attempt: int = 1


class Job:
    """The work on one batch."""

    def __init__(
        self, batch: Batch, lines: LineRunner, *, store: BatchStore, files: Files, keys: Keyring, pace: Pace
    ) -> None:
        self.batch = batch
        self._lines = lines
        self._store = store
        self._files = files
        self._keys = keys
        self._pace = pace
        self._cancelled = asyncio.Event()
        self._lost = False
        self._exhausted: CaptionerError | None = None
        self._solo = False
        self._resume_s = 0.0
        self._changed = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()
        self._ready: deque[_Try] = deque()
        self._delayed: list[tuple[float, int, _Try]] = []
        self._numbers = itertools.count()
        self._failure: BaseException | None = None
        if batch.status == BatchStatus.CANCELLING:
            self._cancelled.set()

    def follow(self, status: str | None) -> None:
        """Follow the batch's status in the database; `None`: another process has the lease."""
        if status is None:
            self._lost = True
        elif status == BatchStatus.CANCELLING:
            self._cancelled.set()
        self._changed.set()

    async def run(self) -> str:
        """Work until the batch has ended; return its status.

        Raises `LeaseLost`; and `CaptionerError` and errors of the database, after which the batch is tried again.
        """
        batch, owner = self.batch, self._lines.owner
        if batch.status == BatchStatus.VALIDATING and not await self._validate():
            return BatchStatus.FAILED
        if batch.status != BatchStatus.FINALIZING:
            await self._caption_lines()
            await self._end_rest()
        output = await write_output(self._files, self._store, batch, completed=True)
        error = await write_output(self._files, self._store, batch, completed=False)
        finish = partial(self._store.finish, owner, batch.id, output_file_id=output, error_file_id=error)
        ended = await asyncio.to_thread(finish)
        if ended is None:
            raise LeaseLost
        return ended.status

    # ---- the input

    async def _validate(self) -> bool:
        """Check the input file and store its lines; return whether the batch goes on. Raises `LeaseLost`."""
        batch, lines = self.batch, self._lines
        rules = InputRules(batch.endpoint, lines.settings.model_names, lines.settings.max_body_bytes, lines.codec.parse)
        try:
            async with self._files.reading_input(batch.input_file_id, owner=batch.tenant_id) as path:
                found = await asyncio.to_thread(check_input, path, rules)
        except NotFound:
            errors = [_error("invalid_input_file", "The input file does not exist any more.")]
            return await self._unless_cancelled(
                partial(self._store.fail, lines.owner, batch.id, errors), going_on=False
            )
        if found.errors:
            return await self._unless_cancelled(
                partial(self._store.fail, lines.owner, batch.id, found.errors), going_on=False
            )
        begin = partial(self._store.begin_lines, lines.owner, batch.id, found.lines, found.model)
        return await self._unless_cancelled(begin, going_on=True)

    async def _unless_cancelled(self, change: partial[bool], *, going_on: bool) -> bool:
        """Make a change; return `going_on`, or True if the batch was cancelled meanwhile. Raises `LeaseLost`."""
        if await asyncio.to_thread(change):
            return going_on
        statuses = await asyncio.to_thread(self._store.renew, self._lines.owner, [self.batch.id], LEASE_S)
        if statuses.get(self.batch.id) != BatchStatus.CANCELLING:
            raise LeaseLost
        self._cancelled.set()
        return True

    # ---- the lines

    async def _caption_lines(self) -> None:
        """Caption lines until all have a result, or the batch is cancelled, expires, or may caption nothing more."""
        if self._cancelled.is_set():
            return
        async with self._files.reading_input(self.batch.input_file_id, owner=self.batch.tenant_id) as path:
            try:
                await self._start_lines(path)
                await self._finish_running(None if self._exhausted or not self._stops() else _GRACE_S)
            finally:
                for task in self._running:
                    task.cancel()
                if self._running:
                    await asyncio.wait(self._running)
        if self._lost:
            raise LeaseLost
        if self._failure is not None:
            raise self._failure

    async def _start_lines(self, path: Path) -> None:
        after, complete = 0, False
        while not self._stops():
            if not self._ready and not complete:
                page = await asyncio.to_thread(self._store.pending, self.batch.id, after=after, limit=_PAGE)
                complete = len(page) < _PAGE
                after = page[-1].number if page else after
                self._ready.extend(_Try(line) for line in page)
            if (next_try := self._next()) is not None:
                await self._start(next_try, path)
            elif self._ready or self._delayed or self._running:
                await self._wait()
            elif complete:
                return

    def _stops(self) -> bool:
        """Return whether no further line may start."""
        expired = (self.batch.expires_at or 0) <= now_ms()
        return bool(self._lost or self._cancelled.is_set() or self._exhausted or self._failure or expired)

    def _next(self) -> _Try | None:
        """Return the next line that may start now."""
        now_s = asyncio.get_running_loop().time()
        if now_s < self._resume_s or (self._solo and self._running):
            return None
        if self._delayed and self._delayed[0][0] <= now_s:
            return heapq.heappop(self._delayed)[2]
        return self._ready.popleft() if self._ready else None

    async def _wait(self) -> None:
        """Wait until a line may start: one has ended, or a delay has."""
        now_s = asyncio.get_running_loop().time()
        due_s = [due_s for due_s in (self._resume_s, *(each[0] for each in self._delayed[:1])) if due_s > now_s]
        self._changed.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), min(_LOOK_EVERY_S, min(due_s, default=now_s + 1) - now_s))

    async def _start(self, next_try: _Try, path: Path) -> None:
        if not await self._pace.turn(self._stops):
            return
        task = asyncio.create_task(self._run_line(next_try, path))
        self._running.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._pace.end()
        self._changed.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, LeaseLost):
                self._lost = True
            self._failure = self._failure or error

    async def _run_line(self, next_try: _Try, path: Path) -> None:
        line = next_try.line
        alone = len(self._running) == 1
        try:
            caller = self._keys.holder(self.batch.tenant_id, self.batch.key_id)
        except CaptionerError as error:
            self._exhausted = error
            return
        result = await self._lines.run(self.batch, line, path, caller, attempt=next_try.attempt, alone=alone)
        match result:
            case Finished(queue_s=queue_s):
                self._solo = False
                self._pace.waited(queue_s)
            case Exhausted(reason):
                self._exhausted = reason
                log.info("batch exhausted", extra={"batch": self.batch.id, "error": type(reason).__name__})
            case Later():
                self._delay(next_try, result)

    def _delay(self, delayed: _Try, later: Later) -> None:
        due_s = asyncio.get_running_loop().time() + later.after_s
        self._solo = self._solo or later.solo
        if later.overloaded:
            self._pace.overloaded()
        if later.all_lines:  # a limit or an overload is no fault of the line
            self._resume_s = max(self._resume_s, due_s)
        else:
            delayed.attempt += 1
        heapq.heappush(self._delayed, (due_s, next(self._numbers), delayed))

    async def _finish_running(self, within_s: float | None) -> None:
        if self._running and not self._lost:
            await asyncio.wait(self._running, timeout=within_s)

    # ---- the end

    async def _end_rest(self) -> None:
        """Give the lines that did not run their error, and note that none runs any more. Raises `LeaseLost`."""
        batch, owner = self.batch, self._lines.owner
        cancelled = self._cancelled.is_set()
        expired = not cancelled and not self._exhausted and (batch.expires_at or 0) <= now_ms()
        if self._exhausted is not None and not cancelled:
            rest = self._lines.failure(self._exhausted, batch.id)
        elif cancelled:
            rest = _not_run("batch_cancelled", "This request was not executed: the batch was cancelled.")
        else:
            rest = _not_run("batch_expired", "This request could not be executed before the completion window expired.")
        end = partial(self._store.end_lines, owner, batch.id, rest, expired=expired)
        if await asyncio.to_thread(end) is None:
            raise LeaseLost


def _error(code: str, message: str) -> dict[str, object]:
    return {"code": code, "line": None, "message": message, "param": None}


def _not_run(code: str, message: str) -> LineResult:
    error = orjson.dumps({"code": code, "message": message}).decode()
    return LineResult(completed=False, status_code=None, body=error)
