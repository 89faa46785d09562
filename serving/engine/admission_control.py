"""Admission in front of an engine: what may run now, what waits and in which order, what is refused.

vLLM takes whatever it is given. Given too much it preempts: it throws away captions' context and computes it again. Its
queue has no bound, and the order of arrival. So an engine gets from here only what it can run:

- as many captions as it generates at the same time, and a few more, so that a place which falls free is taken at once;
- as many tokens of context as fit: the input's, and of the output what captions usually take (not `max_tokens`, whose
  default would let three captions fill a GPU), more once a caption takes more. Where captions outgrow what was expected
  of them nothing new is admitted until there is room again;
- of clips over ten minutes one at a time until its first token: the engine would read one after the other all the same,
  and whose turn it is among tenants is decided here.

What waits gets its turn by `line.FairLine`: tenants share the engine in proportion to their weights, by tokens. What a
caption writes is not known when its turn comes; its tenant pays what is expected, and the difference when it has ended.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from serving.engine.base import Load, context_tokens
from serving.errors import AudioTooLong, CaptionerError, EngineStalled, NotReady, Overloaded
from serving.scheduling.drain_rate import DrainRate
from serving.scheduling.fair_queue import FairQueue, shortest_first
from serving.scheduling.output_estimate import OutputEstimate
from serving.types import NO_TENANT, FinishReason

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from serving.config import Settings
    from serving.engine.base import Engine, EngineDelta
    from serving.types import Features, Sampling, SchedulingClass

_SURPLUS = 16
"""One caption in so many is admitted beyond what the engine runs at the same time, at least one."""

_GROWTH_TOKENS = 128
"""Context that a caption reserves further when it has used up what was expected of it."""

_OUTPUT_COST = 4
"""A token written costs as much as so many read: the engine reads thousands in a step, and writes one of each caption.

