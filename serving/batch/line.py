"""One line of a batch: from its bytes in the input file to its result, through the path of every caption.

The order that makes a line's result and its bill one: the record is opened under the id of batch and line; the caption
is made; the bill is computed; result, record and sums are committed in one transaction; then the ledger closes the
record. A process that is killed

- before the commit leaves an open record, which is closed as lost and unbilled; the line is captioned again, under the
  same id, and its record replaces the lost one;
- after the commit leaves an open record in its journal, which changes nothing: the database has the closed record.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import orjson
from sqlalchemy.exc import SQLAlchemyError

from serving import errors
from serving.batch.input_file import read_line
from serving.batch.store import LineResult
from serving.errors import CaptionerError, InvalidRequest
from serving.observability.request_record import RequestRecord
from serving.types import Outcome, SchedulingClass

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from serving.batch.store import Batch, BatchStore, InputLine
    from serving.config import Settings
    from serving.observability.metrics import Metrics
    from serving.pipeline import CaptionPipeline
    from serving.scheduling.shared_capacity import SharedCapacity
    from serving.tenancy.ledger.usage_record import UsageRecord
    from serving.tenancy.usage_session import UsageSession, UsageSessions
    from serving.timeline.captions import Timelines
    from serving.types import Caller, CaptionDelta, CaptionRequest

log = logging.getLogger(__name__)

_PRIORITY = 1000
"""Lines of every tenant are served after the captions of all tenants, whose priorities differ by 200 at most."""

_HEADERS = {"x-dashscope-ossresourceresolve": "enable"}
"""A line has no headers: `oss://` addresses are resolved without one."""

MAX_ATTEMPTS = 3
"""Attempts of a line that fails by a fault of the service, or of the server of its URL."""
_RETRY_S = 5.0
_COMMIT_RETRY_S = 1.0

_DECODER = ThreadPoolExecutor(1, "decode-line")
"""One thread, as for requests: the parser holds the interpreter."""


class LineReply(Protocol):
    """Renderer of a caption."""

    stream: bool

    def full_body(self, text: str, last: CaptionDelta) -> bytes: ...


class LineError(Protocol):
    """A rendered error."""

    @property
    def status(self) -> int: ...

    @property
    def body(self) -> bytes: ...


class LineCodec(Protocol):
    """The dialect of a line's body: OpenAI's chat completions."""

    def decode_request(
        self, body: bytes, headers: Mapping[str, str], request_id: str
    ) -> tuple[CaptionRequest, LineReply]: ...

    def error(self, error: CaptionerError, request_id: str) -> LineError: ...

    def parse(self, body: bytes) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Later:
    """The line has no result yet, and may be tried again after `after_s`.

    `all_lines`: other lines of the batch would have none before, either. `overloaded`: because of the service's load.
    `solo`: because of a budget that other lines may hold; the next one is tried when no other line runs.
    """

    after_s: float
    all_lines: bool = True
    overloaded: bool = False
    solo: bool = False


@dataclass(frozen=True, slots=True)
class Exhausted:
    """The caller may caption nothing more: the rest of the batch would end with the same error."""

    error: CaptionerError


@dataclass(frozen=True, slots=True)
class Finished:
    """The line has its result."""

    completed: bool
    queue_s: float


class LeaseLost(Exception):  # noqa: N818 - as the errors of `serving.errors`
    """Another process works on the batch, or the result of a line is stored already."""


@dataclass(frozen=True, slots=True)
class LineRunner:
    """Runs lines over the components of this process. `owner`: this process in the leases."""

    owner: str
    settings: Settings
    pipeline: CaptionPipeline
    timelines: Timelines
    sessions: UsageSessions
    bodies: SharedCapacity
    metrics: Metrics
    store: BatchStore
    codec: LineCodec
    stopping: asyncio.Event
    """Set when the process stops: results that the database does not take are given up."""

    async def run(
        self, batch: Batch, line: InputLine, path: Path, caller: Caller, *, attempt: int, alone: bool
    ) -> Finished | Later | Exhausted:
        """Caption one line of the batch's input file at `path`.

        `alone`: no other line of the batch runs, so none of them holds a part of a budget. Raises `LeaseLost`.
        """
        caller = replace(caller, scheduling_class=background(caller.scheduling_class))
        record = RequestRecord(line_id(batch, line), "batch", caller=caller.tenant_id)
        record.caption = [] if caller.log_content else None
        commit = _Commit(self, batch, line)
        error: CaptionerError | None = None
        try:
            async with self._session(caller, record, commit) as session:
                try:
                    await session.admit()
                    commit.result = await self._caption(record, session, line, path)
                except CaptionerError as raised:
                    if _ends_line(raised, attempt):
                        commit.result = self.failure(raised, record.request_id)
                    raise
        except CaptionerError as raised:
            error = raised
        except Exception:
            log.exception("unexpected failure", extra={"request_id": record.request_id})
            error = errors.Internal()
            if attempt >= MAX_ATTEMPTS:
                commit.result = self.failure(error, record.request_id)
        if commit.result is not None and not commit.tried:  # nothing was metered
            await commit.store(None)
        self.metrics.batches.finish_line(record, error, stored=commit.stored)
        if commit.stored and commit.result is not None:
            return Finished(commit.result.completed, record.stages_s.get("engine_queue", 0.0))
        if commit.result is not None:
            raise LeaseLost
        return _unfinished(error or errors.Internal(), alone=alone)

    def _session(self, caller: Caller, record: RequestRecord, commit: _Commit) -> UsageSession:
        return self.sessions.session(caller, record, commit=commit, price_percent=caller.batch_price_percent)

    def failure(self, error: CaptionerError, request_id: str) -> LineResult:
        """Return the result of a line that ends with this error."""
        rendered = self.codec.error(error, request_id)
        return LineResult(completed=False, status_code=rendered.status, body=rendered.body.decode())

    async def _caption(self, record: RequestRecord, session: UsageSession, line: InputLine, path: Path) -> LineResult:
        with self.bodies.permit(session.caller.scheduling_class) as permit:
            permit.grow(line.length)
            decode = partial(self._decode, path, line, record.request_id)
            request, reply = await asyncio.get_running_loop().run_in_executor(_DECODER, decode)
            record.audio_form = type(request.audio).__name__.removesuffix("Audio").lower()
            caption = self.pipeline.caption if request.timeline is None else self.timelines.caption
            deltas = caption(
                request, record, session, deadline_s=self.settings.stream_timeout_s, on_prepared=permit.release
            )
            del request  # it holds the encoded audio
            pieces: list[str] = []
            last: CaptionDelta | None = None
            async with aclosing(deltas):
                async for last in deltas:
                    pieces.append(last.text)
        if last is None:
            raise errors.Internal
        return LineResult(completed=True, status_code=200, body=reply.full_body("".join(pieces), last).decode())

    def _decode(self, path: Path, line: InputLine, request_id: str) -> tuple[CaptionRequest, LineReply]:
        """Decode a line. Blocking."""
        body = orjson.dumps(self.codec.parse(read_line(path, line))["body"])
        request, reply = self.codec.decode_request(body, _HEADERS, request_id)
        if reply.stream:
            raise InvalidRequest("stream is not supported in a batch.", param="stream")
        return request, reply


class _Commit:
    """The commit of one line's result: see `UsageSession`."""

    def __init__(self, runner: LineRunner, batch: Batch, line: InputLine) -> None:
        self.result: LineResult | None = None
        self.tried = self.stored = False
        self._runner = runner
        self._batch = batch
        self._line = line

    async def __call__(self, record: UsageRecord, outcome: Outcome) -> Outcome:
        if self.result is None:
            return Outcome.LOST
        return outcome if await self.store(record.closed_row(outcome)) else Outcome.LOST

    async def store(self, usage: dict[str, Any] | None) -> bool:
        """Store the result; return whether this process has stored it. A database that is away is waited for."""
        self.tried = True
        result = self.result
        if result is None:
            return False
        runner = self._runner
        finish = partial(runner.store.finish_line, runner.owner, self._batch.id, self._line.number, result, usage)
        while True:
            try:
                self.stored = await asyncio.to_thread(finish)
            except SQLAlchemyError as error:
                if runner.stopping.is_set():
                    return False
                log.warning("result of a line waits for the database", extra={"error": type(error).__name__})
                await asyncio.sleep(_COMMIT_RETRY_S)
            else:
                return self.stored


