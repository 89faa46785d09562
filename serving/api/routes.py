"""Routes and endpoints: E1 to E10 of PROTOCOL, probes and metrics."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import orjson
from starlette.responses import Response
from starlette.routing import Route

from serving.api import account_endpoints, page_endpoint
from serving.api.batches import BatchEndpoints
from serving.api.caption_endpoint import CaptionEndpoint
from serving.api.dialects import dashscope, openai, oss
from serving.api.dialects.model_card import check_served
from serving.api.dialects.transcriptions import TranscriptionCodec
from serving.api.files import FileEndpoints
from serving.api.forwarding import Origins
from serving.api.multipart_form import MAX_OVERHEAD_BYTES
from serving.api.request_body import Body
from serving.api.request_counting import RequestCounter
from serving.api.upload_form import receive_upload
from serving.config import MIB
from serving.errors import (
    CaptionerError,
    Disconnected,
    EngineFailed,
    Internal,
    InvalidRequest,
    NotReady,
    ServerError,
    error_code,
)

if TYPE_CHECKING:
    from starlette.requests import Request

    from serving.api.components import Components
    from serving.storage.upload_policies import UploadGrant
    from serving.types import Caller

log = logging.getLogger(__name__)

UPLOAD_PATH = "/oss-upload"

_COMPATIBLE_PREFIXES = ("/compatible-mode/v1", "/v1", "/compatible-mode", "")
"""Base URLs of OpenAI's dialect: the manual's, OpenAI's, and both as many write them, without `/v1`."""


def routes(components: Components) -> list[Route]:
    """Return the route of every path that is answered."""
    endpoints = _Endpoints(components)
    native = CaptionEndpoint.of(components, components.dashscope)
    compatible = CaptionEndpoint.of(components, components.openai)
    transcribed, translated = (
        CaptionEndpoint.of(
            components,
            TranscriptionCodec(components.settings, task),
            max_body_bytes=components.settings.max_transcription_bytes + MAX_OVERHEAD_BYTES,
        )
        for task in ("transcribe", "translate")
    )
    return [
        *(page_endpoint.routes() if components.settings.page else ()),
        Route("/api/v1/services/aigc/multimodal-generation/generation", native, methods=["POST"]),
        # The manual's last curl names this path (PROTOCOL 14, no. 6).
        Route("/api/v1/services/aigc/text-generation/generation", native, methods=["POST"]),
        *(
            Route(f"{prefix}{path}", endpoint, methods=["POST"])
            for prefix in _COMPATIBLE_PREFIXES
            for path, endpoint in (
                ("/chat/completions", compatible),
                ("/audio/transcriptions", transcribed),
                ("/audio/translations", translated),
            )
        ),
        *(
            Route(f"{prefix}/models{rest}", endpoint)
            for prefix in _COMPATIBLE_PREFIXES
            for rest, endpoint in (("", endpoints.list_models), ("/{name:path}", endpoints.show_model))
        ),
        *_file_routes(components),
        *account_endpoints.routes(components),
        Route("/api/v1/models", endpoints.page_models),
        Route("/api/v1/models/{name:path}", endpoints.show_native_model),
        Route("/api/v1/uploads", endpoints.upload_policy),
        Route(UPLOAD_PATH, endpoints.upload, methods=["POST"]),
        Route("/health", endpoints.health),
        Route("/healthz", endpoints.healthz),
        Route("/readyz", endpoints.readyz),
        Route("/metrics", endpoints.scrape),
        Route("/metrics/targets", endpoints.scrape_targets),
    ]


def _file_routes(components: Components) -> list[Route]:
    files, batches = FileEndpoints(components), BatchEndpoints(components)
    return [
        Route(f"{prefix}{path}", endpoint, methods=[method])
        for prefix in ("/compatible-mode/v1", "/v1")
        for method, path, endpoint in (
            ("POST", "/files", files.create),
            ("GET", "/files", files.list),
            ("GET", "/files/{file_id}", files.retrieve),
            ("DELETE", "/files/{file_id}", files.delete),
            ("GET", "/files/{file_id}/content", files.content),
            ("POST", "/batches", batches.create),
            ("GET", "/batches", batches.list),
            ("GET", "/batches/{batch_id}", batches.retrieve),
            ("POST", "/batches/{batch_id}/cancel", batches.cancel),
        )
    ]


