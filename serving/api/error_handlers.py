"""Responses to exceptions that leave an endpoint, and to requests that match no endpoint."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from serving.api.request_head import is_compatible
from serving.errors import CaptionerError, Internal, MethodNotAllowed, NotFound

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from serving.api.components import Components
    from serving.api.dialects.base import Codec

log = logging.getLogger(__name__)

_ENDPOINTS = (
    "Captions: POST /v1/chat/completions (OpenAI), POST /v1/audio/transcriptions (a form with a file), "
    "POST /api/v1/services/aigc/multimodal-generation/generation (DashScope). Models: GET /v1/models."
)


def error_handlers(components: Components) -> Mapping[Any, Callable[[Request, Exception], Awaitable[Response]]]:
    """Return Starlette's exception handlers: for the error tree, and for requests that match no route."""

    async def handler(request: Request, raised: Exception) -> Response:
        return render_error(components, request, raised)

    return {CaptionerError: handler, HTTPException: handler}


class UnexpectedErrorMiddleware:
    """Answer 500 in the path's dialect when an endpoint raises anything outside the error tree.

    Starlette's own handler for such exceptions runs outside all middleware: its response has no request id.
    """

    def __init__(self, app: ASGIApp, components: Components) -> None:
        self._app = app
        self._components = components

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; answer an exception unless a response has started, else raise it again."""
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
            response = render_error(self._components, Request(scope, receive), raised)
            await response(scope, receive, send)


def render_error(components: Components, request: Request, raised: Exception) -> Response:
    """Return the response to `raised` in the path's dialect."""
    error: CaptionerError
    match raised:
        case CaptionerError():
            error = raised
        case HTTPException(status_code=405):
            error = MethodNotAllowed(request.method, (raised.headers or {}).get("Allow", ""))
        case HTTPException(status_code=404):
            error = NotFound(f"{NotFound.message} {_ENDPOINTS}")
        case _:
            log.error("unexpected failure", exc_info=raised, extra={"request_id": request.state.request_id})
            error = Internal()
    rendered = _codec_of(request.url.path, components).error(error, request.state.request_id)
    headers = {**rendered.headers}
    if isinstance(raised, HTTPException) and raised.headers:
        headers |= raised.headers  # `allow`
    return Response(rendered.body, rendered.status, headers, rendered.content_type)


def _codec_of(path: str, components: Components) -> Codec:
    """Return the dialect of errors on `path`."""
    return components.openai if is_compatible(path) else components.dashscope
