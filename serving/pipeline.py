"""The path of every caption: audio in, text out, free of HTTP and of wire formats.

    slot, record ─► fetch (URL | inline | upload) ─► decode + log-mel in a worker process ─► engine ─► CaptionDelta …

Everything acquired on the way (a slot, a download, a worker's features, a generation) is released on every way out:
finished, failed, cancelled, or the consumer closing the generator.

A caption whose engine is lost has failed where the caller has a part of it. The caption of a full response is generated
once more where there is another engine, and also where it is defective (`quality.py`): its features are kept for that,
within a bound.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

from serving import quality
from serving.audio.piece_file import PieceFile, frame_bytes, most_bytes
from serving.engine.base import context_tokens
from serving.engine.remote.client import RemoteEngine
from serving.errors import CaptionerError, DeadlineExceeded, EngineFailed, NotReady, UploadNotFound
from serving.kept_features import KeptFeatures
from serving.scheduling.shared_capacity import SharedCapacity
from serving.types import (
    CaptionDelta,
    Defect,
    FileAudio,
    FinishReason,
    Guard,
    InlineAudio,
    StoredAudio,
    UploadedAudio,
    UrlAudio,
    Usage,
    billed_audio_tokens,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from serving.audio.download_process import DownloadProcess
    from serving.audio.worker_pool import AudioWorkerPool
    from serving.audio.worker_process import Clip
    from serving.config import Settings
    from serving.engine.base import Engine
    from serving.observability.request_record import RequestRecord
    from serving.storage.uploads import UploadStore
    from serving.tenancy.usage_session import UsageSession
    from serving.types import CaptionRequest, Features, Sampling, SchedulingClass, TimelineOptions, TokenLogprob

log = logging.getLogger(__name__)

_PIECE_FILES_SHARE = 4
"""Pieces of timelines have as much disk as a quarter of `max_downloads_bytes`, in addition to downloads."""


class FileReader(Protocol):
    """A store of tenants' files (`serving.batch.files`)."""

    def reading(self, file_id: str, *, owner: str) -> AbstractAsyncContextManager[Path]:
        """Yield the path of a tenant's file, until the context is left. Raises `NotFound` and `StorageUnavailable`."""
        ...


_KEPT_SHARE = 4
"""Features of full responses are kept in a quarter of `max_features_bytes`; the rest is for clips that wait."""