class _Endpoints:
    """Every endpoint but that of captions, over the components of this process."""

    def __init__(self, components: Components) -> None:
        self._settings = components.settings
        self._engine = components.engine
        self._uploads = components.uploads
        self._keys = components.keys
        self._requests = RequestCounter(components.usage_sessions)
        self._check_ready = components.check_ready
        self._metrics = components.metrics
        self._targets = components.targets
        self._origins = Origins(components.settings)
        self._scrape_access = components.scrape_access

    async def list_models(self, request: Request) -> Response:
        """E5: the models, as OpenAI lists them."""
        await self._admit(request)
        return _json(openai.models_page(self._settings))

    async def show_model(self, request: Request) -> Response:
        """E5: one model."""
        await self._admit(request)
        return _json(openai.model(self._settings, request.path_params["name"]))

    async def page_models(self, request: Request) -> Response:
        """E6: the models, as DashScope pages them."""
        await self._admit(request)
        return _json(dashscope.models_page(self._settings, request.query_params, request.state.request_id))

    async def show_native_model(self, request: Request) -> Response:
        """E6: one model."""
        await self._admit(request)
        return _json(dashscope.model(self._settings, request.path_params["name"], request.state.request_id))

    async def upload_policy(self, request: Request) -> Response:
        """E3: the form fields with which this caller may upload files for one model."""
        caller = await self._admit(request)
        if request.query_params.get("action") != "getPolicy":
            raise InvalidRequest("Required parameter(action) missing or invalid, it should be getPolicy.")
        model = request.query_params.get("model", "")
        check_served(self._settings, model)
        # Issued for the main name, so that the file can be used with any of the model's names.
        policy = self._uploads.issue(caller.tenant_id, self._settings.served_model_name, caller.key_id)
        return _json(
            oss.policy_body(
                request.state.request_id,
                policy=policy.policy,
                signature=policy.signature,
                upload_dir=policy.upload_dir,
                upload_host=self._origins.of(request) + UPLOAD_PATH,
                expire_in_seconds=policy.expires_in_s,
                max_file_size_mb=math.ceil(policy.max_bytes / MIB),
                oss_access_key_id="captioner",
            )
        )

    async def upload(self, request: Request) -> Response:
        """E4: store one file under a signed policy. The request has no key; errors are XML, as OSS renders them.

        A client without a valid policy is answered at once; after one, the rest of its body is read first.
        """
        error: CaptionerError
        body, content_type = Body(request.receive, self._settings), request.headers.get("content-type", "")
        try:
            await receive_upload(
                body,
                content_type,
                self._uploads,
                admit=self._admit_upload,
                max_file_bytes=self._settings.max_upload_bytes,
            )
        except Disconnected:
            self._metrics.upload("disconnected")
            raise
        except CaptionerError as raised:
            error = raised
        except Exception:
            log.exception("unexpected failure", extra={"request_id": request.state.request_id})
            error = Internal()
        else:
            self._metrics.upload("stored")
            return Response(status_code=200)
        self._metrics.upload(error_code(type(error)))
        rendered = oss.error(error, request.state.request_id)
        return Response(rendered.body, rendered.status, dict(rendered.headers), rendered.content_type)

    async def health(self, _: Request) -> Response:
        """Answer as vLLM's probe: 200 without a body while captions can be made, else 503."""
        try:
            await self._check_ready()
        except ServerError:
            return Response(status_code=503)
        return Response(status_code=200)

    async def healthz(self, _: Request) -> Response:
        """Answer 503 if a restart would help: the engine has died. An engine that is still loading is alive."""
        try:
            await self._engine.check_health()
        except EngineFailed:
            return _json(b'{"alive":false,"reason":"the engine has died"}', status=503)
        except ServerError:
            pass
        return _json(b'{"alive":true}')

    async def readyz(self, _: Request) -> Response:
        """Answer 503 if captions cannot be made now: by the engine, or because nobody can be identified or billed."""
        try:
            await self._check_ready()
        except ServerError as error:
            progress = error.progress if isinstance(error, NotReady) else ""
            body = {"ready": False, "reason": str(error)} | ({"progress": progress} if progress else {})
            return _json(orjson.dumps(body), status=503)
        return _json(orjson.dumps({"ready": True}))

    async def scrape(self, request: Request) -> Response:
        """Prometheus metrics of this process."""
        self._scrape_access.check(request.scope)
        body, content_type = await self._metrics.expose(self._check_ready, request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    async def scrape_targets(self, request: Request) -> Response:
        """Metrics addresses of all processes, in the format of Prometheus' HTTP service discovery."""
        self._scrape_access.check(request.scope)
        here = [{"targets": [request.url.netloc], "labels": {"role": "server"}}]
        return _json(orjson.dumps(here if self._targets is None else self._targets()))

    async def _admit(self, request: Request) -> Caller:
        """Return the caller, and count the request."""
        caller = self._keys.authenticate(request.headers)
        await self._requests.count(caller)
        return caller

    async def _admit_upload(self, grant: UploadGrant) -> None:
        """Count the file as a request of its owner, whose key must still be valid."""
        await self._requests.count(self._keys.holder(grant.owner, grant.key_id))


def _json(body: bytes, status: int = 200) -> Response:
    return Response(body, status, media_type="application/json")
