"""THE path: audio in, caption out. Everything that happens to a request between the wire and the wire.

    admit ─► fetch (URL | inline | upload) ─► decode + log-mel in a worker process ─► engine ─► CaptionDelta …

What was taken on the way (a place, a download, a worker's features, a generation) is given back on every way out:
finished, failed, cancelled, or the consumer closing the generator.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, aclosing
from typing import TYPE_CHECKING

from serving.engine.base import context_tokens
from serving.errors import DeadlineExceeded, EngineFailed, NotReady
from serving.scheduling.shared_capacity import SharedCapacity
from serving.types import (
    CaptionDelta,
    FinishReason,
    InlineAudio,
    UploadedAudio,
    UrlAudio,
    Usage,
    billed_audio_tokens,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from pathlib import Path

    from serving.audio.fetch import Fetcher
    from serving.audio.worker_pool import AudioWorkers
    from serving.config import Settings
    from serving.engine.base import Engine
    from serving.observability.request_record import RequestRecord
    from serving.storage.uploads import UploadStore
    from serving.tenancy.usage_session import UsageSession
    from serving.types import CaptionRequest, Features, SchedulingClass


class Captioner:
    """The one path, over parts that are handed in."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        workers: AudioWorkers,
        fetcher: Fetcher,
        uploads: UploadStore,
        *,
        on_not_ready: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_not_ready` is called when a caption is wanted and there is no engine: where they sleep, it wakes one."""
        self._settings = settings
        self._engine = engine
        self._workers = workers
        self._fetcher = fetcher
        self._uploads = uploads
        self._on_not_ready = on_not_ready
        self._slots = SharedCapacity(settings.max_concurrent_requests, reason="concurrent_requests")

    @property
    def in_flight(self) -> int:
        """Captions under way."""
        return self._slots.used

    async def caption(
        self,
        request: CaptionRequest,
        record: RequestRecord,
        session: UsageSession,
        *,
        deadline_s: float,
        on_prepared: Callable[[], None],
    ) -> AsyncGenerator[CaptionDelta]:
        """Yield the caption piece by piece; the last piece carries the finish reason.

        `record` is filled along the way. `session` is admitted once a slot is acquired, and charged once the audio is
        known; the caller of this method settles it. `deadline_s` counts from the request's arrival: when it passes, the
        caption ends as `length` and `partial` with what there is. `on_prepared` is called once the encoded audio is no
        longer needed. Raises `CaptionerError`.
        """
        deadline = asyncio.get_running_loop().time() + deadline_s - (time.perf_counter() - record.started)
        sampling, request_id, scheduling_class = request.sampling, request.request_id, session.caller.scheduling_class
        began = time.perf_counter()
        async with AsyncExitStack() as stack:
            stack.enter_context(self._slots.acquire(scheduling_class))
            try:
                await self._engine.check_health()  # no download or decoding for an engine that cannot take it
            except NotReady:
                self._on_not_ready()
                raise
            await session.admit()
            record.stage("admit", time.perf_counter() - began)
            held = await stack.enter_async_context(AsyncExitStack())
            try:
                async with asyncio.timeout_at(deadline):
                    features = await self._prepare(request, record, held, scheduling_class)
            except TimeoutError:
                raise DeadlineExceeded from None
            # From here on neither this frame nor the caller needs the encoded audio (up to 10 MiB each).
            del request
            on_prepared()

            usage = Usage(audio_tokens=billed_audio_tokens(features.samples))
            record.usage, record.samples = usage, features.samples
            record.engine_input_tokens = context_tokens(features)
            await session.charge()
            queued = time.perf_counter()
            deltas = await stack.enter_async_context(
                aclosing(self._engine.generate(request_id, features, sampling, scheduling_class)),
            )
            del features
            while True:
                try:
                    async with asyncio.timeout_at(deadline):
                        piece = await anext(deltas, None)
                except TimeoutError:
                    if record.first_token is None:
                        raise DeadlineExceeded from None
                    record.partial, record.finish_reason = True, FinishReason.LENGTH
                    yield CaptionDelta("", usage, FinishReason.LENGTH, partial=True)
                    return
                if piece is None:
                    raise EngineFailed
                if record.first_token is None:
                    record.first_token = time.perf_counter()
                    queue_s = min(piece.queue_s, record.first_token - queued)
                    record.stage("engine_queue", queue_s, ended=queued + queue_s)
                    record.stage("prefill", record.first_token - queued - queue_s, ended=record.first_token)
                    await held.aclose()  # the engine has consumed the features
                usage = record.generated(
                    piece.text, piece.tokens, piece.finish_reason, uncounted_tokens=piece.uncounted_tokens
                )
                record.engine_input_tokens = piece.input_tokens or record.engine_input_tokens
                yield CaptionDelta(piece.text, usage, piece.finish_reason)
                if piece.finish_reason is not None:
                    return

    async def _prepare(
        self, request: CaptionRequest, record: RequestRecord, held: AsyncExitStack, scheduling_class: SchedulingClass
    ) -> Features:
        """Features of the request's audio; `held` keeps them, the download is gone when this returns."""
        async with AsyncExitStack() as download:
            began = time.perf_counter()
            clip: str | Path
            match request.audio:
                case InlineAudio(base64):
                    clip = base64
                case UploadedAudio(key):
                    clip = await self._uploads.open(key, owner=record.caller, model=self._settings.served_model_name)
                case UrlAudio(url):
                    clip = await download.enter_async_context(self._fetcher.fetch(url, scheduling_class))
                    record.stage("fetch", time.perf_counter() - began)
            prepared = await held.enter_async_context(self._workers.prepare(clip, scheduling_class))
        ended = time.perf_counter()
        for stage, seconds in (
            ("features", prepared.features_s),
            ("decode", prepared.decode_s),
            ("audio_queue", prepared.queue_s),
        ):
            record.stage(stage, seconds, ended=ended)
            ended -= seconds
        return prepared.features
