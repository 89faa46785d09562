"""Admission control of an engine: what may run now, what waits and in which order, what is rejected.

vLLM accepts every request. Overloaded, it preempts: it discards captions' context and computes it again. Its queue has
no bound, and the order of arrival. So admission control passes an engine only what it can run:

- as many captions as it generates at the same time, and a few more, so that a slot that becomes free is used at once;
- as many tokens of context as fit: the input's, and of the output what captions usually take (not `max_tokens`, whose
  default would let three captions fill a GPU), more once a caption takes more. Where captions exceed their estimates,
  no caption is admitted until there is capacity again;
- of clips over ten minutes one at a time until its first token: the engine would read them one after the other in any
  case, and the order among tenants is decided here.

Waiting captions are ordered by `FairQueue`: tenants share the engine in proportion to their weights, by tokens. The
output of a caption is not known when it is admitted; its tenant is charged the estimate, and the difference at its end.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from serving.engine.base import Load, context_tokens, ignore_start
from serving.errors import AudioTooLong, CaptionerError, EngineStalled, NotReady, Overloaded
from serving.scheduling.drain_rate import DrainRate
from serving.scheduling.fair_queue import FairQueue, shortest_first
from serving.scheduling.output_estimate import OutputEstimate
from serving.types import NO_TENANT, FinishReason

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from serving.config import Settings
    from serving.engine.base import Engine, EngineDelta
    from serving.types import Features, Sampling, SchedulingClass

_SLOTS_PER_EXTRA = 16
"""Slots of the engine for each caption that is admitted beyond them; at least one caption is."""

_GROWTH_TOKENS = 128
"""Further context that a caption reserves when it has used up its estimate."""

_OUTPUT_COST = 4
"""Cost of an output token in input tokens: the engine reads thousands in a step, and writes one of each caption.

The figure matters only where one tenant's clips are long and another's short. Prices per token are about equal, and a
caption of 30 s occupies its slot in the engine for some 400 steps of writing and a part of one step of reading.
"""

_VERY_LONG_TOKENS = 8192
"""Input tokens of a very long clip: ten minutes and a half."""

_STALL_TICKS = 20
"""Ticks of the watchdog until a stall. It counts ticks, not time, so a suspended process has not stalled."""

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Caption:
    """One caption in admission control. `reserved_tokens` is 0 until its admission."""

    scheduling_class: SchedulingClass
    arrived_s: float
    audio_s: float
    input_tokens: int
    cost: float
    max_output_tokens: int
    fixed_length: bool
    stops: bool
    """The client's own stop strings or tokens may end the caption: its length teaches nothing if it is short."""
    long: bool
    admitted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    output_tokens: int = 0
    reserved_tokens: int = 0


