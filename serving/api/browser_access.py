"""Access by web pages: CORS by setting, and no captions for pages of other sites while nobody has to have a key.

A page of any site can send a form to a service on its reader's own machine; a browser asks for permission (CORS) only
before requests that no form could make. With keys that does not matter: a page has none. Without (`--no-auth`) the
origin decides, which browsers state and pages cannot forge.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request

from serving.api.error_handlers import render_error
from serving.config import is_loopback
from serving.errors import AccessDenied

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from serving.api.components import Components
    from serving.config import Settings

log = logging.getLogger(__name__)

_SAFE_METHODS = frozenset(("GET", "HEAD", "OPTIONS"))

_EXPOSED = (
    *("x-request-id", "retry-after", "x-should-retry", "x-dashscope-partialresponse", "x-captioner-retried"),
    *(f"x-ratelimit-{part}-{what}" for part in ("limit", "remaining", "reset") for what in ("requests", "tokens")),
)
"""Response headers that scripts of an allowed page may read."""

_PREFLIGHT_S = 600

_REFUSAL = (
    f"{AccessDenied.message} A web page of another site made this request, and the service runs without keys "
    "(--no-auth); allow the page's origin with the setting cors_origins, or use keys."
)


def browser_middlewares(components: Components) -> list[Middleware]:
    """Return the middlewares of CORS, if any origin is allowed, and of the check of origins, if there are no keys."""
    settings = components.settings
    middlewares = []
    if settings.cors_origins:
        middlewares.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=("GET", "POST"),
                allow_headers=("*",),
                expose_headers=_EXPOSED,
                allow_private_network=True,
                max_age=_PREFLIGHT_S,
            )
        )
    if not settings.auth:
        middlewares.append(Middleware(CrossSiteGuard, components=components))
    return middlewares


class CrossSiteGuard:
    """Refuses requests that a web page of another site makes."""

    def __init__(self, app: ASGIApp, components: Components) -> None:
        self._app = app
        self._components = components

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 403."""
        if scope["type"] == "http" and is_cross_site(scope["method"], Headers(scope=scope), self._components.settings):
            log.warning("cross-site request refused", extra={"request_id": scope["state"]["request_id"]})
            response = render_error(self._components, Request(scope, receive), AccessDenied(_REFUSAL))
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)


def is_cross_site(method: str, headers: Headers, settings: Settings) -> bool:
    """Return whether a page that is not allowed made the request, as far as its browser says.

    A page whose host name was pointed at this machine after it had loaded (DNS rebinding) is one of another site: its
    origin is its name. Origins without a host, such as those of extensions, applications and sandboxed frames, need
    permission for JSON; for them only what a form can send is refused.
    """
    if method in _SAFE_METHODS:
        return False
    origin = headers.get("origin")
    if origin is None:
        return headers.get("sec-fetch-site", "") == "cross-site"
    if _is_allowed(origin, settings):
        return False
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    return origin.lower().startswith(("http://", "https://")) or media_type != "application/json"


def _is_allowed(origin: str, settings: Settings) -> bool:
    if {origin, "*"} & {*settings.cors_origins}:
        return True
    try:
        own = urlsplit(settings.public_url or "")
        page = urlsplit(origin)
        return is_loopback(page.hostname or "") or (page.scheme, page.netloc) == (own.scheme, own.netloc) != ("", "")
    except ValueError:
        return False
