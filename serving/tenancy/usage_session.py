"""Limits and ledger as one step: what is admitted is reserved and recorded, and settled once on every way out."""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from typing import TYPE_CHECKING, Self

from serving.tenancy.ledger.usage_record import Ending, UsageRecord, ending_of, is_billed, now_ms
from serving.tenancy.limits.limiter import not_free
from serving.types import FinishReason

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from serving.observability.request_record import RequestRecord
    from serving.tenancy.billing.prices import Price
    from serving.tenancy.ledger.ledger import Ledger
    from serving.tenancy.limits.limiter import Lease, Limiter
    from serving.types import Caller, CaptionRequest, Region

_FIRST_ESTIMATE_TOKENS = 450.0
"""Captions of the real model have 300 to 600 tokens."""

_TENANTS = 4096
"""Of so many tenants, those seen last, one knows how long their captions are."""


class Admissions:
    """Admits requests: one for all of a process, since it learns how long each tenant's captions are."""

    def __init__(
        self, limiter: Limiter, ledger: Ledger, prices: Callable[[Region, int], Price], *, metering: bool = True
    ) -> None:
        self.limiter = limiter
        self.ledger = ledger
        self.prices = prices
        self.metering = metering
        self._output_tokens: OrderedDict[str, float] = OrderedDict()
        self._settling: set[asyncio.Task[None]] = set()

    def settle(self, admission: Admission, error: BaseException | None) -> asyncio.Task[None]:
        """Settle a request in a task of its own, so that nothing that cancels the request cuts its bill."""
        task = asyncio.create_task(admission.close(error))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)
        return task

    async def stop(self) -> None:
        """Wait until every request that has ended is settled."""
        if self._settling:
            await asyncio.wait(self._settling)

    def of(self, caller: Caller, record: RequestRecord, request: CaptionRequest) -> Admission:
        """The admission of one request, not yet asked for."""
        return Admission(self, caller, record, model=request.model, max_tokens=request.sampling.max_tokens)

    def expected_tokens(self, tenant_id: str, max_tokens: int) -> int:
        """Output to reserve for a caption: what its tenant's usually take, since `max_tokens` is mostly far more."""
        return min(max_tokens, math.ceil(self._output_tokens.get(tenant_id, _FIRST_ESTIMATE_TOKENS)))

    def learn(self, tenant_id: str, output_tokens: int, finish_reason: str) -> None:
        """A caption has come to its end. One that was cut short does not tell how long it would have been."""
        expected = self._output_tokens.pop(tenant_id, _FIRST_ESTIMATE_TOKENS)
        if finish_reason == FinishReason.STOP or output_tokens >= expected:
            expected += (output_tokens - expected) / 16
        self._output_tokens[tenant_id] = expected
        if len(self._output_tokens) > _TENANTS:
            self._output_tokens.popitem(last=False)


class Admission:
    """One request before limits and ledger. A context: nothing is held before `admit`, nor after it is left.

    How it is left decides the bill: by itself, or by the exception that ended the request.
    """

    def __init__(
        self, admissions: Admissions, caller: Caller, request: RequestRecord, *, model: str, max_tokens: int
    ) -> None:
        self.caller = caller
        self.headers: Mapping[str, str] = {}
        """What the answer tells of the caller's limits."""
        self._admissions = admissions
        self._request = request
        self._model = model
        self._max_tokens = max_tokens
        self._lease: Lease | None = None
        self._record: UsageRecord | None = None
        self._settled: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.settle(error)

    async def admit(self) -> None:
        """Reserve and record. Raises `RateLimited`, `AccessDenied`, and `Overloaded` when the ledger is full."""
        if not self._admissions.metering:
            return
        self._lease = await self._admissions.limiter.admit(self.caller, self._request.request_id)
        self.headers = self._lease.headers
        record = self._new_record()
        self._admissions.ledger.open(record, self._request)
        self._record = record

    async def charge(self) -> None:
        """The audio is decoded; may it go to the engine? Raises `RateLimited`, `AccessDenied`."""
        request, record = self._request, self._record
        if not self._admissions.metering:
            return
        if self._lease is None or record is None or request.usage is None:
            raise RuntimeError("charged before it was admitted")
        output_tokens = self._admissions.expected_tokens(self.caller.tenant_id, self._max_tokens)
        await self._lease.charge(
            audio_s=request.audio_s,
            input_tokens=request.usage.input_tokens,
            output_tokens=output_tokens,
            nanos=self._price.amount_nanos(request.usage.input_tokens, output_tokens),
        )
        self.headers = self._lease.headers
        record.prepared_at = now_ms()

    def _new_record(self) -> UsageRecord:
        caller, request, at = self.caller, self._request, now_ms()
        self._price = price = self._admissions.prices(caller.region, at)
        return UsageRecord(
            request_id=request.request_id,
            tenant_id=caller.tenant_id,
            key_id=caller.key_id,
            region=caller.region.value,
            dialect=request.dialect,
            model=self._model,
            stream=request.stream,
            audio_form=request.audio_form,
            replica=self._admissions.ledger.replica,
            currency=price.currency,
            input_price=str(price.input_price),
            output_price=str(price.output_price),
            opened_at=at,
            reported_at=at,
        )

    async def settle(self, error: BaseException | None) -> None:
        """Release what was reserved and not used, and close the record, once; return when that is done.

        `error` is what has ended the request. A caller that is cancelled meanwhile leaves, and the settling goes on.
        """
        if self._lease is None:
            return
        if self._settled is None:
            self._settled = self._admissions.settle(self, error)
        await asyncio.shield(self._settled)

    async def close(self, error: BaseException | None) -> None:
        """Settle the bill; see `settle`, which calls it once."""
        request, record, lease = self._request, self._record, self._lease
        if lease is None:
            return
        if record is None:
            await lease.settle(tokens=0, nanos=0)
            return
        record.follow(request)
        ending = ending_of(error, partial=request.partial, generated=request.first_token is not None)
        if ending in {Ending.FINISHED, Ending.PARTIAL}:
            # A cumulative stream may end before the caption does, at the longest line that clients read.
            record.finish_reason = str(request.finish_reason or FinishReason.LENGTH)
            self._admissions.learn(record.tenant_id, record.output_tokens, record.finish_reason)
        record.billed = is_billed(ending, given_to_engine=record.prepared_at is not None)
        try:
            tokens = record.total_tokens if record.billed else 0
            nanos = self._price.amount_nanos(record.input_tokens, record.output_tokens) if record.billed else 0
            record.free_tokens = await lease.settle(tokens=tokens, nanos=nanos)
            if record.billed:
                record.amount_nanos = not_free(nanos, record.free_tokens, tokens)
                request.billed_nanos, request.currency = record.amount_nanos, record.currency
        finally:
            self._admissions.ledger.close(record, ending)
