"""Captions of a timeline: the pieces of one audio through the one path, side by side, and in order.

A timeline is one request: one slot, one usage record, one bill. Its audio is billed once, by the manual's rule for the
whole: the rounding of pieces has no part in it. Output tokens are billed as they are written. A piece has no caption if
the service failed to make one, if the deadline came first, or if a budget was used up: its segment says so, the other
segments are not lost, and its audio is not billed. If no piece has a caption, the request fails as that of a single
caption would.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from serving.errors import BudgetExhausted, CaptionerError, DeadlineExceeded, Internal, Overloaded, error_code
from serving.observability.request_record import RequestRecord
from serving.pipeline import deadline_of
from serving.timeline.allowance import Allowance
from serving.timeline.segments import Segment
from serving.timeline.text import readable
from serving.types import SAMPLE_RATE, CaptionDelta, Defect, FinishReason, Usage, billed_audio_tokens

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from serving.audio.piece_file import PieceFile
    from serving.config import Settings
    from serving.pipeline import CaptionPipeline
    from serving.tenancy.usage_session import UsageSession
    from serving.types import CaptionRequest, Guard, Sampling, TimelineOptions

_AT_ONCE = 8
"""Most pieces of one timeline that are in the engine at once."""

_SLOTS_LEFT = 2
"""A timeline uses at most one in this many of the engine's slots."""

_AHEAD = 2
"""Pieces that are started before the oldest segment is delivered, as a multiple of those at once."""

