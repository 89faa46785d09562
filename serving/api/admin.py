"""The administration over HTTP: the verbs of `tenancy/admin.py` on a port and with a token of their own.

Never on the port that clients reach. JSON in and out; errors are `{"error": {"code": …, "message": …}}`.
"""

from __future__ import annotations

import asyncio
import datetime as dt
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

from serving.api.uvicorn_protocol import protocol
from serving.tenancy.admin.service import Administration, UnknownError
from serving.tenancy.admin.validation import RefusedError
from serving.tenancy.billing import reports
from serving.tenancy.database import open_database
from serving.tenancy.key_hashing import Pepper

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

    import sqlalchemy as sa
    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send

    from serving.config import Settings

log = logging.getLogger(__name__)

_MAX_BODY_BYTES = 64 * 1024
_ACTOR_CHARACTERS = 64


def create_admin_app(settings: Settings, database: sa.Engine) -> Starlette:
    """Compose it. Raises `ValueError` without `admin_token`: there is no administration without one."""
    if settings.admin_token is None:
        raise ValueError("admin_token must be set: administration is not for everyone")
    verbs = _Verbs(database, Pepper.of(settings))
    routes = [
        Route("/healthz", lambda _: Response(b'{"alive":true}', media_type="application/json")),
        Route("/v1/tenants", verbs.tenants, methods=["GET"]),
        Route("/v1/tenants", verbs.create_tenant, methods=["POST"]),
        Route("/v1/tenants/{id}", verbs.tenant, methods=["GET"]),
        Route("/v1/tenants/{id}", verbs.change_tenant, methods=["PATCH"]),
        Route("/v1/tenants/{id}/keys", verbs.keys, methods=["GET"]),
        Route("/v1/tenants/{id}/keys", verbs.create_key, methods=["POST"]),
        Route("/v1/tenants/{id}/invoice", verbs.invoice, methods=["GET"]),
        Route("/v1/keys", verbs.keys, methods=["GET"]),
        Route("/v1/keys/{id}/rotate", verbs.rotate_key, methods=["POST"]),
        Route("/v1/keys/{id}/revoke", verbs.revoke_key, methods=["POST"]),
        Route("/v1/plans", verbs.plans, methods=["GET"]),
        Route("/v1/plans/{id}", verbs.set_plan, methods=["PATCH"]),
        Route("/v1/prices", verbs.prices, methods=["GET"]),
        Route("/v1/prices", verbs.set_price, methods=["POST"]),
        Route("/v1/usage", verbs.usage, methods=["GET"]),
        Route("/v1/audit", verbs.audit, methods=["GET"]),
    ]
    return Starlette(
        routes=routes, middleware=[Middleware(_OnlyWithToken, token=settings.admin_token.get_secret_value())]
    )


