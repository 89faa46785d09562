"""Interface of a dialect, which decodes requests and renders captions and errors. One core, two dialects.

A codec is pure: bytes and headers in, bytes out. It awaits nothing, and reads the clock only for `created`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

from serving import errors
from serving.types import Guard

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from serving.types import CaptionDelta, CaptionRequest


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class HttpError:
    """An error as a plain HTTP response, for as long as no stream has started."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = "application/json"


class Reply(Protocol):
    """Renderer of the response to one decoded request. Stateful for a stream: call `event` in order."""

    stream: bool

    @property
    def content_type(self) -> str:
        """Content type of a response that is not streamed."""
        ...

    ended: bool
    """The epilogue was rendered: stop generating; further deltas render as no bytes.

    True after the last delta, and earlier when a cumulative stream reaches the longest line that clients read.
    """

    def full_body(self, text: str, last: CaptionDelta) -> bytes:
        """Render a response that is not streamed: all text, and the last delta's usage and finish reason."""
        ...

    def event(self, delta: CaptionDelta) -> bytes:
        """Render one delta as SSE events: with the preamble before the first, with the epilogue after the last.

        Empty for a delta without text that is not the last.
        """
        ...

    def error_event(self, error: errors.CaptionerError) -> bytes:
        """Render the SSE event that ends a stream which failed after its status line was sent."""
        ...


class Codec(Protocol):
    """One dialect."""

    dialect: str

    def decode_request(self, body: bytes, headers: Mapping[str, str], request_id: str) -> tuple[CaptionRequest, Reply]:
        """Decode a request, and check everything that needs no audio. `headers` has lower-case names.

        Raises `ClientError`.
        """
        ...

    def error(self, error: errors.CaptionerError, request_id: str) -> HttpError:
        """Render the error as a plain response."""
        ...


HEARTBEAT = b": keep-alive\n\n"
"""SSE comment that every client ignores (PROTOCOL 2.14)."""

MAX_LINE_BYTES = 128 * 1024
"""Longest line of an SSE stream that every client reads (PROTOCOL 2.12)."""

MAX_TEXT_BYTES = MAX_LINE_BYTES - 2048
"""Part of a line that a text may take as JSON; the rest is for the event around the text."""

MAX_RETRY_S = 60
"""Longest `retry-after` that every client honours: above it clients do not retry, or do not wait (PROTOCOL 2.13)."""

SOURCE_RETRY_S = 5
"""Least `retry-after` where the server of a URL is not available and does not say for how long."""

STATUS: dict[type[errors.CaptionerError], int] = {
    errors.ClientError: 400,
    errors.BodyTooLarge: 413,
    errors.HeadersTooLarge: 431,
    errors.ModelNotFound: 404,
    errors.NotFound: 404,
    errors.IdempotencyConflict: 409,
    errors.MethodNotAllowed: 405,
    errors.AsyncNotSupported: 403,
    errors.Unauthenticated: 401,
    errors.AccessDenied: 403,
    errors.RateLimited: 429,
    errors.SourceUnavailable: 503,
    errors.UploadRejected: 403,
    errors.UploadEmpty: 400,
    errors.UploadTooLarge: 400,
    errors.UploadExists: 409,
    errors.ServerError: 500,
    errors.NotReady: 503,
    errors.Overloaded: 503,
    errors.StorageUnavailable: 503,
    errors.CaptionerError: 500,
}
"""The single table of HTTP statuses: an error has the status of its nearest ancestor. A dialect may override it."""


def nearest(table: Mapping[type[errors.CaptionerError], T], error: errors.CaptionerError) -> T:
    """Return the entry of the error's class, or of its nearest ancestor."""
    return next(table[cls] for cls in type(error).__mro__ if cls in table)


def error_headers(error: errors.CaptionerError, request_id: str) -> dict[str, str]:
    """Return the headers of an error in every dialect: the request id, and when to retry (PROTOCOL 2.13)."""
    headers = {"x-request-id": request_id}
    if isinstance(error, errors.Overloaded):
        headers["retry-after"] = str(error.retry_after_s)
    elif isinstance(error, errors.RateLimited):
        headers |= {**error.headers, "retry-after": str(error.retry_after_s)}
        if error.retry_after_s > MAX_RETRY_S:
            headers["x-should-retry"] = "false"
    elif isinstance(error, errors.SourceUnavailable):
        headers["retry-after"] = str(min(MAX_RETRY_S, max(SOURCE_RETRY_S, math.ceil(error.retry_after_s))))
    elif isinstance(error, (errors.NotReady, errors.StorageUnavailable)):
        headers["retry-after"] = "10"
    elif isinstance(error, (errors.DeadlineExceeded, errors.AccessDenied, errors.Arrearage)):
        headers["x-should-retry"] = "false"
    return headers


def stopped_field(delta: CaptionDelta) -> str:
    """Return the JSON member that says why a caption was stopped early; empty for any other caption."""
    return f'"captioner":{{"stopped":"{delta.stopped}"}},' if delta.stopped else ""


def requested_guard(headers: Mapping[str, str]) -> Guard:
    """Return the policy of the quality guard that the request allows. Raises `InvalidRequest`."""
    value = headers.get("x-captioner-guard", Guard.RETRY).lower()
    if value not in [*Guard]:
        raise errors.InvalidRequest("x-captioner-guard should be off, stop or retry", param="x-captioner-guard")
    return Guard(value)


def lines(text: str) -> Iterator[str]:
    """Split a text into pieces that fit one line each, for any characters (one takes at most 12 bytes as JSON)."""
    step = MAX_TEXT_BYTES // 12
    for start in range(0, len(text), step):
        yield text[start : start + step]
