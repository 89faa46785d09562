"""The pages at `/`: static files of `page/`, where people try the service, and of `admin_page/`, for administrators.

Each page calls the API of its port and nothing else. The files are read once and served from memory, under a policy
that runs no script but theirs and reaches no other host. They have no secret and need no key; the person's key or token
goes from the page to the API alone.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import TYPE_CHECKING, NamedTuple

from starlette.responses import Response
from starlette.routing import Route

from serving.errors import NotFound

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.requests import Request

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; media-src blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'"
)
"""Content security policy: nothing inline, no other host, no frame around the page, no text that becomes markup."""

_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "microphone=(self), camera=(), geolocation=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class _File(NamedTuple):
    body: bytes
    etag: str
    media_type: str


_SHARED = ("charts.js", "dom.js", "i18n.js", "icon.svg", "money.js", "style.css", "theme.js")
"""Files of the page that the administrators' page uses, too; its own texts have the names that these import."""


def routes() -> list[Route]:
    """Return the routes of the page; its links are relative, so that it works behind a path prefix, too."""
    return _routes(_files("page"))


def admin_routes() -> list[Route]:
    """Return the routes of the administrators' page, for the administration's port."""
    of_page = _files("page")
    return _routes({name: of_page[name] for name in _SHARED} | _files("admin_page"))


def _routes(found: Mapping[str, _File]) -> list[Route]:

    async def index(request: Request) -> Response:
        return _answer(request, found["index.html"])

    async def file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in found:
            raise NotFound
        return _answer(request, found[name])

    return [Route("/", index), Route("/page/{name}", file)]


def admin_paths() -> frozenset[str]:
    """Return the paths of the administrators' page, which need no token."""
    return frozenset({"/", *(f"/page/{name}" for name in (*_SHARED, *_files("admin_page")))})


def _files(directory: str) -> dict[str, _File]:
    found = {}
    for entry in (files("serving.api") / directory).iterdir():
        media_type = _TYPES.get(entry.name[entry.name.rfind(".") :])
        if media_type is not None:
            body = entry.read_bytes()
            found[entry.name] = _File(body, f'"{hashlib.blake2b(body, digest_size=12).hexdigest()}"', media_type)
    return found


def _answer(request: Request, file: _File) -> Response:
    """Return the file, or 304 if the client has it. Clients ask each time: a new version is never mixed with an old."""
    headers = _HEADERS | {"etag": file.etag}
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if file.etag in known or known == ["*"]:
        return Response(status_code=304, headers=headers)
    return Response(file.body, headers=headers, media_type=file.media_type)