class AdminServer(uvicorn.Server):
    """The API on its port. `alone`: signals stop it; else whoever started it does, by `should_exit`."""

    def __init__(self, settings: Settings, *, alone: bool) -> None:
        self._alone = alone
        app = create_admin_app(settings, open_database(settings))
        port = settings.admin_port or 0
        quiet: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False, "ws": "none"}
        quiet["http"] = protocol(settings)
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
    """Refuses whoever does not have the token, before anything of the request is read."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/healthz":
            sent = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not hmac.compare_digest(sent, self._expected):
                await _error(401, "unauthenticated", "The admin token is missing or wrong.")(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _Verbs:
    """An endpoint for each verb. The database is asked in a thread."""

    def __init__(self, database: sa.Engine, pepper: Pepper) -> None:
        self._database = database
        self._pepper = pepper

    async def tenants(self, request: Request) -> Response:
        return await self._answer(request, lambda admin, _: admin.tenants())

    async def create_tenant(self, request: Request) -> Response:
        return await self._answer(request, lambda admin, body: admin.create_tenant(body.pop("id"), **body), status=201)

    async def tenant(self, request: Request) -> Response:
        return await self._answer(request, lambda admin, _: admin.tenant(_id(request)))

    async def change_tenant(self, request: Request) -> Response:
        return await self._answer(request, lambda admin, body: admin.change_tenant(_id(request), **body))

    async def keys(self, request: Request) -> Response:
        return await self._answer(request, lambda admin, _: admin.keys(request.path_params.get("id")))

    async def create_key(self, request: Request) -> Response:
        def create(admin: Administration, body: dict[str, Any]) -> Any:
            key, secret = admin.create_key(_id(request), **body)
            return {"key": secret, **key}

        return await self._answer(request, create, status=201)

    async def rotate_key(self, request: Request) -> Response:
        def rotate(admin: Administration, body: dict[str, Any]) -> Any:
            key, secret = admin.rotate_key(_id(request), **body)
            return {"key": secret, **key}

        return await self._answer(request, rotate, status=201)

    async def revoke_key(self, request: Request) -> Response:
        return await self._answer(request, lambda admin, _: admin.revoke_key(_id(request)))

    async def plans(self, request: Request) -> Response:
        return await self._answer(request, lambda admin, _: admin.plans())

    async def set_plan(self, request: Request) -> Response:
        return await self._answer(request, lambda admin, body: admin.set_plan(_id(request), **body))

    async def prices(self, request: Request) -> Response:
        return await self._answer(request, lambda admin, _: admin.prices())

    async def set_price(self, request: Request) -> Response:
        return await self._answer(request, lambda admin, body: admin.set_price(body.pop("region"), **body), status=201)

    async def usage(self, request: Request) -> Response:
        """`?since=2026-11-01&until=2026-11-30&by=day,tenant&tenant=…&key=…`."""

        def usage(admin: Administration, _: dict[str, Any]) -> Any:
            asked, today = request.query_params, dt.datetime.now(dt.UTC).date()
            by = tuple(asked.get("by", "day,tenant").split(","))
            if not set(by) <= set(reports.GROUPS):
                raise RefusedError(f"by: some of {', '.join(reports.GROUPS)}")
            since = dt.date.fromisoformat(asked.get("since", today.replace(day=1).isoformat()))
            until = dt.date.fromisoformat(asked.get("until", today.isoformat()))
            of = {"tenant": asked.get("tenant"), "key": asked.get("key")}
            return reports.usage(admin.database, since=since, until=until, by=by, **of)

        return await self._answer(request, usage)

    async def invoice(self, request: Request) -> Response:
        """`?month=2026-11`."""
        month = request.query_params.get("month", dt.datetime.now(dt.UTC).date().isoformat()[:7])
        return await self._answer(request, lambda admin, _: reports.invoice(admin.database, _id(request), month=month))

    async def audit(self, request: Request) -> Response:
        """`?subject=…&limit=100`."""

        def audit(admin: Administration, _: dict[str, Any]) -> Any:
            limit = int(request.query_params.get("limit", "100"))
            return admin.audit(subject=request.query_params.get("subject"), limit=min(max(limit, 1), 10_000))

        return await self._answer(request, audit)

    async def _answer(
        self, request: Request, verb: Callable[[Administration, dict[str, Any]], Any], *, status: int = 200
    ) -> Response:
        actor = f"api:{request.headers.get('x-actor', '')[:_ACTOR_CHARACTERS]}"
        admin = Administration(self._database, self._pepper, actor)
        try:
            body = await _body(request)
            told = await asyncio.to_thread(verb, admin, body)
        except UnknownError as error:
            return _error(404, "not_found", str(error.args[0]))
        except KeyError as error:
            return _error(400, "invalid", f"{error.args[0]} is missing")
        except TypeError:
            return _error(400, "invalid", "a field is unknown, is missing, or is not of its type")
        except ValueError as error:
            return _error(400, "invalid", str(error))
        except SQLAlchemyError as error:
            log.warning("administration could not reach the database", extra={"error": type(error).__name__})
            return _error(503, "database_unavailable", "The database does not answer.")
        # SQLAlchemy's names of columns are a kind of string.
        return Response(orjson.dumps(told, option=orjson.OPT_NON_STR_KEYS), status, media_type="application/json")


def _id(request: Request) -> str:
    return str(request.path_params["id"])


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object that was sent, `{}` if nothing was. Raises `RefusedError`."""
    read = bytearray()
    async for piece in request.stream():
        read += piece
        if len(read) > _MAX_BODY_BYTES:
            raise RefusedError(f"the body is larger than {_MAX_BODY_BYTES} bytes")
    try:
        body = orjson.loads(bytes(read) or b"{}")
    except orjson.JSONDecodeError:
        raise RefusedError("the body is not JSON") from None
    if not isinstance(body, dict):
        raise RefusedError("the body is not a JSON object")
    return body


def _error(status: int, code: str, message: str) -> Response:
    return Response(orjson.dumps({"error": {"code": code, "message": message}}), status, media_type="application/json")
