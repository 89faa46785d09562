"""The administration over HTTP: the table of `tenancy/admin/verbs.py` on a separate port with a separate token.

Never on the port that clients reach. JSON in and out; errors are `{"error": {"code": …, "message": …}}`.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import orjson
import uvicorn
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.routing import Route

from serving.api import page_endpoint
from serving.api.request_body import Body
from serving.api.uvicorn_protocol import protocol
from serving.errors import BodyTimeout, Disconnected
from serving.tenancy.admin.service import Administration, NotFoundError
from serving.tenancy.admin.validation import InvalidChangeError
from serving.tenancy.admin.verbs import VERBS
from serving.tenancy.database import open_database
from serving.tenancy.key_hashing import Pepper

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Collection, Iterator

    import sqlalchemy as sa
    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send

    from serving.config import Settings
    from serving.tenancy.admin.verbs import Verb

log = logging.getLogger(__name__)

_MAX_BODY_BYTES = 64 * 1024
_ACTOR_CHARACTERS = 64


def create_admin_app(settings: Settings, database: sa.Engine) -> Starlette:
    """Compose the application, a route for each of the table. Raises `ValueError` without `admin_token`."""
    if settings.admin_token is None:
        raise ValueError("admin_token: required by the administration's HTTP API; set CAPTIONER_ADMIN_TOKEN")
    pepper = Pepper.of(settings)
    routes = [
        Route(path, _endpoint(verb, database, pepper, settings), methods=[method])
        for verb in VERBS
        for method, path in verb.routes
    ]
    public = {"/healthz"}
    if settings.page:
        routes += page_endpoint.admin_routes()
        public |= page_endpoint.admin_paths()
    routes.append(Route("/healthz", lambda _: Response(b'{"alive":true}', media_type="application/json")))
    token = settings.admin_token.get_secret_value()
    return Starlette(routes=routes, middleware=[Middleware(_OnlyWithToken, token=token, public=public)])


class AdminServer(uvicorn.Server):
    """The API on its port. `alone`: signals stop it; otherwise its owner does, by `should_exit`."""

    def __init__(self, settings: Settings, *, alone: bool) -> None:
        self._alone = alone
        app = create_admin_app(settings, open_database(settings))
        port = settings.admin_port or 0
        quiet: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False, "ws": "none"}
        quiet |= {"http": protocol(settings), "proxy_headers": False}
        super().__init__(uvicorn.Config(app, host=settings.admin_host, port=port, timeout_graceful_shutdown=5, **quiet))

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """See uvicorn."""
        if self._alone:
            with super().capture_signals():
                yield
        else:
            yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            log.info("administration on http://%s:%d", host, port)


class _OnlyWithToken:
    """Middleware that refuses requests without the token before their body is read, except on `public` paths."""

    def __init__(self, app: ASGIApp, token: str, public: Collection[str] = ("/healthz",)) -> None:
        self._app = app
        self._public = public
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._public:
            sent = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not hmac.compare_digest(sent, self._expected):
                await _error(401, "unauthenticated", "The admin token is missing or wrong.")(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _endpoint(
    verb: Verb, database: sa.Engine, pepper: Pepper, settings: Settings
) -> Callable[[Request], Awaitable[Response]]:
    """Return the endpoint of a verb, which uses the database in a thread."""

    async def endpoint(request: Request) -> Response:
        actor = f"api:{request.headers.get('x-actor', '')[:_ACTOR_CHARACTERS]}"
        try:
            body = await _body(Body(request.receive, settings))
            path = {name: str(value) for name, value in request.path_params.items()}
            # A body of GET is read and ignored, and so is a query of the other methods.
            reads = request.method in {"GET", "HEAD"}
            values = verb.of_query(path, request.query_params) if reads else verb.of_body(path, body)
            answer = await asyncio.to_thread(verb.run, Administration(database, pepper, actor), **values)
        except (Disconnected, BodyTimeout):
            return _error(400, "invalid", "the body is incomplete")
        except NotFoundError as error:
            return _error(404, "not_found", str(error))
        except InvalidChangeError as error:
            return _error(400, "invalid", str(error))
        except SQLAlchemyError as error:
            log.warning("administration could not reach the database", extra={"error": type(error).__name__})
            return _error(503, "database_unavailable", "The database does not answer.")
        except Exception:
            log.exception("administration verb failed", extra={"verb": verb.words})
            return _error(500, "internal", "Internal error; the cause is in the log.")
        # SQLAlchemy's names of columns are a kind of string.
        return Response(
            orjson.dumps(answer, option=orjson.OPT_NON_STR_KEYS), verb.status, media_type="application/json"
        )

    return endpoint


async def _body(pieces: Body) -> dict[str, Any]:
    """Read the JSON object of a request, `{}` for an empty body. Raises `InvalidChangeError` and the body's errors."""
    read = bytearray()
    async for piece in pieces:
        read += piece
        if len(read) > _MAX_BODY_BYTES:
            raise InvalidChangeError(f"the body is larger than {_MAX_BODY_BYTES} bytes")
    try:
        body = orjson.loads(bytes(read) or b"{}")
    except orjson.JSONDecodeError:
        raise InvalidChangeError("the body is not JSON") from None
    if not isinstance(body, dict):
        raise InvalidChangeError("the body is not a JSON object")
    return body


def _error(status: int, code: str, message: str) -> Response:
    return Response(orjson.dumps({"error": {"code": code, "message": message}}), status, media_type="application/json")
