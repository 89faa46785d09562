"""What stands between Ray's part of a frontend and our application."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.middleware import Middleware

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Edge:
    """Outermost in each frontend: what clients send does not steer Ray, and an answer has one request id, ours."""

    _STEERING = frozenset(
        (b"x-request-id", b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"serve_multiplexed_model_id")
    )

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request without Ray's headers, and its answer with the first of two request ids: Ray adds its."""
        scope["headers"] = [header for header in scope["headers"] if header[0] not in self._STEERING]

        async def send_one_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                ids = [header for header in message["headers"] if header[0].lower() == b"x-request-id"]
                others = [header for header in message["headers"] if header[0].lower() != b"x-request-id"]
                message["headers"] = [*others, *ids[:1]]
            await send(message)

        await self._app(scope, receive, send_one_id)


def middlewares() -> list[Middleware]:
    """What Ray puts around each frontend (`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`)."""
    return [Middleware(Edge)]