class AdmissionControl:
    """An `Engine` that passes captions on to another engine as that engine has capacity.

    At most `max_engine_queue` captions wait, at most `max_engine_wait_s` each; beyond either bound a caption is
    `Overloaded`. No tenant's captions fill the whole queue. Tenants share the engine; of one tenant's captions shorter
    clips go first, and a clip is overtaken only by clips that arrive within a delay in proportion to its length: half
    of `max_engine_wait_s` for the longest clip.

    Limit: under lasting overload the wait exceeds this delay. At f times the load that the engine can serve, the clips
    that overtake take f times the delay; the clip runs if that and the queue it finds take less than
    `max_engine_wait_s`, and is `Overloaded` otherwise. From an empty queue the longest clip runs up to f = 2, a clip
    of half its length up to f = 4.

    A watchdog fails everything as `EngineStalled`, permanently, when deltas are awaited and the engine has not taken a
    step for `engine_stall_timeout_s`. A client that does not read awaits none; a long prefill is many steps.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self._slots = settings.max_num_seqs + max(1, settings.max_num_seqs // _SLOTS_PER_EXTRA)
        patience_s = settings.max_engine_wait_s / 2
        self._queue: FairQueue[_Caption] = FairQueue(self._order, patience_s=patience_s, now_s=_now_s)
        self._running: set[_Caption] = set()
        self._kv_tokens = 0
        self._long_prefill: _Caption | None = None
        self._outputs = OutputEstimate()
        self._drain = DrainRate()
        self._awaited: set[asyncio.Timeout] = set()
        self._stalled_ticks = 0
        self._stalled = False
        self._watchdog: asyncio.Task[None] | None = None

    @property
    def load(self) -> Load:
        """See `Engine`. The tokens of context are the reserved ones."""
        waiting_s = sum(caption.audio_s for caption in self._queue)
        return Load(
            running=len(self._running),
            waiting=len(self._queue),
            audio_s=waiting_s + sum(caption.audio_s for caption in self._running),
            kv_tokens=self._kv_tokens,
            kv_capacity_tokens=self._engine.load.kv_capacity_tokens,
            waiting_audio_s=waiting_s,
        )

    @property
    def steps(self) -> int:
        """See `Engine`."""
        return self._engine.steps

    @property
    def longest_wait_s(self) -> float:
        """Wait so far of the caption that has waited longest, in seconds; 0 if none waits."""
        return _now_s() - min((caption.arrived_s for caption in self._queue), default=_now_s())

    @property
    def engine(self) -> Engine:
        """The engine behind admission control."""
        return self._engine

    @property
    def stalled_s(self) -> float:
        """Time without a step while deltas are awaited, in seconds; 0 if the engine works or is idle."""
        ticks = _STALL_TICKS if self._stalled else self._stalled_ticks
        return ticks * self._settings.engine_stall_timeout_s / _STALL_TICKS

    async def start(self) -> None:
        """See `Engine`."""
        await self._engine.start()
        self._watchdog = asyncio.create_task(self._watch_steps())

    async def check_health(self) -> None:
        """See `Engine`. Raises `EngineStalled` once the engine has made no progress."""
        if self._stalled:
            raise EngineStalled
        await self._engine.check_health()

    async def stop(self) -> None:
        """See `Engine`. Waiting captions raise `NotReady`."""
        if self._watchdog:
            self._watchdog.cancel()
            await asyncio.wait((self._watchdog,))
        self._reject_all(NotReady())
        await self._engine.stop()

    async def generate(
        self,
        request_id: str,
        features: Features,
        sampling: Sampling,
        scheduling_class: SchedulingClass = NO_TENANT,
        on_started: Callable[[], None] = ignore_start,
    ) -> AsyncGenerator[EngineDelta]:
        """See `Engine`. Also raises `Overloaded`, and `AudioTooLong` for a clip that does not fit even alone."""
        await self.check_health()
        caption = self._caption(features, sampling, scheduling_class)
        try:
            await self._wait_for_admission(caption)
            on_started()
            queue_s = _now_s() - caption.arrived_s
            async with aclosing(self._engine.generate(request_id, features, sampling, scheduling_class)) as deltas:
                del features  # 123 MB for the longest clip, not needed once sent
                while delta := await self._next_delta(deltas):
                    self._account(caption, delta)
                    yield replace(delta, queue_s=queue_s) if queue_s else delta
                    queue_s = 0.0
        finally:
            self._release(caption)

    def _caption(self, features: Features, sampling: Sampling, scheduling_class: SchedulingClass) -> _Caption:
        input_tokens, capacity_tokens = context_tokens(features), self._engine.load.kv_capacity_tokens
        if input_tokens >= capacity_tokens:
            raise AudioTooLong(
                f"The audio is too long: it takes {input_tokens} tokens of the engine's context of {capacity_tokens}."
            )
        caption = _Caption(
            scheduling_class=scheduling_class,
            arrived_s=_now_s(),
            audio_s=features.duration_s,
            input_tokens=input_tokens,
            cost=0,
            max_output_tokens=min(sampling.max_tokens, max(1, self._settings.max_model_len - input_tokens)),
            fixed_length=sampling.ignore_eos,
            stops=sampling.steers_length,
            long=input_tokens > _VERY_LONG_TOKENS,
        )
        caption.cost = _cost(caption, self._expected_tokens(caption) - input_tokens)
        return caption

    def _order(self, caption: _Caption) -> float:
        """Return the sort key of a tenant's waiting captions."""
        return shortest_first(
            caption.arrived_s,
            caption.audio_s,
            longest_s=self._settings.max_audio_s,
            patience_s=self._settings.max_engine_wait_s / 2,
        )

    async def _wait_for_admission(self, caption: _Caption) -> None:
        """Enqueue the caption and return once it is admitted. Raises `Overloaded`."""
        self._queue.add(caption)
        self._admit()
        if caption.admitted.done():
            return
        if not self._queue.fits(caption, self._settings.max_engine_queue):
            raise self._overloaded("engine_queue")
        try:
            async with asyncio.timeout(self._settings.max_engine_wait_s):
                await caption.admitted
        except TimeoutError:
            raise self._overloaded("engine_wait") from None

    def _overloaded(self, reason: str) -> Overloaded:
        backlog_s = sum(caption.audio_s for caption in self._queue)
        return Overloaded(retry_after_s=self._drain.retry_after_s(backlog_s, _now_s()), reason=reason)

    def _admit(self) -> None:
        """Admit captions while there is capacity. To be called whenever capacity may have become free."""
        while len(self._running) < self._slots and (caption := self._next_admissible()):
            self._queue.dequeue(caption)
            self._running.add(caption)
            self._reserve(caption, self._expected_tokens(caption))
            if caption.long:
                self._long_prefill = caption
            self._drain.add(caption.audio_s, _now_s())
            if not caption.admitted.done():
                caption.admitted.set_result(None)

    def _next_admissible(self) -> _Caption | None:
        """Return the next caption in order if its context fits, else None.

        No caption overtakes one that waits for context, or that one would starve.
        """
        capacity_tokens = self._engine.load.kv_capacity_tokens
        for caption in self._queue.in_order():
            if not (caption.long and self._long_prefill):
                fits = self._kv_tokens + self._expected_tokens(caption) <= capacity_tokens
                return caption if fits or not self._running else None
        return None

    def _expected_tokens(self, caption: _Caption) -> int:
        """Return the estimated context of the caption, at most the engine's capacity."""
        output_tokens = caption.max_output_tokens
        if not caption.fixed_length:
            output_tokens = min(output_tokens, self._outputs.tokens)
        return min(caption.input_tokens + output_tokens, self._engine.load.kv_capacity_tokens)

    def _reserve(self, caption: _Caption, tokens: int) -> None:
        self._kv_tokens += tokens - caption.reserved_tokens
        caption.reserved_tokens = tokens

    async def _next_delta(self, deltas: AsyncGenerator[EngineDelta]) -> EngineDelta | None:
        """Return the next delta, None at the end. Raises `EngineStalled` if the watchdog finds a stall."""
        if not self._awaited:
            self._stalled_ticks = 0
        async with asyncio.timeout(None) as timeout:
            self._awaited.add(timeout)
            try:
                return await anext(deltas, None)
            except asyncio.CancelledError:
                if timeout.expired():
                    raise EngineStalled from None
                raise
            finally:
                self._awaited.discard(timeout)
                # A timeout refers to its task; a cancelled task keeps the traceback, so this frame, so the features.
                del timeout

    def _account(self, caption: _Caption, delta: EngineDelta) -> None:
        """Account for a delta; release the caption's slot at the last one."""
        self._stalled_ticks = 0
        caption.output_tokens += delta.tokens
        if delta.finish_reason is not None:
            if not caption.fixed_length:
                cut = caption.stops or delta.finish_reason is not FinishReason.STOP
                self._outputs.update(caption.output_tokens, cut=cut)
            self._release(caption)
            return
        used_tokens = caption.input_tokens + caption.output_tokens
        if used_tokens > caption.reserved_tokens:
            most_tokens = caption.input_tokens + caption.max_output_tokens
            self._reserve(caption, max(used_tokens, min(caption.reserved_tokens + _GROWTH_TOKENS, most_tokens)))
            self._queue.correct_cost(caption, _cost(caption, caption.reserved_tokens - caption.input_tokens))
        if self._long_prefill is caption:
            self._long_prefill = None
            self._admit()

    def _release(self, caption: _Caption) -> None:
        """Release the caption's slot, context and position in the queue. Idempotent."""
        if caption in self._running:
            self._running.remove(caption)
            # The actual cost replaces the estimate. A caption that was cut before the engine had read its input is
            # charged for the input too.
            self._queue.correct_cost(caption, _cost(caption, caption.output_tokens))
        self._queue.discard(caption)
        self._reserve(caption, 0)
        if self._long_prefill is caption:
            self._long_prefill = None
        self._admit()

    async def _watch_steps(self) -> None:
        steps = 0
        while not self._stalled:
            await asyncio.sleep(self._settings.engine_stall_timeout_s / _STALL_TICKS)
            before, steps = steps, self._engine.steps
            self._stalled_ticks = self._stalled_ticks + 1 if self._awaited and steps == before else 0
            if self._stalled_ticks > _STALL_TICKS:
                self._fail_stalled()

    def _fail_stalled(self) -> None:
        log.error("engine stalled", extra={"running": len(self._running), "waiting": len(self._queue)})
        self._stalled = True
        self._reject_all(EngineStalled())
        for timeout in self._awaited:
            timeout.reschedule(_now_s())

    def _reject_all(self, error: CaptionerError) -> None:
        for caption in self._queue.clear():
            if not caption.admitted.done():
                caption.admitted.set_exception(error)


def _cost(caption: _Caption, output_tokens: int) -> float:
    return caption.input_tokens + _OUTPUT_COST * output_tokens


def _now_s() -> float:
    return asyncio.get_running_loop().time()