Only where one tenant's clips are long and another's short does the figure matter. Prices per token are about equal,
and a caption of 30 s takes its place in the engine for some 400 steps of writing and a part of one of reading.
"""

_VERY_LONG_TOKENS = 8192
"""Ten minutes and a half."""

_STALL_TICKS = 20
"""The watchdog counts its own ticks rather than time: a process that was suspended has not stalled."""

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Caption:
    """One caption on its way through the gate. `reserved_tokens` counts from its admission."""

    scheduling_class: SchedulingClass
    arrived_s: float
    audio_s: float
    input_tokens: int
    cost: float
    max_output_tokens: int
    fixed_length: bool
    long: bool
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    output_tokens: int = 0
    reserved_tokens: int = 0


class GatedEngine:
    """An `Engine` that hands captions on to another one as that can take them.

    At most `max_engine_queue` captions wait, at most `max_engine_wait_s` each; then they are `Overloaded`. No tenant's
    captions take the whole queue. Tenants take turns; of one's captions the shorter go first, and the longest clip is
    overtaken for at most half of that time.

    A watchdog ends everything as `EngineStalled`, for good, when the engine owes deltas and has not taken a step
    for `engine_stall_timeout_s`. A client that does not read is not owed any; a long prefill is many steps.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self._places = settings.max_num_seqs + max(1, settings.max_num_seqs // _SURPLUS)
        patience_s = settings.max_engine_wait_s / 2
        self._queue: FairQueue[_Caption] = FairQueue(self._order, patience_s=patience_s, now_s=_now_s)
        self._running: set[_Caption] = set()
        self._kv_tokens = 0
        self._long_prefill: _Caption | None = None
        self._outputs = OutputEstimate()
        self._drain = DrainRate()
        self._owed: set[asyncio.Timeout] = set()
        self._silent_ticks = 0
        self._stalled = False
        self._watchdog: asyncio.Task[None] | None = None

    @property
    def load(self) -> Load:
        """See `Engine`. The tokens of context are those reserved."""
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
        """How long the caption that has waited longest has done so; 0 if none waits."""
        return _now_s() - min((caption.arrived_s for caption in self._queue), default=_now_s())

    @property
    def inner(self) -> Engine:
        """The engine behind the gate."""
        return self._engine

    @property
    def silent_s(self) -> float:
        """How long the engine has taken no step though it owes tokens; 0 if it works."""
        ticks = _STALL_TICKS if self._stalled else self._silent_ticks
        return ticks * self._settings.engine_stall_timeout_s / _STALL_TICKS

    async def start(self) -> None:
        """See `Engine`."""
        await self._engine.start()
        self._watchdog = asyncio.create_task(self._watch())

    async def check_health(self) -> None:
        """See `Engine`. Raises `EngineStalled` once the engine has made no progress."""
        if self._stalled:
            raise EngineStalled
        await self._engine.check_health()

    async def stop(self) -> None:
        """See `Engine`. What waits ends as `NotReady`."""
        if self._watchdog:
            self._watchdog.cancel()
            await asyncio.wait((self._watchdog,))
        self._turn_away(NotReady())
        await self._engine.stop()

    async def generate(
        self, request_id: str, features: Features, sampling: Sampling, scheduling_class: SchedulingClass = NO_TENANT
    ) -> AsyncGenerator[EngineDelta]:
        """See `Engine`. Raises `Overloaded` too, and `AudioTooLong` for what would not fit even alone."""
        await self.check_health()
        caption = self._caption(features, sampling, scheduling_class)
        try:
            await self._turn(caption)
            queue_s = _now_s() - caption.arrived_s
            async with aclosing(self._engine.generate(request_id, features, sampling, scheduling_class)) as deltas:
                del features  # 123 MB for the longest clip, not needed once handed over
                while delta := await self._next(deltas):
                    self._progress(caption, delta)
                    yield replace(delta, queue_s=queue_s) if queue_s else delta
                    queue_s = 0.0
        finally:
            self._leave(caption)

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
            long=input_tokens > _VERY_LONG_TOKENS,
        )
        caption.cost = _cost(caption, self._expected_tokens(caption) - input_tokens)
        return caption

    def _order(self, caption: _Caption) -> float:
        """The order of what waits of one tenant, as a key."""
        return shortest_first(
            caption.arrived_s,
            caption.audio_s,
            longest_s=self._settings.max_audio_s,
            patience_s=self._settings.max_engine_wait_s / 2,
        )

    async def _turn(self, caption: _Caption) -> None:
        """Wait for the caption's turn."""
        self._queue.add(caption)
        self._admit()
        if caption.turn.done():
            return
        if not self._queue.fits(caption, self._settings.max_engine_queue):
            raise self._overloaded("engine_queue")
        try:
            async with asyncio.timeout(self._settings.max_engine_wait_s):
                await caption.turn
        except TimeoutError:
            raise self._overloaded("engine_wait") from None

    def _overloaded(self, reason: str) -> Overloaded:
        backlog_s = sum(caption.audio_s for caption in self._queue)
        return Overloaded(retry_after_s=self._drain.retry_after_s(backlog_s, _now_s()), reason=reason)

    def _admit(self) -> None:
        """Let in what there is room for. To be called whenever room may have become free."""
        while len(self._running) < self._places and (caption := self._first()):
            self._queue.dequeue(caption)
            self._running.add(caption)
            self._reserve(caption, self._expected_tokens(caption))
            if caption.long:
                self._long_prefill = caption
            self._drain.add(caption.audio_s, _now_s())
            if not caption.turn.done():
                caption.turn.set_result(None)

    def _first(self) -> _Caption | None:
        """The caption whose turn it is, if there is room for it.

        Nobody passes one that waits for room in the context, or it would starve.
        """
        capacity_tokens = self._engine.load.kv_capacity_tokens
        for caption in self._queue.in_order():
            if not (caption.long and self._long_prefill):
                fits = self._kv_tokens + self._expected_tokens(caption) <= capacity_tokens
                return caption if fits or not self._running else None
        return None

    def _expected_tokens(self, caption: _Caption) -> int:
        """Context that it will take, as far as one can tell; never more than there is."""
        output_tokens = caption.max_output_tokens
        if not caption.fixed_length:
            output_tokens = min(output_tokens, self._outputs.tokens)
        return min(caption.input_tokens + output_tokens, self._engine.load.kv_capacity_tokens)

    def _reserve(self, caption: _Caption, tokens: int) -> None:
        self._kv_tokens += tokens - caption.reserved_tokens
        caption.reserved_tokens = tokens

    async def _next(self, deltas: AsyncGenerator[EngineDelta]) -> EngineDelta | None:
        """The next delta. Raises `EngineStalled` if the watchdog gives it up."""
        if not self._owed:
            self._silent_ticks = 0
        async with asyncio.timeout(None) as owed:
            self._owed.add(owed)
            try:
                return await anext(deltas, None)
            except asyncio.CancelledError:
                if owed.expired():
                    raise EngineStalled from None
                raise
            finally:
                self._owed.discard(owed)
                # It knows its task, which if cancelled keeps the traceback, and so this frame and all features below.
                del owed

    def _progress(self, caption: _Caption, delta: EngineDelta) -> None:
        """Account for a delta; with the last one the caption's place is free."""
        self._silent_ticks = 0
        caption.output_tokens += delta.tokens
        if delta.finish_reason is not None:
            if not caption.fixed_length:
                self._outputs.update(caption.output_tokens, cut=delta.finish_reason is not FinishReason.STOP)
            self._leave(caption)
            return
        used_tokens = caption.input_tokens + caption.output_tokens
        if used_tokens > caption.reserved_tokens:
            most_tokens = caption.input_tokens + caption.max_output_tokens
            self._reserve(caption, max(used_tokens, min(caption.reserved_tokens + _GROWTH_TOKENS, most_tokens)))
            self._queue.correct_cost(caption, _cost(caption, caption.reserved_tokens - caption.input_tokens))
        if self._long_prefill is caption:
            self._long_prefill = None
            self._admit()

    def _leave(self, caption: _Caption) -> None:
        """Give back what the caption has, wherever it is; once is as good as twice."""
        if caption in self._running:
            self._running.remove(caption)
            # What it did not take of what was expected, or took beyond it. One that was cut before the engine had read
            # it pays for the reading even so.
            self._queue.correct_cost(caption, _cost(caption, caption.output_tokens))
        self._queue.discard(caption)
        self._reserve(caption, 0)
        if self._long_prefill is caption:
            self._long_prefill = None
        self._admit()

    async def _watch(self) -> None:
        steps = 0
        while not self._stalled:
            await asyncio.sleep(self._settings.engine_stall_timeout_s / _STALL_TICKS)
            before, steps = steps, self._engine.steps
            self._silent_ticks = self._silent_ticks + 1 if self._owed and steps == before else 0
            if self._silent_ticks > _STALL_TICKS:
                self._give_up()

    def _give_up(self) -> None:
        log.error("the engine makes no progress", extra={"running": len(self._running), "waiting": len(self._queue)})
        self._stalled = True
        self._turn_away(EngineStalled())
        for owed in self._owed:
            owed.reschedule(_now_s())

    def _turn_away(self, error: CaptionerError) -> None:
        for caption in self._queue.clear():
            if not caption.turn.done():
                caption.turn.set_exception(error)


def _cost(caption: _Caption, output_tokens: int) -> float:
    return caption.input_tokens + _OUTPUT_COST * output_tokens


def _now_s() -> float:
    return asyncio.get_running_loop().time()
