"""Middleware between Ray's part of a frontend and the application."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.middleware import Middleware

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


class IngressMiddleware:
    """Outermost middleware of each frontend.

    Clients cannot control Ray by headers, and a response has one request id: this service's.
    """

    _RAY_CONTROL_HEADERS = frozenset(
        (b"x-request-id", b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"serve_multiplexed_model_id")
    )

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request without Ray's headers, and its response with the first of two ids: Ray adds its own."""
        scope["headers"] = [header for header in scope["headers"] if header[0] not in self._RAY_CONTROL_HEADERS]

        async def send_one_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                ids = [header for header in message["headers"] if header[0].lower() == b"x-request-id"]
                others = [header for header in message["headers"] if header[0].lower() != b"x-request-id"]
                message["headers"] = [*others, *ids[:1]]
            await send(message)

        await self._app(scope, receive, send_one_id)


def middlewares() -> list[Middleware]:
    """Return the middlewares that Ray puts around each frontend (`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`)."""
    return [Middleware(IngressMiddleware)]