def line_id(batch: Batch, line: InputLine) -> str:
    """Return the id of a line's request and usage record: one for all attempts."""
    return f"{batch.id}-{line.number}"


def background(of: SchedulingClass) -> SchedulingClass:
    """Return the class of a tenant's lines: after all captions, and with a share apart from the tenant's captions."""
    return SchedulingClass(f"{of.tenant}/batch", of.weight, of.priority - _PRIORITY)


_EXHAUSTED = (
    errors.BudgetExhausted,
    errors.AccessDenied,
    errors.Arrearage,
    errors.Unauthenticated,
)
_WAITS = (errors.RateLimited, errors.Overloaded, errors.NotReady, errors.StorageUnavailable)
_RETRIED = (errors.ServerError, errors.SourceUnavailable)

_HELD_BUDGET_S = 2
"""`retry_after_s` up to which a budget is not used up, but held by requests under way."""


def _ends_line(error: CaptionerError, attempt: int) -> bool:
    """Return whether the error is the line's result, rather than a reason to try again or to end the batch."""
    if isinstance(error, (*_EXHAUSTED, *_WAITS)):
        return False
    return not isinstance(error, _RETRIED) or attempt >= MAX_ATTEMPTS


def _unfinished(error: CaptionerError, *, alone: bool) -> Later | Exhausted:
    if isinstance(error, _EXHAUSTED):
        held = isinstance(error, errors.BudgetExhausted) and error.retry_after_s <= _HELD_BUDGET_S
        may_be_held = isinstance(error, (errors.BudgetExhausted, errors.FreeTierExhausted)) and not alone
        return Later(_HELD_BUDGET_S, solo=True) if held or may_be_held else Exhausted(error)
    if isinstance(error, errors.RateLimited):
        return Later(float(error.retry_after_s))
    if isinstance(error, errors.Overloaded):
        return Later(float(error.retry_after_s), overloaded=True)
    if isinstance(error, _WAITS):
        return Later(_RETRY_S, overloaded=True)
    return Later(_RETRY_S, all_lines=False)
