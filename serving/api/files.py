"""`/v1/files`: OpenAI's files, for batches and for audio. Errors are in OpenAI's form."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import orjson
from starlette.responses import Response

from serving.api.file_form import receive_form
from serving.api.request_body import Body
from serving.api.request_counting import RequestCounter
from serving.errors import Disconnected, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from serving.api.components import Components
    from serving.batch.files import Files, StoredFile
    from serving.types import Caller

PURPOSES = ("batch", "user_data")
"""Purposes of uploads; `batch_output` is that of the service's own files."""

_MAX_PAGE = 10_000
_CHUNK_BYTES = 256 * 1024
_MIN_TTL_S = 3600


class FileEndpoints:
    """Endpoints of files, over the components of this process."""

    def __init__(self, components: Components) -> None:
        self._settings = components.settings
        self._files = components.files
        self._keys = components.keys
        self._requests = RequestCounter(components.usage_sessions)

    async def create(self, request: Request) -> Response:
        """Store one file of a form. Its bytes go to the disk as they arrive."""
        caller = await self.admit(request)
        body = Body(request.receive, self._settings)
        await self._files.check_room(caller.tenant_id)
        with self._files.receive(caller.tenant_id) as received:
            form = await receive_form(
                body,
                request.headers.get("content-type", ""),
                received,
                max_file_bytes=self._settings.max_file_bytes,
            )
            purpose = form.fields.get("purpose", "")
            if purpose not in PURPOSES:
                raise InvalidRequest(f"'{purpose[:32]}' is not one of {[*PURPOSES]} - 'purpose'", param="purpose")
            file = await self._files.add(
                received,
                tenant_id=caller.tenant_id,
                purpose=purpose,
                filename=form.filename,
                ttl_s=self._ttl_s(form.fields),
            )
        return json_response(file_object(file))

    async def list(self, request: Request) -> Response:
        """List the caller's files."""
        caller = await self.admit(request)
        query = request.query_params
        order = query.get("order", "desc")
        if order not in {"asc", "desc"}:
            raise InvalidRequest(f"'{order[:32]}' is not one of ['asc', 'desc'] - 'order'", param="order")
        found, has_more = await self._files.page(
            caller.tenant_id,
            purpose=query.get("purpose"),
            after=query.get("after"),
            limit=page_size(query, _MAX_PAGE, _MAX_PAGE),
            ascending=order == "asc",
        )
        return json_response(page([file_object(file) for file in found], has_more=has_more))

    async def retrieve(self, request: Request) -> Response:
        """Return one file's object."""
        caller = await self.admit(request)
        return json_response(file_object(await self._files.get(caller.tenant_id, request.path_params["file_id"])))

    async def delete(self, request: Request) -> Response:
        """Delete one file."""
        caller = await self.admit(request)
        file_id = request.path_params["file_id"]
        await self._files.delete(caller.tenant_id, file_id)
        return json_response({"id": file_id, "object": "file", "deleted": True})

    async def content(self, request: Request) -> Response:
        """Return one file's bytes."""
        caller = await self.admit(request)
        file = await self._files.get(caller.tenant_id, request.path_params["file_id"])
        return _FileContent(self._files, file, self._settings.write_timeout_s)

    async def admit(self, request: Request) -> Caller:
        """Return the caller, and count the request."""
        caller = self._keys.authenticate(request.headers)
        await self._requests.count(caller)
        return caller

    def _ttl_s(self, fields: Mapping[str, str]) -> int | None:
        """Return the retention that `expires_after` asks for. Raises `InvalidRequest`."""
        anchor, seconds = (fields.get(f"expires_after[{name}]") for name in ("anchor", "seconds"))
        if anchor is None and seconds is None:
            return None
        return retention(anchor, int(seconds) if seconds and seconds.isdecimal() else None, self._settings.file_ttl_s)


def retention(anchor: object, seconds: object, most_s: int, *, param: str = "expires_after") -> int:
    """Return the seconds of an `expires_after`. Raises `InvalidRequest`."""
    if anchor != "created_at":
        raise InvalidRequest(f"'anchor' must be 'created_at' - '{param}'", param=param)
    if not isinstance(seconds, int) or isinstance(seconds, bool) or not _MIN_TTL_S <= seconds <= most_s:
        raise InvalidRequest(f"'seconds' must be from {_MIN_TTL_S} to {most_s} - '{param}'", param=param)
    return seconds


def file_object(file: StoredFile) -> dict[str, Any]:
    """Return a file as OpenAI shows it."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at // 1000,
        "expires_at": file.expires_at // 1000,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def page(found: list[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """Return a page of a list as OpenAI shows it."""
    first, last = (found[0]["id"], found[-1]["id"]) if found else (None, None)
    return {"object": "list", "data": found, "first_id": first, "last_id": last, "has_more": has_more}


def page_size(query: Mapping[str, str], default: int, most: int) -> int:
    """Return the `limit` of a query. Raises `InvalidRequest`."""
    limit = query.get("limit")
    if limit is None:
        return default
    if not limit.isascii() or not limit.isdecimal() or not 1 <= int(limit[:9]) <= most:
        raise InvalidRequest(f"'limit' must be from 1 to {most}", param="limit")
    return int(limit)


def json_response(answer: Mapping[str, Any]) -> Response:
    """Return a response of JSON."""
    return Response(orjson.dumps(answer), media_type="application/json")


class _FileContent(Response):
    """The bytes of a file as a response, in pieces that are read off the event loop."""

    def __init__(self, files: Files, file: StoredFile, timeout_s: float) -> None:
        super().__init__()
        self._files = files
        self._file = file
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response. Raises `Disconnected` if the client leaves data unread for too long."""
        del scope, receive
        file = self._file
        async with self._files.reading(file.id, owner=file.tenant_id) as path:
            await send(_start(file))
            offset = 0
            while offset < file.bytes and (piece := await asyncio.to_thread(_read, path, offset)):
                offset += len(piece)
                try:
                    async with asyncio.timeout(self._timeout_s):
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
                except TimeoutError:
                    raise Disconnected from None
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def _start(file: StoredFile) -> dict[str, Any]:
    name = quote(file.filename)
    headers = [
        (b"content-type", b"application/octet-stream"),
        (b"content-length", str(file.bytes).encode()),
        (b"content-disposition", f"attachment; filename*=UTF-8''{name}".encode()),
    ]
    return {"type": "http.response.start", "status": 200, "headers": headers}


def _read(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(_CHUNK_BYTES)
