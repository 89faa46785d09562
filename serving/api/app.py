"""Composition: settings and an engine in, one ASGI application out."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import time
import uuid
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware

from serving.api.collectors import watch_service
from serving.api.dialects.dashscope import DashScopeCodec
from serving.api.dialects.openai import OpenAICodec
from serving.api.routes import Service, Unforeseen, error_handlers, routes
from serving.audio.fetch import Fetcher
from serving.audio.worker_pool import AudioWorkers
from serving.engine.admission_control import GatedEngine
from serving.engine.fake import FakeEngine
from serving.engine.vllm.engine import VllmEngine
from serving.errors import EngineFailed
from serving.observability.context import REQUEST_ID, Untraced
from serving.observability.metrics import Metrics
from serving.pipeline import Captioner
from serving.scheduling.shared_capacity import SharedCapacity
from serving.storage.uploads import DirectoryUploads
from serving.tenancy.service import Tenancy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from serving.config import Settings
    from serving.engine.base import Engine
    from serving.observability.context import Tracer
    from serving.observability.service_discovery import Target

log = logging.getLogger(__name__)


def create_app(
    settings: Settings,
    engine: Engine | None = None,
    *,
    on_engine: Callable[[BaseException | None], None] | None = None,
    on_not_ready: Callable[[], None] = lambda: None,
    targets: Callable[[], list[Target]] | None = None,
) -> Starlette:
    """Compose the service. `engine` defaults to the one that the settings name.

    The application answers from its start; captions are refused as `NotReady` until the engine has loaded.
    `on_engine` is told when it has (`None`) or why it could not. `on_not_ready` is called for each caption that is
    wanted while no engine can make it; asking for readiness does not call it. `targets` tells where the processes of a
    cluster have their metrics.
    """
    engine = engine or make_engine(settings)
    # Tenants are told apart only where strangers cannot read it.
    private = settings.metrics_token is not None or (targets is None and settings.on_loopback)
    metrics = Metrics(tenants=settings.metrics_tenants if private else 0, tracer=_tracer(settings))
    workers = AudioWorkers(settings)
    fetcher = Fetcher(settings)
    uploads = DirectoryUploads(settings)
    tenancy = Tenancy(settings)
    service = Service(
        settings=settings,
        engine=engine,
        workers=workers,
        captioner=Captioner(settings, engine, workers, fetcher, uploads, on_not_ready=on_not_ready),
        fetcher=fetcher,
        targets=targets,
        uploads=uploads,
        keys=tenancy.keys,
        usage_sessions=tenancy.usage_sessions,
        metrics=metrics,
        bodies=SharedCapacity(settings.max_body_memory_bytes, reason="bodies"),
        openai=OpenAICodec(settings),
        dashscope=DashScopeCodec(settings),
    )
    watch_service(service)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(asyncio.to_thread, metrics.tracer.stop)
            for part in (workers, fetcher, uploads, tenancy):
                stack.push_async_callback(part.stop)
                await part.start()
            stack.push_async_callback(engine.stop)
            loading = asyncio.create_task(_load(engine, on_engine))
            stack.push_async_callback(_cancel, loading)
            yield

    app = Starlette(
        routes=routes(service),
        middleware=[Middleware(RequestId), Middleware(Unforeseen, service=service)],
        exception_handlers=error_handlers(service),
        lifespan=lifespan,
    )
    app.state.service = service
    return app


def _tracer(settings: Settings) -> Tracer:
    if settings.otlp_endpoint is None:
        return Untraced()
    # OpenTelemetry is imported only where it is used.
    tracing = importlib.import_module("serving.observability.tracing")
    tracer: Tracer = tracing.OpenTelemetry(settings.otlp_endpoint, settings.trace_ratio)
    return tracer


def make_engine(settings: Settings) -> GatedEngine:
    """Make the engine that the settings name, with admission in front. Importing vLLM waits until it starts."""
    return GatedEngine(FakeEngine(settings) if settings.engine == "fake" else VllmEngine(settings), settings)


async def _load(engine: Engine, on_engine: Callable[[BaseException | None], None] | None) -> None:
    began = time.perf_counter()
    failure: BaseException | None = None
    try:
        await engine.start()
    except Exception as error:
        log.exception("the engine could not start")
        failure = error if isinstance(error, EngineFailed) else EngineFailed()
    else:
        log.info("engine ready", extra={"start_s": round(time.perf_counter() - began, 1)})
    if on_engine is not None:
        on_engine(failure)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait((task,))


class RequestId:
    """Give each request an id, and each response its `x-request-id` (PROTOCOL 2.5)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with `scope["state"]["request_id"]` set."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = str(uuid.uuid4())
        scope.setdefault("state", {})["request_id"] = request_id
        REQUEST_ID.set(request_id)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(raw=message["headers"])["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)
