"""The usage of one request: its reservation of limits and its ledger record, opened together and settled once."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Protocol, Self

from serving.scheduling.output_estimate import TenantOutputEstimates
from serving.tenancy.ledger.usage_record import UsageRecord, is_billed, now_ms
from serving.tenancy.limits.counter_store import nanos_to_pay
from serving.tenancy.limits.spending import Amounts
from serving.types import FinishReason, Outcome, Usage, billed_audio_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping
    from types import TracebackType

    from serving.observability.request_record import RequestRecord
    from serving.tenancy.billing.prices import Price
    from serving.tenancy.ledger.ledger import Ledger
    from serving.tenancy.limits.counter_store import Reservation
    from serving.tenancy.limits.limiter import Limiter
    from serving.types import Caller, CaptionRequest, Region


log = logging.getLogger(__name__)

_SMALLEST_INPUT_TOKENS = Usage(billed_audio_tokens(0)).input_tokens
"""Billed input of the shortest clip: budgets that do not leave it and one output token refuse every request."""


class UsageSessions:
    """Makes the usage sessions of one process and keeps what they share: limits, ledger, prices, output estimates."""

    def __init__(
        self, limiter: Limiter, ledger: Ledger, prices: Callable[[Region, int], Price], *, metering: bool = True
    ) -> None:
        self.limiter = limiter
        self.ledger = ledger
        self.prices = prices
        self.metering = metering
        self.outputs = TenantOutputEstimates()
        self._settling: set[asyncio.Task[None]] = set()

    def session(
        self, caller: Caller, request: RequestRecord, *, commit: Commit | None = None, price_percent: int = 100
    ) -> UsageSession:
        """Return a session for one request, at that part of the price, which nothing is reserved for yet."""
        return UsageSession(self, caller, request, commit, price_percent)

    def run(self, settlement: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Settle a session in its own task, so that a cancelled request does not cut its settlement."""
        task = asyncio.create_task(settlement)
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)
        return task

    async def stop(self) -> None:
        """Wait until every request that has ended is settled."""
        if self._settling:
            await asyncio.wait(self._settling)


class Commit(Protocol):
    """Storage of a request's result together with its usage record."""

    async def __call__(self, record: UsageRecord, outcome: Outcome) -> Outcome:
        """Store both in one transaction; return the outcome with which the ledger closes the record."""
        ...


