"""`/v1/batches`: OpenAI's batches of caption requests. Errors are in OpenAI's form."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from serving.api.dialects.json_codec import parse_object
from serving.api.files import json_response, page, page_size, retention
from serving.api.request_body import Body
from serving.api.request_counting import RequestCounter
from serving.batch.database_calls import in_database
from serving.errors import BodyTooLarge, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.requests import Request
    from starlette.responses import Response

    from serving.api.components import Components
    from serving.api.dialects.base import Codec, HttpError, Reply
    from serving.batch.store import Batch
    from serving.errors import CaptionerError
    from serving.types import Caller, CaptionRequest

ENDPOINTS = ("/v1/chat/completions",)

_MIN_WINDOW_H, _MAX_WINDOW_H = 24, 336
_WINDOW = re.compile(r"([0-9]{1,3})(h|d)")
_MAX_BODY_BYTES = 64 * 1024
_MAX_PAIRS, _MAX_KEY, _MAX_VALUE = 16, 64, 512
_MAX_PAGE, _PAGE = 100, 20
_COMPATIBLE = "/compatible-mode"


@dataclass(frozen=True, slots=True)
class LineDialect:
    """The dialect of lines: a codec, and the parser of a line."""

    codec: Codec

    def decode_request(self, body: bytes, headers: Mapping[str, str], request_id: str) -> tuple[CaptionRequest, Reply]:
        """See `Codec`."""
        return self.codec.decode_request(body, headers, request_id)

    def error(self, error: CaptionerError, request_id: str) -> HttpError:
        """See `Codec`."""
        return self.codec.error(error, request_id)

    def parse(self, body: bytes) -> dict[str, Any]:
        """Return the object of a JSON text. Raises `InvalidRequest`."""
        return parse_object(body)


class BatchEndpoints:
    """Endpoints of batches, over the components of this process."""

    def __init__(self, components: Components) -> None:
        self._settings = components.settings
        self._files = components.files
        self._store = components.batches
        self._runner = components.batch_runner
        self._keys = components.keys
        self._requests = RequestCounter(components.usage_sessions)

    async def create(self, request: Request) -> Response:
        """Make a batch over a stored file; its lines are checked, and run, in the background."""
        caller = await self._admit(request)
        values = parse_object(await _body(Body(request.receive, self._settings)))
        endpoint, window, window_s = _endpoint(values), *_window(values)
        file_id = values.get("input_file_id")
        if not isinstance(file_id, str):
            raise InvalidRequest("input_file_id must be the id of a file.", param="input_file_id")
        file = await self._files.get(caller.tenant_id, file_id)
        if file.purpose != "batch":
            raise InvalidRequest(f"The purpose of the file is '{file.purpose}', not 'batch'.", param="input_file_id")
        create = partial(
            self._store.create,
            tenant_id=caller.tenant_id,
            key_id=caller.key_id,
            endpoint=endpoint,
            input_file_id=file.id,
            completion_window=window,
            window_s=window_s,
            output_ttl_s=self._output_ttl_s(values),
            metadata=_metadata(values),
        )
        batch = await in_database(create)
        self._runner.wake()
        return json_response(batch_object(batch))

    async def retrieve(self, request: Request) -> Response:
        """Return one batch."""
        caller = await self._admit(request)
        get = partial(self._store.get, caller.tenant_id, request.path_params["batch_id"])
        return json_response(batch_object(await in_database(get)))

    async def list(self, request: Request) -> Response:
        """List the caller's batches, the latest first."""
        caller = await self._admit(request)
        query = request.query_params
        found, has_more = await in_database(
            partial(
                self._store.page,
                caller.tenant_id,
                after=query.get("after"),
                limit=page_size(query, _PAGE, _MAX_PAGE),
            )
        )
        return json_response(page([batch_object(batch) for batch in found], has_more=has_more))

    async def cancel(self, request: Request) -> Response:
        """Begin to cancel one batch."""
        caller = await self._admit(request)
        cancel = partial(self._store.cancel, caller.tenant_id, request.path_params["batch_id"])
        batch = await in_database(cancel)
        self._runner.wake()
        return json_response(batch_object(batch))

    def _output_ttl_s(self, values: Mapping[str, Any]) -> int | None:
        """Return the retention of the output files that the caller asks for. Raises `InvalidRequest`."""
        param = "output_expires_after"
        wanted = values.get(param)
        if wanted is None:
            return None
        if not isinstance(wanted, dict):
            raise InvalidRequest(f"{param} must be an object.", param=param)
        return retention(wanted.get("anchor"), wanted.get("seconds"), self._settings.file_ttl_s, param=param)

    async def _admit(self, request: Request) -> Caller:
        """Return the caller, and count the request."""
        caller = self._keys.authenticate(request.headers)
        await self._requests.count(caller)
        return caller


def batch_object(batch: Batch) -> dict[str, Any]:
    """Return a batch as OpenAI shows it."""
    times = ("created", "in_progress", "expires", "finalizing", "completed", "failed", "expired", "cancelling")
    at = {f"{name}_at": getattr(batch, f"{name}_at") for name in (*times, "cancelled")}
    tokens = {"input_tokens": batch.input_tokens, "output_tokens": batch.output_tokens}
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": {"object": "list", "data": batch.errors} if batch.errors else None,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        **{name: None if value is None else value // 1000 for name, value in at.items()},
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "usage": tokens
        | {
            "total_tokens": batch.input_tokens + batch.output_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        },
        "metadata": batch.metadata,
    }


async def _body(pieces: Body) -> bytes:
    """Return a small body. Raises `BodyTooLarge`, `Disconnected` and `BodyTimeout`."""
    read = bytearray()
    async for piece in pieces:
        read += piece
        if len(read) > _MAX_BODY_BYTES:
            raise BodyTooLarge
    return bytes(read)


def _endpoint(values: Mapping[str, Any]) -> str:
    endpoint = values.get("endpoint")
    name = endpoint.removeprefix(_COMPATIBLE) if isinstance(endpoint, str) else None
    if name not in ENDPOINTS:
        raise InvalidRequest(f"{str(endpoint)[:64]!r} is not one of {[*ENDPOINTS]} - 'endpoint'", param="endpoint")
    return name


def _window(values: Mapping[str, Any]) -> tuple[str, int]:
    """Return a completion window as it is written, and its seconds. Raises `InvalidRequest`."""
    window = values.get("completion_window")
    found = _WINDOW.fullmatch(window) if isinstance(window, str) else None
    hours = int(found[1]) * (24 if found[2] == "d" else 1) if found else 0
    if not isinstance(window, str) or not _MIN_WINDOW_H <= hours <= _MAX_WINDOW_H:
        message = f"completion_window must be from '{_MIN_WINDOW_H}h' to '{_MAX_WINDOW_H}h', or from '1d' to '14d'."
        raise InvalidRequest(message, param="completion_window")
    return window, hours * 3600


def _metadata(values: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the pairs of a caller's own. Raises `InvalidRequest`."""
    metadata = values.get("metadata")
    if metadata is None:
        return None
    valid = isinstance(metadata, dict) and len(metadata) <= _MAX_PAIRS
    if not valid or not all(
        len(key) <= _MAX_KEY and isinstance(value, str) and len(value) <= _MAX_VALUE and "\0" not in key + value
        for key, value in metadata.items()
    ):
        message = f"metadata must be at most {_MAX_PAIRS} pairs of texts of {_MAX_KEY} and {_MAX_VALUE} characters."
        raise InvalidRequest(message, param="metadata")
    return dict(metadata)