_TRIES, _LONGEST_WAIT_S = 4, 5.0
"""Tries of a piece where the service is overloaded, and longest wait before the next."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TimelineDelta(CaptionDelta):
    """The next segments of a timeline. `text` is what a reader sees of them, with their times."""

    segments: tuple[Segment, ...] = ()


@dataclass(frozen=True, slots=True)
class _Captioned:
    """A segment, and the error that is the reason why it has no caption."""

    segment: Segment
    error: CaptionerError | None
    stopped: Defect | None = None
    retried: Defect | None = None


class Timelines:
    """Timelines over a pipeline."""

    def __init__(self, pipeline: CaptionPipeline, settings: Settings) -> None:
        self._pipeline = pipeline
        self._at_once = max(1, min(_AT_ONCE, settings.max_num_seqs // _SLOTS_LEFT))

    async def caption(
        self,
        request: CaptionRequest,
        record: RequestRecord,
        session: UsageSession,
        *,
        deadline_s: float,
        on_prepared: Callable[[], None],
    ) -> AsyncGenerator[TimelineDelta]:
        """Yield each segment in order as soon as it and all before it are captioned, or all in one delta.

        The parameters are those of `CaptionPipeline.caption`; `max_tokens` bounds the caption of each segment. Pieces
        are generated as full responses are: a defective caption is generated once more. Raises `CaptionerError`.
        """
        if request.timeline is None:
            raise Internal
        deadline = deadline_of(record, deadline_s)
        cut = self._pipeline.cut(request, record, session, request.timeline, deadline=deadline)
        run = _Run(self._pipeline, request.sampling, request.guard, request.timeline, record, session, deadline)
        del request
        async with cut as piece_file:
            del cut
            on_prepared()
            run.allowance = Allowance(await session.charge(captions=len(piece_file.pieces)))
            deltas = run.deltas(piece_file, self._at_once)
            async with aclosing(deltas):
                if record.stream:
                    async for delta in deltas:
                        yield delta
                else:
                    yield _joined([delta async for delta in deltas])


class _Run:
    """One timeline under way."""

    def __init__(  # noqa: PLR0917 - one caller
        self,
        pipeline: CaptionPipeline,
        sampling: Sampling,
        guard: Guard,
        options: TimelineOptions,
        record: RequestRecord,
        session: UsageSession,
        deadline: float,
    ) -> None:
        self.allowance = Allowance(None)
        self._pipeline = pipeline
        self._sampling, self._guard = sampling, guard
        self._options = options
        self._record = record
        self._session = session
        self._deadline = deadline
        self._unbilled_samples = 0
        self._captioned = False

    async def deltas(self, piece_file: PieceFile, at_once: int) -> AsyncGenerator[TimelineDelta]:
        """Yield a delta for each segment, in order. Segments without a caption wait for the first that has one."""
        count, slots = len(piece_file.pieces), asyncio.Semaphore(at_once)
        started: deque[asyncio.Task[_Captioned]] = deque()
        held: list[_Captioned] = []
        index = 0
        try:
            for number in range(count):
                while index < count and len(started) < _AHEAD * at_once:
                    started.append(asyncio.create_task(self._piece(piece_file, index, slots)))
                    index += 1
                held.append(await started[0])
                started.popleft()
                if held[-1].segment.error is None:
                    self._captioned = True
                if number == count - 1 and not self._captioned:
                    raise held[0].error or Internal()
                while self._captioned and held:
                    oldest = held.pop(0)
                    yield self._delta(oldest, last=oldest.segment.index == count - 1)
        finally:
            for task in started:
                task.cancel()
            if started:
                await asyncio.wait(started)
            for task in started:
                with suppress(asyncio.CancelledError):
                    task.exception()

    async def _piece(self, piece_file: PieceFile, index: int, slots: asyncio.Semaphore) -> _Captioned:
        """Return the segment of one piece."""
        error: CaptionerError | None = None
        async with slots:
            for attempt in range(_TRIES):
                try:
                    return await self._caption(piece_file, index)
                except Overloaded as overloaded:
                    error = overloaded
                    wait_s = min(overloaded.retry_after_s, _LONGEST_WAIT_S)
                    # The first piece of a service that has no capacity decides: the request is refused, not begun.
                    if index == 0 or attempt == _TRIES - 1 or self._left_s() <= wait_s:
                        break
                    await asyncio.sleep(wait_s)
                except CaptionerError as failure:
                    error = failure
                    break
                except Exception:
                    log.exception("piece of a timeline failed", extra={"request_id": self._record.request_id})
                    error = Internal()
                    break
        if isinstance(error, DeadlineExceeded):
            self._record.partial = True
        piece = piece_file.pieces[index]
        self._unbilled_samples += piece.end - piece.begin
        segment = self._segment(piece_file, index, "", None, error)
        return _Captioned(segment, error)

    def _left_s(self) -> float:
        return self._deadline - asyncio.get_running_loop().time()

    async def _caption(self, piece_file: PieceFile, index: int) -> _Captioned:
        """Return the segment of one piece with its caption. Raises `CaptionerError`."""
        if self._left_s() <= 0:
            raise DeadlineExceeded
        record = RequestRecord(f"{self._record.request_id}-{index}", self._record.dialect, usage=Usage(0))
        async with self.allowance.draw(self._sampling.max_tokens) as draft:
            if not draft.tokens:
                raise BudgetExhausted(limit="tokens", retry_after_s=1)
            try:
                delta = await self._pipeline.caption_piece(
                    piece_file,
                    index,
                    replace(self._sampling, max_tokens=draft.tokens),
                    guard=self._guard,
                    session=self._session,
                    record=record,
                    deadline=self._deadline,
                )
            except asyncio.CancelledError:
                draft.written = self._count(record)  # the caller has left: what was generated for it is billed
                raise
            except CaptionerError:
                record.discard_output()
                raise
            draft.written = self._count(record)
        self._record.partial |= delta.partial
        segment = self._segment(piece_file, index, delta.text.strip(), delta.finish_reason, None)
        return _Captioned(segment, None, delta.stopped, delta.retried)

    def _count(self, record: RequestRecord) -> int:
        """Add a piece's output to the request's record; return its billed tokens."""
        whole, usage = self._record, record.usage or Usage(0)
        before = whole.usage or Usage(0)
        whole.usage = replace(before, output_tokens=before.output_tokens + usage.output_tokens)
        whole.engine_input_tokens += record.engine_input_tokens
        whole.engine_output_tokens += record.engine_output_tokens
        whole.defect, whole.retried = whole.defect or record.defect, whole.retried or record.retried
        if record.first_token is not None and whole.first_token is None:
            whole.first_token = record.first_token
            for stage in ("engine_queue", "prefill"):
                started = record.stage_started[stage]
                whole.stage(stage, record.stages_s[stage], ended=started + record.stages_s[stage])
        return usage.output_tokens

    def _segment(
        self,
        piece_file: PieceFile,
        index: int,
        caption: str,
        finish_reason: FinishReason | None,
        error: CaptionerError | None,
    ) -> Segment:
        piece = piece_file.pieces[index]
        return Segment(
            index=index,
            start_s=piece.begin / SAMPLE_RATE,
            end_s=piece.end / SAMPLE_RATE,
            caption=caption,
            loudness_db=piece.loudness_db if self._options.loudness else None,
            speech_share=piece.speech_share if self._options.speech_share else None,
            finish_reason=finish_reason,
            error=error_code(type(error)) if error else None,
        )

    def _delta(self, captioned: _Captioned, *, last: bool) -> TimelineDelta:
        """Return the delta of one segment."""
        segment, record = captioned.segment, self._record
        text = readable(segment) if segment.index == 0 else f"\n\n{readable(segment)}"
        if record.caption is not None:
            record.caption.append(text)
        if segment.finish_reason is not FinishReason.STOP:
            record.finish_reason = FinishReason.LENGTH
        elif last:
            record.finish_reason = record.finish_reason or FinishReason.STOP
        audio_tokens = billed_audio_tokens(record.samples - self._unbilled_samples)
        record.usage = replace(record.usage or Usage(0), audio_tokens=audio_tokens)
        return TimelineDelta(
            text=text,
            usage=record.usage,
            finish_reason=record.finish_reason if last else None,
            partial=last and record.partial,
            stopped=captioned.stopped,
            retried=record.retried,
            segments=(segment,),
        )


def _joined(deltas: list[TimelineDelta]) -> TimelineDelta:
    """Return all deltas as one."""
    return replace(
        deltas[-1],
        text="".join(delta.text for delta in deltas),
        segments=tuple(segment for delta in deltas for segment in delta.segments),
        stopped=next((delta.stopped for delta in deltas if delta.stopped), None),
    )
