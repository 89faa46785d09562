"""The origin under which a client reaches the service, behind reverse proxies that are trusted."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from serving.api.addresses import Networks
from serving.api.request_head import is_host

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.requests import Request

    from serving.config import Settings

_SCHEMES = ("http", "https")
_PREFIX = re.compile(r"(?:/[A-Za-z0-9._~-]+)+/?")
_MAX_PREFIX = 256
_PAIR = re.compile(r'\s*([A-Za-z]+)=(?:"((?:[^"\\]|\\.)*)"|([^\s;,"]+))\s*([;,]|$)')


class Origins:
    """Derives origins by `public_url`, `trusted_proxies` and the request."""

    def __init__(self, settings: Settings) -> None:
        self._public_url = settings.public_url.rstrip("/") if settings.public_url else None
        self._trusted = Networks(settings.trusted_proxies)

    def of(self, request: Request) -> str:
        """Return the origin, with the path prefix that a proxy removes, for addresses sent to this client.

        `public_url` comes first. The first element of `Forwarded` (RFC 7239) and the first values of
        `X-Forwarded-Proto`, `-Host` and `-Prefix` count if the peer is a trusted proxy, each only if it is valid.
        """
        if self._public_url:
            return self._public_url
        scheme, host, prefix = request.url.scheme, request.headers.get("host") or _server(request), ""
        if self._peer(request) in self._trusted:
            headers = request.headers
            forwarded = _first_element(headers.get("forwarded", ""))
            scheme = _valid_scheme(forwarded.get("proto") or _first(headers, "x-forwarded-proto")) or scheme
            host = _valid_host(forwarded.get("host") or _first(headers, "x-forwarded-host")) or host
            prefix = _valid_prefix(_first(headers, "x-forwarded-prefix"))
        return f"{scheme}://{host}{prefix}"

    @staticmethod
    def _peer(request: Request) -> str | None:
        """Return the address of the peer itself: a server may replace `client` by what `X-Forwarded-For` says."""
        state: Mapping[str, str | None] = request.scope.get("state", {})
        return state.get("peer", request.client.host if request.client else None)


def _first(headers: Mapping[str, str], name: str) -> str:
    return headers.get(name, "").partition(",")[0].strip()


def _first_element(value: str) -> dict[str, str]:
    """Return the parameters of the first element of a `Forwarded` header, none if the element is malformed."""
    parameters: dict[str, str] = {}
    position = 0
    while found := _PAIR.match(value, position):
        parameters[found[1].lower()] = found[3] or re.sub(r"\\(.)", r"\1", found[2] or "")
        position = found.end()
        if found[4] != ";":
            return parameters
    return {}


def _valid_scheme(value: str) -> str:
    return value.lower() if value.lower() in _SCHEMES else ""


def _valid_host(value: str) -> str:
    return value if value.isascii() and is_host(value.encode()) else ""


def _valid_prefix(value: str) -> str:
    return value.rstrip("/") if len(value) <= _MAX_PREFIX and _PREFIX.fullmatch(value) else ""


def _server(request: Request) -> str:
    host, port = request.scope.get("server") or ("localhost", None)
    return host if port is None else f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
