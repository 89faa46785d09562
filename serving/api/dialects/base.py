"""What a dialect is: it decodes a request, and renders captions and errors. One core, two dialects.

A codec is pure: bytes and headers in, bytes out; it awaits nothing and reads no clock but for `created`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

from serving import errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from serving.types import CaptionDelta, CaptionRequest


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class HttpError:
    """An error as it goes over the wire before a stream has begun."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = "application/json"


class Reply(Protocol):
    """Renders the one answer to one decoded request. Stateful for a stream: call `frame` in order."""

    stream: bool

    ended: bool
    """The epilogue was rendered: stop generating, further deltas render as nothing.

    So after the last delta, and before it when a cumulative stream reaches the longest line that clients read.
    """

    def whole(self, text: str, last: CaptionDelta) -> bytes:
        """The body of a whole answer: all text, and the last delta's usage and finish reason."""
        ...

    def frame(self, delta: CaptionDelta) -> bytes:
        """Server-sent events for one delta: with the preamble before the first, with the epilogue after the last.

        Empty when there is nothing to tell (a delta without text that is not the last).
        """
        ...

    def error_frame(self, error: errors.CaptionerError) -> bytes:
        """The event that ends a stream which failed after its status line was sent."""
        ...


class Codec(Protocol):
    """One dialect."""

    dialect: str

    def decode_request(self, body: bytes, headers: Mapping[str, str], request_id: str) -> tuple[CaptionRequest, Reply]:
        """Check everything that can be checked without fetching the audio. `headers` has lower-case names.

        Raises `ClientError`.
        """
        ...

    def error(self, error: errors.CaptionerError, request_id: str) -> HttpError:
        """The error as a plain response."""
        ...


HEARTBEAT = b": keep-alive\n\n"
"""A comment that every client ignores (PROTOCOL 2.14)."""

MAX_LINE_BYTES = 128 * 1024
"""The longest line of an event stream that every client reads (PROTOCOL 2.12)."""

MAX_TEXT_BYTES = MAX_LINE_BYTES - 2048
"""What is left of a line for a text as JSON, beside the frame around it."""

MAX_RETRY_S = 60
"""A client that is told to come back later than this does not come back, or does not wait (PROTOCOL 2.13)."""

STATUS: dict[type[errors.CaptionerError], int] = {
    errors.ClientError: 400,
    errors.BodyTooLarge: 413,
    errors.ModelNotFound: 404,
    errors.NotFound: 404,
    errors.MethodNotAllowed: 405,
    errors.AsyncNotSupported: 403,
    errors.Unauthenticated: 401,
    errors.AccessDenied: 403,
    errors.RateLimited: 429,
    errors.UploadRejected: 403,
    errors.UploadTooLarge: 400,
    errors.UploadExists: 409,
    errors.ServerError: 500,
    errors.NotReady: 503,
    errors.Overloaded: 503,
    errors.CaptionerError: 500,
}
"""The one table of HTTP statuses; an error takes its nearest ancestor's. A dialect may differ by its own table."""


def nearest(table: Mapping[type[errors.CaptionerError], T], error: errors.CaptionerError) -> T:
    """The entry of the error's class, or of its nearest ancestor."""
    return next(table[cls] for cls in type(error).__mro__ if cls in table)


def error_headers(error: errors.CaptionerError, request_id: str) -> dict[str, str]:
    """Headers that go with an error in every dialect: what a retry should do (PROTOCOL 2.13)."""
    headers = {"x-request-id": request_id}
    if isinstance(error, errors.Overloaded):
        headers["retry-after"] = str(error.retry_after_s)
    elif isinstance(error, errors.RateLimited):
        headers |= {**error.headers, "retry-after": str(error.retry_after_s)}
        if error.retry_after_s > MAX_RETRY_S:
            headers["x-should-retry"] = "false"
    elif isinstance(error, errors.NotReady):
        headers["retry-after"] = "10"
    elif isinstance(error, (errors.DeadlineExceeded, errors.AccessDenied, errors.Arrearage)):
        headers["x-should-retry"] = "false"
    return headers


def lines(text: str) -> Iterator[str]:
    """The text in pieces that each fit one line whatever they hold (a character takes at most 12 bytes as JSON)."""
    step = MAX_TEXT_BYTES // 12
    for start in range(0, len(text), step):
        yield text[start : start + step]