class CaptionPipeline:
    """The path of every caption, over components that the caller owns."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        workers: AudioWorkerPool,
        downloads: DownloadProcess,
        uploads: UploadStore,
        *,
        files: FileReader | None = None,
        on_not_ready: Callable[[], None] = lambda: None,
    ) -> None:
        """Store the components.

        `on_not_ready` is called for each caption request while no engine is ready: in a cluster that scales to zero it
        starts an engine.
        """
        self._settings = settings
        self._engine = engine
        self._workers = workers
        self._downloads = downloads
        self._uploads = uploads
        self._files = files
        self._on_not_ready = on_not_ready
        self._slots = SharedCapacity(settings.max_concurrent_requests, reason="concurrent_requests")
        self._replicas = engine if isinstance(engine, RemoteEngine) else None
        """The engine if it is several, of which another can make a caption that one has lost."""
        self._kept = SharedCapacity(settings.max_features_bytes // _KEPT_SHARE)
        self._piece_files = SharedCapacity(settings.max_downloads_bytes // _PIECE_FILES_SHARE, reason="downloads")
        self._largest_piece_file = min(most_bytes(settings.max_audio_s), self._piece_files.size // 2)

    @property
    def in_flight(self) -> int:
        """Captions in progress."""
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
        """Yield the caption in deltas, or all of it in one if the response is not streamed.

        The last delta carries the finish reason. Fills in `record`. `session` is admitted, and the caller leaves it:
        opens its usage record once a slot is acquired, charges it once the length of the audio is known, and starts it
        when the engine does. A budget that leaves less than the request's `max_tokens` reduces them: the caption ends
        as `length`. `deadline_s` counts from the request's arrival: when it passes, the caption ends as `length` and
        `partial` with the text generated so far. `on_prepared` is called once the encoded audio is no longer needed.
        Raises `CaptionerError`.
        """
        deadline = deadline_of(record, deadline_s)
        guard = quality.effective(Guard(self._settings.quality_guard), request.guard)
        sampling = quality.guarded(request.sampling, guard)
        async with AsyncExitStack() as stack:
            prepared = self._prepared(request, record, session, deadline)
            features, release_features = await stack.enter_async_context(prepared)
            # From here on neither this function nor its caller needs the encoded audio (up to 10 MiB each).
            del request, prepared
            on_prepared()

            record.engine_input_tokens = context_tokens(features)
            if (max_tokens := await session.charge()) is not None and max_tokens < sampling.max_tokens:
                sampling = replace(sampling, max_tokens=max_tokens)
            sample_again = not record.stream and quality.may_sample_again(sampling, guard)
            generate = self._stream if record.stream else partial(self._full, sample_again=sample_again)
            deltas = await stack.enter_async_context(
                aclosing(generate(features, sampling, session, record, deadline, release_features))
            )
            del features
            async for caption_delta in deltas:
                yield caption_delta

    @asynccontextmanager
    async def cut(
        self,
        request: CaptionRequest,
        record: RequestRecord,
        session: UsageSession,
        options: TimelineOptions,
        *,
        deadline: float,
    ) -> AsyncIterator[PieceFile]:
        """Yield the request's audio, cut into pieces, whose features are on disk. The slot of the request is held.

        `deadline` is in the event loop's time. Fills in `record`, and opens the usage record of `session`. Raises
        `CaptionerError`.
        """
        with (
            self._piece_files.acquire(session.caller.scheduling_class, self._largest_piece_file) as permit,
            PieceFile(options.max_segment_s, self._settings.download_dir) as piece_file,
        ):
            async with self._prepared(request, record, session, deadline, piece_file):
                del request
                permit.release()
                permit.count(piece_file.size_bytes)
                yield piece_file

    async def caption_piece(
        self,
        piece_file: PieceFile,
        index: int,
        sampling: Sampling,
        *,
        guard: Guard,
        session: UsageSession,
        record: RequestRecord,
        deadline: float,
    ) -> CaptionDelta:
        """Return the complete caption of one piece, as that of a full response. `record` is of this piece alone.

        Raises `CaptionerError`, `Overloaded` where features have no memory.
        """
        guard = quality.effective(Guard(self._settings.quality_guard), guard)
        sampling = quality.guarded(sampling, guard)
        size_bytes = frame_bytes(piece_file.pieces[index])
        with self._workers.hold(size_bytes, session.caller.scheduling_class) as permit:

            async def release() -> None:
                permit.release()

            features = await piece_file.features(index)
            record.samples, record.engine_input_tokens = features.samples, context_tokens(features)
            sample_again = quality.may_sample_again(sampling, guard)
            deltas = self._full(features, sampling, session, record, deadline, release, sample_again=sample_again)
            del features
            async with aclosing(deltas):
                return await anext(deltas)

    @asynccontextmanager
    async def _prepared(
        self,
        request: CaptionRequest,
        record: RequestRecord,
        session: UsageSession,
        deadline: float,
        piece_file: PieceFile | None = None,
    ) -> AsyncIterator[tuple[Features, Callable[[], Awaitable[None]]]]:
        """Acquire a slot, open the usage record and prepare the audio; yield its features and their release."""
        scheduling_class = session.caller.scheduling_class
        with self._slots.acquire(scheduling_class):
            try:
                await self._engine.check_health()  # no download or decoding for an engine that is not ready
            except NotReady:
                self._on_not_ready()
                raise
            session.open(request)
            async with AsyncExitStack() as features_held:
                try:
                    async with asyncio.timeout_at(deadline) as timeout:
                        features = await self._prepare(request, record, features_held, scheduling_class, piece_file)
                except TimeoutError:
                    if not timeout.expired():
                        raise
                    raise DeadlineExceeded from None
                del request
                record.usage, record.samples = Usage(billed_audio_tokens(features.samples)), features.samples
                handed_over = [features]
                del features  # this frame lasts as long as the caption, which does not need them for that long
                yield handed_over.pop(), features_held.aclose

    async def _full(  # noqa: PLR0917 - as `_stream`
        self,
        features: Features,
        sampling: Sampling,
        session: UsageSession,
        record: RequestRecord,
        deadline: float,
        release_features: Callable[[], Awaitable[None]],
        *,
        sample_again: bool,
    ) -> AsyncGenerator[CaptionDelta]:
        """Yield the complete caption in one delta.

        With `sample_again` a defective caption is generated once more if that may cure it.
        """
        with self._kept.permit(session.caller.scheduling_class) as permit:
            keep = sample_again or self._replicas is not None
            kept = KeptFeatures(features, permit, release_features, keep=keep)
            del features
            caption = await self._complete(kept, sampling, session, record, deadline)
            if sample_again and kept.get() is not None and quality.may_be_cured(record.defect):
                caption = await self._second_sample(caption, kept, sampling, session, record, deadline)
            yield caption

    async def _second_sample(  # noqa: PLR0917 - as `_stream`
        self,
        first: CaptionDelta,
        kept: KeptFeatures,
        sampling: Sampling,
        session: UsageSession,
        record: RequestRecord,
        deadline: float,
    ) -> CaptionDelta:
        """Return a second caption if it has no defect, else the first one. What is returned is recorded and billed."""
        record.retried, output = record.defect, record.output()
        record.discard_output()
        try:
            second = await self._complete(kept, quality.another_seed(sampling), session, record, deadline)
        except CaptionerError:  # the first caption is an answer, too
            record.restore_output(output)
            return replace(first, retried=record.retried)
        better = record.defect is None and not record.partial
        if not better:
            record.restore_output(output)
        return replace(second if better else first, retried=record.retried)

    async def _complete(
        self,
        kept: KeptFeatures,
        sampling: Sampling,
        session: UsageSession,
        record: RequestRecord,
        deadline: float,
    ) -> CaptionDelta:
        """Return the complete caption. An engine that is lost in the middle of it is replaced by another one, once.

        Nothing of the first try is delivered, billed or recorded.
        """
        while (features := kept.get()) is not None:
            pieces: list[str] = []
            logprobs: list[TokenLogprob] = []
            deltas = self._stream(features, sampling, session, record, deadline, kept.consumed)
            del features
            try:
                async with aclosing(deltas):
                    async for delta in deltas:
                        pieces.append(delta.text)
                        logprobs += delta.logprobs
            except EngineFailed:
                if self._replicas is None or kept.get() is None or record.first_token is None:
                    raise
            else:
                return replace(delta, text="".join(pieces), logprobs=tuple(logprobs))
            del deltas
            self._replicas.retries += 1
            record.discard_output()
            log.warning("engine lost in a full response; asking another one", extra={"request_id": record.request_id})
        raise EngineFailed

    async def _stream(  # noqa: PLR0917 - two callers
        self,
        features: Features,
        sampling: Sampling,
        session: UsageSession,
        record: RequestRecord,
        deadline: float,
        on_first_delta: Callable[[], Awaitable[None]],
    ) -> AsyncGenerator[CaptionDelta]:
        """Yield the deltas of one generation. `on_first_delta` is called once the engine has consumed the features."""
        queued, usage, blank = time.perf_counter(), record.usage or Usage(0), True
        deltas = self._engine.generate(
            record.request_id, features, sampling, session.caller.scheduling_class, session.start
        )
        del features
        async with aclosing(deltas):
            while True:
                try:
                    async with asyncio.timeout_at(deadline) as timeout:
                        delta = await anext(deltas, None)
                except TimeoutError:
                    if not timeout.expired():
                        raise  # a fault of the engine
                    if record.first_token is None:
                        raise DeadlineExceeded from None
                    record.partial, record.finish_reason = True, FinishReason.LENGTH
                    yield CaptionDelta("", usage, FinishReason.LENGTH, partial=True)
                    return
                if delta is None:
                    raise EngineFailed
                if record.first_token is None:
                    session.start()  # an engine replica of the version before does not report its start
                    record.first_token = time.perf_counter()
                    queue_s = min(delta.queue_s, record.first_token - queued)
                    record.stage("engine_queue", queue_s, ended=queued + queue_s)
                    record.stage("prefill", record.first_token - queued - queue_s, ended=record.first_token)
                    await on_first_delta()
                usage = record.add_output(
                    delta.text, delta.tokens, delta.finish_reason, uncounted_tokens=delta.uncounted_tokens
                )
                record.engine_input_tokens = delta.input_tokens or record.engine_input_tokens
                blank = blank and not delta.text.strip()
                if delta.finish_reason is None:
                    yield CaptionDelta(delta.text, usage, logprobs=delta.logprobs)
                    continue
                record.defect = quality.defect_of(
                    looped=delta.looped, blank=blank, tokens=usage.output_tokens, finish_reason=delta.finish_reason
                )
                stopped = Defect.LOOP if delta.looped else None
                yield CaptionDelta(delta.text, usage, delta.finish_reason, stopped=stopped, logprobs=delta.logprobs)
                return

    async def _prepare(
        self,
        request: CaptionRequest,
        record: RequestRecord,
        features_held: AsyncExitStack,
        scheduling_class: SchedulingClass,
        piece_file: PieceFile | None,
    ) -> Features:
        """Return features of the request's audio, held by `features_held`. The download is deleted on return."""
        async with AsyncExitStack() as download:
            started = time.perf_counter()
            clip: Clip
            match request.audio:
                case InlineAudio(base64):
                    clip = base64
                case FileAudio(data):
                    clip = data
                case UploadedAudio(key):
                    model = self._settings.served_model_name
                    reading = self._uploads.reading(key, owner=record.caller, model=model)
                    clip = await download.enter_async_context(reading)
                    if self._settings.object_store_url is not None:
                        record.stage("fetch", time.perf_counter() - started)
                case StoredAudio(file_id):
                    if self._files is None:
                        raise UploadNotFound
                    clip = await download.enter_async_context(self._files.reading(file_id, owner=record.caller))
                    record.stage("fetch", time.perf_counter() - started)
                case UrlAudio(url):
                    clip = await download.enter_async_context(self._downloads.fetch(url, scheduling_class))
                    record.stage("fetch", time.perf_counter() - started)
            into = {"piece_file": piece_file} if piece_file else {}
            prepared = await features_held.enter_async_context(self._workers.prepare(clip, scheduling_class, **into))
        ended = time.perf_counter()
        for stage, seconds in (
            ("features", prepared.features_s),
            ("decode", prepared.decode_s),
            ("audio_queue", prepared.queue_s),
        ):
            record.stage(stage, seconds, ended=ended)
            ended -= seconds
        return prepared.features


def deadline_of(record: RequestRecord, deadline_s: float) -> float:
    """Return the deadline of a request, in the event loop's time, of `deadline_s` from its arrival."""
    return asyncio.get_running_loop().time() + deadline_s - (time.perf_counter() - record.started)