class UsageSession:
    """Limits and ledger of one request. A context: nothing is reserved before `admit`, and nothing after its exit.

        admit (before the body is read) ─► open (decoded, has a slot) ─► charge (length known) ─► settle

    A request that is refused before `open` counts as a request of the minute and leaves no record. From `open` on the
    exception that leaves the context, or its absence, decides the bill.

    A `commit` is awaited once the bill is known, and before the ledger closes the record. If it returns `LOST`, or
    raises, the record is closed as lost and unbilled: a line of a batch is captioned again under the same request id,
    and its record replaces the lost one.
    """

    def __init__(
        self,
        sessions: UsageSessions,
        caller: Caller,
        request: RequestRecord,
        commit: Commit | None = None,
        price_percent: int = 100,
    ) -> None:
        self.caller = caller
        self._sessions = sessions
        self._request = request
        self.commit = commit
        self._price_percent = price_percent
        self._max_tokens = 0
        self._captions = 1
        self._steers_length = False
        self._admitted_at = 0
        self._started = False
        self._reservation: Reservation | None = None
        self._record: UsageRecord | None = None
        self._settlement: asyncio.Task[None] | None = None

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers of the response that state the caller's limits."""
        return self._reservation.headers if self._reservation else {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.settle(error)

    async def admit(self) -> None:
        """Count the request. Raises `RateLimited`, `AccessDenied`; `Overloaded` if the spending cannot be read.

        This moment decides the price, and the day and the month in which the request counts.
        """
        if not self._sessions.metering:
            return
        self._admitted_at = at = now_ms()
        self._price = price = self._sessions.prices(self.caller.region, at).at_percent(self._price_percent)
        self._reservation = await self._sessions.limiter.admit(
            self.caller, at_ms=at, currency=price.currency, smallest=_amounts(price, _SMALLEST_INPUT_TOKENS, 1)
        )

    def open(self, caption: CaptionRequest) -> None:
        """Open the record of the decoded request. Raises `Overloaded` if the ledger is full."""
        if not self._sessions.metering:
            return
        if self._reservation is None:
            raise RuntimeError("UsageSession.open was called before admit")
        self._max_tokens, self._steers_length = caption.sampling.max_tokens, caption.sampling.steers_length
        record = self._new_record(caption.model)
        self._sessions.ledger.open(record, self._request)
        self._record = record

    async def charge(self, *, captions: int = 1) -> int | None:
        """Reserve what the decoded audio may use. Raises `RateLimited`, `AccessDenied`.

        Returns the most output tokens that all `captions` of the audio may have together, at most their `max_tokens`:
        budgets reserve what can be written, not what is expected. `None`: nothing is metered.
        """
        request, sessions = self._request, self._sessions
        if not sessions.metering:
            return None
        if self._reservation is None or self._record is None or request.usage is None:
            raise RuntimeError("UsageSession.charge was called before open, or before the audio was decoded")
        self._captions = captions
        amounts = _amounts(
            self._price,
            request.usage.input_tokens,
            captions * self._max_tokens,
            audio_ms=round(1000 * request.audio_s),
            expected_output_tokens=captions * min(self._max_tokens, sessions.outputs.tokens(self.caller.tenant_id)),
        )
        return await sessions.limiter.charge(self._reservation, amounts)

    def start(self) -> None:
        """Note that the engine has started on the caption: from now on a caller that leaves pays. Idempotent."""
        self._started = True
        if self._record is not None and self._record.prepared_at is None:
            self._record.prepared_at = now_ms()

    def _new_record(self, model: str) -> UsageRecord:
        caller, request, price = self.caller, self._request, self._price
        return UsageRecord(
            request_id=request.request_id,
            tenant_id=caller.tenant_id,
            key_id=caller.key_id,
            region=caller.region.value,
            dialect=request.dialect,
            model=model,
            stream=request.stream,
            audio_form=request.audio_form,
            replica=self._sessions.ledger.replica,
            currency=price.currency,
            input_price=str(price.input_price),
            output_price=str(price.output_price),
            opened_at=self._admitted_at,
            reported_at=now_ms(),
        )

    async def settle(self, error: BaseException | None) -> None:
        """Release what was reserved and not used, and close the record, once; return when that is done.

        `error` is the exception that ended the request. If the caller is cancelled meanwhile, the settlement goes on.
        """
        if self._reservation is None:
            if not self._sessions.metering:  # metrics count what would be billed
                outcome, _ = self._request.conclude(error)
                billed = is_billed(outcome, given_to_engine=self._started)
                self._request.billed = self._request.usage if billed else None
            return
        if self._settlement is None:
            outcome, _ = self._request.conclude(error)
            self._settlement = self._sessions.run(self._settle(self._reservation, outcome))
        await asyncio.shield(self._settlement)

    async def _settle(self, reservation: Reservation, outcome: Outcome) -> None:
        request, record, sessions = self._request, self._record, self._sessions
        if record is None:
            await sessions.limiter.settle(reservation, tokens=0, nanos=0)
            return
        record.follow(request)
        if outcome in {Outcome.FINISHED, Outcome.PARTIAL}:
            # A cumulative stream may end before the caption does, at the longest line that clients read.
            record.finish_reason = str(request.finish_reason or FinishReason.LENGTH)
            # Nor is it known how long a caption would have been whose length the client's parameters may decide.
            cut = self._steers_length or record.finish_reason != FinishReason.STOP
            sessions.outputs.update(record.tenant_id, record.output_tokens // self._captions, cut=cut)
        record.billed = is_billed(outcome, given_to_engine=self._started)
        try:
            tokens = record.total_tokens if record.billed else 0
            nanos = self._price.amount_nanos(record.input_tokens, record.output_tokens) if record.billed else 0
            record.free_tokens = await sessions.limiter.settle(reservation, tokens=tokens, nanos=nanos)
            if record.billed:
                record.amount_nanos = nanos_to_pay(nanos, record.free_tokens, tokens)
            if self.commit is not None:
                outcome = await self._committed(self.commit, record, outcome)
            if record.billed:
                request.billed = request.usage
                request.billed_nanos, request.currency = record.amount_nanos, record.currency
        finally:
            sessions.ledger.close(record, outcome)

    @staticmethod
    async def _committed(commit: Commit, record: UsageRecord, outcome: Outcome) -> Outcome:
        """Commit the result; return the outcome with which the record is closed."""
        closed = Outcome.LOST
        try:
            closed = await commit(record, outcome)
        except Exception:
            log.exception("result not stored", extra={"request_id": record.request_id})
        if closed is Outcome.LOST:
            record.billed, record.free_tokens, record.amount_nanos = False, 0, 0
        return closed


def _amounts(
    price: Price, input_tokens: int, max_output_tokens: int, *, audio_ms: int = 0, expected_output_tokens: int = 0
) -> Amounts:
    return Amounts(
        audio_ms=audio_ms,
        input_tokens=input_tokens,
        expected_output_tokens=expected_output_tokens,
        max_output_tokens=max_output_tokens,
        input_nanos=input_tokens * price.input_nanos,
        output_token_nanos=price.output_nanos,
        min_token_nanos=min(price.input_nanos, price.output_nanos),
    )
