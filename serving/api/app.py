"""Composition of the ASGI application from the settings and an engine."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import time
from functools import partial
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.middleware import Middleware

from serving.api.batches import LineDialect
from serving.api.browser_access import browser_middlewares
from serving.api.collectors import bind_service_metrics
from serving.api.components import Components
from serving.api.connections import Connections
from serving.api.dialects.dashscope import DashScopeCodec
from serving.api.dialects.openai import OpenAICodec
from serving.api.error_handlers import UnexpectedErrorMiddleware, error_handlers
from serving.api.middleware import RequestIdMiddleware
from serving.api.routes import routes
from serving.audio.download_process import DownloadProcess
from serving.audio.worker_pool import AudioWorkerPool
from serving.batch.files import Files
from serving.batch.line import LineRunner
from serving.batch.runner import BatchRunner
from serving.batch.store import BatchStore
from serving.engine.admission_control import AdmissionControl
from serving.engine.fake import FakeEngine
from serving.engine.vllm.engine import VllmEngine
from serving.errors import EngineFailed
from serving.observability.context import Untraced
from serving.observability.metrics import Metrics
from serving.observability.scrape_access import ScrapeAccess
from serving.observability.service_discovery import MetricsListener
from serving.pipeline import CaptionPipeline
from serving.scheduling.shared_capacity import SharedCapacity
from serving.settings.engine_args import InvalidEngineArgs
from serving.storage.files import open_files
from serving.storage.uploads import DirectoryUploads
from serving.tenancy.database import UnusableDatabase
from serving.tenancy.service import Tenancy
from serving.timeline.captions import Timelines

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from serving.config import Settings
    from serving.engine.base import Engine
    from serving.observability.context import Tracer
    from serving.observability.service_discovery import Target
    from serving.storage.uploads import UploadStore
    from serving.tenancy.ledger.copies import CopyStore

log = logging.getLogger(__name__)


def create_app(
    settings: Settings,
    engine: Engine | None = None,
    *,
    on_engine: Callable[[BaseException | None], None] | None = None,
    on_not_ready: Callable[[], None] = lambda: None,
    targets: Callable[[], list[Target]] | None = None,
    connections: Connections | None = None,
) -> Starlette:
    """Compose the application. `engine` defaults to the engine that the settings name.

    The application answers from its start; captions are refused as `NotReady` until the engine has loaded.
    `on_engine` is called once: with `None` when the engine has loaded and the database can be used, with the exception
    when one of them never will.
    `on_not_ready` is called for each caption request that arrives while no engine is ready; a readiness probe does not
    call it. `targets` returns the metrics addresses of a cluster's processes. `connections`: those of the server that
    runs the application.
    """
    engine = engine or make_engine(settings)
    scrape_access = ScrapeAccess.of(settings, in_cluster=targets is not None)
    tenants = settings.metrics_tenants if scrape_access.names_tenants else 0
    metrics = Metrics(tenants=tenants, tracer=_tracer(settings))
    workers = AudioWorkerPool(settings)
    downloads = DownloadProcess(settings)
    uploads = _uploads(settings)
    tenancy = Tenancy(settings, _journal_copies(settings))
    files = Files(settings, tenancy.database, open_files(settings))
    pipeline = CaptionPipeline(settings, engine, workers, downloads, uploads, files=files, on_not_ready=on_not_ready)
    timelines = Timelines(pipeline, settings)
    bodies = SharedCapacity(settings.max_body_memory_bytes, reason="bodies")
    codec, batches = OpenAICodec(settings), BatchStore(tenancy.database)
    lines = LineRunner(
        tenancy.ledger.replica,
        settings,
        pipeline,
        timelines,
        tenancy.usage_sessions,
        bodies,
        metrics,
        batches,
        LineDialect(codec),
        asyncio.Event(),
    )
    components = Components(
        settings=settings,
        engine=engine,
        workers=workers,
        pipeline=pipeline,
        timelines=timelines,
        downloads=downloads,
        targets=targets,
        scrape_access=scrape_access,
        uploads=uploads,
        files=files,
        batches=batches,
        batch_runner=BatchRunner(lines, batches, files, tenancy.keys, engine),
        keys=tenancy.keys,
        idempotency=tenancy.idempotency,
        usage_sessions=tenancy.usage_sessions,
        accounts=tenancy.accounts,
        metrics=metrics,
        bodies=bodies,
        connections=connections or Connections(settings),
        openai=codec,
        dashscope=DashScopeCodec(settings),
    )
    bind_service_metrics(components)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(asyncio.to_thread, metrics.tracer.stop)
            for component in (workers, downloads, uploads, tenancy, files):
                stack.push_async_callback(component.stop)
                await component.start()
            if targets is not None:
                # A frontend of a cluster gets no requests before: others may have keys from before an outage.
                await tenancy.started()
            stack.push_async_callback(engine.stop)
            if targets is None and settings.metrics_port is not None:
                listener = MetricsListener(partial(metrics.expose, components.check_ready), settings.metrics_token)
                stack.push_async_callback(listener.stop)
                await listener.start(settings.metrics_host, settings.metrics_port)
            loading = asyncio.create_task(_load(engine, tenancy, on_engine))
            stack.push_async_callback(_cancel, loading)
            stack.push_async_callback(components.batch_runner.stop)
            await components.batch_runner.start()
            yield

    app = Starlette(
        routes=routes(components),
        middleware=[
            Middleware(RequestIdMiddleware),
            *browser_middlewares(components),
            Middleware(UnexpectedErrorMiddleware, components=components),
        ],
        exception_handlers=error_handlers(components),
        lifespan=lifespan,
    )
    app.state.components = components
    return app


def _uploads(settings: Settings) -> UploadStore:
    if settings.object_store_url is None:
        return DirectoryUploads(settings)
    # Import obstore only if it is used.
    store: UploadStore = importlib.import_module("serving.storage.bucket_uploads").BucketUploads(settings)
    return store


def _journal_copies(settings: Settings) -> CopyStore | None:
    if settings.object_store_url is None:
        return None
    store: CopyStore = importlib.import_module("serving.storage.journal_copies").JournalCopies(settings)
    return store


def _tracer(settings: Settings) -> Tracer:
    if settings.otlp_endpoint is None:
        return Untraced()
    # Import OpenTelemetry only if it is used.
    tracing = importlib.import_module("serving.observability.tracing")
    tracer: Tracer = tracing.OpenTelemetry(
        settings.otlp_endpoint, settings.trace_ratio, follow_callers=settings.trace_follow_callers
    )
    return tracer


def make_engine(settings: Settings) -> AdmissionControl:
    """Return the engine that the settings name, with admission control. vLLM is imported when the engine starts."""
    return AdmissionControl(FakeEngine(settings) if settings.engine == "fake" else VllmEngine(settings), settings)


async def _load(engine: Engine, tenancy: Tenancy, on_engine: Callable[[BaseException | None], None] | None) -> None:
    tasks = [asyncio.create_task(_start_engine(engine)), asyncio.create_task(tenancy.started())]
    failure: BaseException | None = None
    try:
        await asyncio.gather(*tasks)
    except UnusableDatabase as error:
        log.error("database cannot be used", extra={"reason": str(error)})  # noqa: TRY400 - the operator's mistake
        failure = error
    except Exception as error:  # noqa: BLE001 - logged where it was raised
        failure = error if isinstance(error, EngineFailed) else EngineFailed()
    finally:
        for task in tasks:
            await _cancel(task)
    if on_engine is not None:
        on_engine(failure)


async def _start_engine(engine: Engine) -> None:
    started = time.perf_counter()
    try:
        await engine.start()
    except EngineFailed as failure:
        if isinstance(failure.__cause__, InvalidEngineArgs):
            reason = str(failure.__cause__)
            log.error("engine arguments refused", extra={"reason": reason})  # noqa: TRY400 - the operator's mistake
        else:
            log.exception("engine start failed")
        raise
    except Exception:
        log.exception("engine start failed")
        raise
    log.info("engine ready", extra={"start_s": round(time.perf_counter() - started, 1)})


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait((task,))
