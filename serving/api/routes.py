"""The endpoints, E1 to E10 of PROTOCOL and the operator's own, and what is answered to any other path."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serving.api.caption_endpoint import CaptionEndpoint
from serving.api.dialects import dashscope, openai, oss
from serving.api.request_body import drain, pieces
from serving.api.upload_form import receive_upload
from serving.config import MIB
from serving.errors import (
    CaptionerError,
    Disconnected,
    EngineFailed,
    Internal,
    InvalidApiKey,
    InvalidRequest,
    MethodNotAllowed,
    ModelNotFound,
    NotFound,
    ServerError,
)
from serving.observability.request_record import code_of
from serving.observability.service_discovery import may_scrape

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from serving.api.dialects.base import Codec
    from serving.audio.fetch import Fetcher
    from serving.audio.worker_pool import AudioWorkers
    from serving.config import Settings
    from serving.engine.base import Engine
    from serving.observability.metrics import Metrics
    from serving.observability.service_discovery import Target
    from serving.pipeline import Captioner
    from serving.scheduling.shared_capacity import SharedCapacity
    from serving.storage.uploads import UploadStore
    from serving.tenancy.keys import Keyring
    from serving.tenancy.usage_session import UsageSessions
    from serving.types import Caller

log = logging.getLogger(__name__)

UPLOAD_PATH = "/oss-upload"


@dataclass(frozen=True, slots=True)
class Service:
    """The parts that endpoints reach."""

    settings: Settings
    engine: Engine
    workers: AudioWorkers
    captioner: Captioner
    uploads: UploadStore
    keys: Keyring
    usage_sessions: UsageSessions
    metrics: Metrics
    bodies: SharedCapacity
    openai: Codec
    dashscope: Codec
    fetcher: Fetcher
    targets: Callable[[], list[Target]] | None = None
    """Where the processes of a cluster tell their metrics; `None` on one machine: here alone."""

    def codec_of(self, path: str) -> Codec:
        """The dialect in which an error on this path is told: the native one, but on OpenAI's paths."""
        return self.openai if path.startswith(("/v1/", "/compatible-mode/")) else self.dashscope

    async def list_models(self, request: Request) -> Response:
        """E5: the models, as OpenAI lists them."""
        self._authenticate(request)
        return _json(openai.models_page(self.settings))

    async def show_model(self, request: Request) -> Response:
        """E5: one model."""
        self._authenticate(request)
        return _json(openai.model(self.settings, request.path_params["name"]))

    async def page_models(self, request: Request) -> Response:
        """E6: the models, as DashScope pages them."""
        self._authenticate(request)
        return _json(dashscope.models_page(self.settings, request.query_params, request.state.request_id))

    async def show_native_model(self, request: Request) -> Response:
        """E6: one model."""
        self._authenticate(request)
        return _json(dashscope.model(self.settings, request.path_params["name"], request.state.request_id))

    async def upload_policy(self, request: Request) -> Response:
        """E3: the form fields with which one may upload a file for this caller and model."""
        caller = self._authenticate(request)
        if request.query_params.get("action") != "getPolicy":
            raise InvalidRequest("Required parameter(action) missing or invalid, it should be getPolicy.")
        model = request.query_params.get("model", "")
        if model not in self.settings.model_names:
            raise ModelNotFound(model)
        # Whichever of the model's names was used.
        policy = self.uploads.issue(caller.tenant_id, self.settings.served_model_name)
        return _json(
            oss.policy_body(
                request.state.request_id,
                policy=policy.policy,
                signature=policy.signature,
                upload_dir=policy.upload_dir,
                upload_host=_origin(request, self.settings) + UPLOAD_PATH,
                expire_in_seconds=policy.expires_in_s,
                max_file_size_mb=math.ceil(policy.max_bytes / MIB),
                oss_access_key_id="captioner",
            )
        )

    async def upload(self, request: Request) -> Response:
        """E4: receive one file as the signed policy allows. It carries no key; errors are XML, as OSS tells them."""
        error: CaptionerError
        body, content_type = pieces(request.receive), request.headers.get("content-type", "")
        try:
            await receive_upload(body, content_type, self.uploads, max_file_bytes=self.settings.max_upload_bytes)
        except Disconnected:
            self.metrics.upload("disconnected")
            raise
        except CaptionerError as raised:
            error = raised
        except Exception:
            log.exception("unexpected failure", extra={"request_id": request.state.request_id})
            error = Internal()
        else:
            self.metrics.upload("stored")
            return Response(status_code=200)
        self.metrics.upload(code_of(type(error)))
        await _drain(body, self.settings)
        answer = oss.error(error, request.state.request_id)
        return Response(answer.body, answer.status, dict(answer.headers), answer.content_type)

    async def healthz(self, _: Request) -> Response:
        """Whether a restart would help: only once the engine has died. A model that still loads is alive."""
        try:
            await self.engine.check_health()
        except EngineFailed:
            return _json(b'{"alive":false,"reason":"the engine has died"}', status=503)
        except ServerError:
            pass
        return _json(b'{"alive":true}')

    async def readyz(self, _: Request) -> Response:
        """Whether captions can be made now: asks the engine."""
        try:
            await self.engine.check_health()
        except ServerError as error:
            return _json(orjson.dumps({"ready": False, "reason": str(error)}), status=503)
        return _json(orjson.dumps({"ready": True}))

    async def scrape(self, request: Request) -> Response:
        """Prometheus metrics of this process."""
        self._check_scraper(request)
        body, content_type = await self.metrics.expose(self.engine.check_health, request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    async def scrape_targets(self, request: Request) -> Response:
        """Where the metrics of all processes are, as Prometheus' HTTP service discovery wants it."""
        self._check_scraper(request)
        here = [{"targets": [request.url.netloc], "labels": {"role": "server"}}]
        return _json(orjson.dumps(here if self.targets is None else self.targets()))

    def _check_scraper(self, request: Request) -> None:
        if not may_scrape(self.settings.metrics_token, request.headers.get("authorization", "")):
            raise InvalidApiKey

    def _authenticate(self, request: Request) -> Caller:
        return self.keys.authenticate(request.headers)


def error_handlers(service: Service) -> Mapping[Any, Callable[[Request, Exception], Awaitable[Response]]]:
    """What is answered when an endpoint raises what we know, or when no endpoint matches."""
    tell = functools.partial(_tell, service)
    return {CaptionerError: tell, HTTPException: tell}


class Unforeseen:
    """What is answered when an endpoint raises anything else.

    Starlette's own place for that is outside all middleware: no request id, and no body that could be read.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and answer it if nothing was answered."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def send_noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        except Exception as raised:
            if started:
                raise
            response = await _tell(self._service, Request(scope, receive), raised)
            await response(scope, receive, send)


async def _tell(service: Service, request: Request, raised: Exception) -> Response:
    error: CaptionerError
    match raised:
        case CaptionerError():
            error = raised
        case HTTPException(status_code=405):
            error = MethodNotAllowed(request.method)
        case HTTPException(status_code=404):
            error = NotFound()
        case _:
            log.error("unexpected failure", exc_info=raised, extra={"request_id": request.state.request_id})
            error = Internal()
    await _drain(pieces(request.receive), service.settings)
    answer = service.codec_of(request.url.path).error(error, request.state.request_id)
    headers = {**answer.headers}
    if isinstance(raised, HTTPException) and raised.headers:
        headers |= raised.headers  # `allow`
    return Response(answer.body, answer.status, headers, answer.content_type)


def _origin(request: Request, settings: Settings) -> str:
    """The address under which this client reaches the service."""
    if settings.public_url:
        return settings.public_url.rstrip("/")
    headers, url = request.headers, request.url
    return f"{headers.get('x-forwarded-proto', url.scheme)}://{headers.get('x-forwarded-host', url.netloc)}"


async def _drain(body: AsyncIterator[bytes], settings: Settings) -> None:
    """Read what the client still sends; whatever was read before, or whether it has gone, does not matter."""
    with contextlib.suppress(CaptionerError):
        await drain(body, settings.max_body_bytes)


def _json(body: bytes, status: int = 200) -> Response:
    return Response(body, status, media_type="application/json")


def routes(service: Service) -> list[Route]:
    """Every path that is answered."""
    parts = (
        service.captioner,
        service.keys,
        service.usage_sessions,
        service.metrics,
        service.bodies,
        service.settings,
    )
    native, compatible = CaptionEndpoint(service.dashscope, *parts), CaptionEndpoint(service.openai, *parts)
    return [
        Route("/api/v1/services/aigc/multimodal-generation/generation", native, methods=["POST"]),
        # The manual's last curl names this path (PROTOCOL 14, no. 6).
        Route("/api/v1/services/aigc/text-generation/generation", native, methods=["POST"]),
        Route("/compatible-mode/v1/chat/completions", compatible, methods=["POST"]),
        Route("/v1/chat/completions", compatible, methods=["POST"]),
        *(
            Route(f"{prefix}/models{rest}", endpoint)
            for prefix in ("/compatible-mode/v1", "/v1")
            for rest, endpoint in (("", service.list_models), ("/{name:path}", service.show_model))
        ),
        Route("/api/v1/models", service.page_models),
        Route("/api/v1/models/{name:path}", service.show_native_model),
        Route("/api/v1/uploads", service.upload_policy),
        Route(UPLOAD_PATH, service.upload, methods=["POST"]),
        Route("/healthz", service.healthz),
        Route("/readyz", service.readyz),
        Route("/metrics", service.scrape),
        Route("/metrics/targets", service.scrape_targets),
    ]
