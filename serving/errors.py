"""The only exception tree.

Domain code raises; each dialect renders at one place (`api/dialects/`); statuses are in `api/dialects/base.py`.

    CaptionerError
    ├── ClientError                  the caller can correct it; the message says how
    │   ├── InvalidRequest           malformed body, message or parameter
    │   │   ├── MissingModel
    │   │   ├── MissingInput
    │   │   ├── InlineTooLarge       base64 text over the limit
    │   │   ├── TooManyValues        JSON with too many containers, keys and values
    │   │   ├── BodyTimeout          the body arrives too slowly
    │   │   └── MalformedHttp        no HTTP request, or headers that contradict each other
    │   ├── HeadersTooLarge          request line and headers over the limits
    │   ├── BodyTooLarge             the raw HTTP body is over the cap
    │   ├── ModelNotFound
    │   ├── NotFound                 unknown path or resource
    │   ├── IdempotencyConflict      the key of another request within 24 hours
    │   ├── MethodNotAllowed
    │   ├── AsyncNotSupported
    │   ├── UnsupportedOperation
    │   ├── Unauthenticated
    │   │   ├── MissingApiKey
    │   │   └── InvalidApiKey
    │   ├── AccessDenied             the tenant is suspended
    │   │   └── FreeTierExhausted    "free tier only", and nothing is left of it
    │   ├── Arrearage                the tenant owes money
    │   ├── RateLimited              a limit of the caller's is reached; carries `limit` and `retry_after_s`
    │   │   ├── RequestsLimited      requests per minute
    │   │   ├── BurstLimited         requests that come all at once
    │   │   ├── TokensLimited        tokens per minute
    │   │   ├── AudioLimited         audio-seconds per minute
    │   │   ├── ConcurrencyLimited   requests, or audio-seconds, under way
    │   │   └── BudgetExhausted      tokens, or money, of a day or a month
    │   ├── UploadRejected           an upload is refused; `code` is the object store's word for it
    │   │   ├── PolicyInvalid        not signed by us, or not a policy
    │   │   ├── PolicyExpired
    │   │   ├── KeyNotAllowed        the policy does not cover this key
    │   │   ├── UploadEmpty          no byte
    │   │   ├── UploadTooLarge       bytes over the limit
    │   │   └── UploadExists         nothing is overwritten
    │   └── AudioError               the audio itself, or the way to it
    │       ├── InvalidAudioUrl      not a reference we accept
    │       ├── DownloadFailed       DNS, status, or an address the egress guard forbids
    │       │   └── SourceUnavailable    connection refused, or status 502 to 504, twice; the client may retry (503)
    │       ├── DownloadTimeout
    │       ├── UploadNotFound       unknown, expired, or another owner's `oss://` key
    │       ├── AudioTooLarge        bytes over the limit
    │       ├── AudioTooLong         over 40 minutes, decoded
    │       ├── AudioEmpty           decodes to no sample
    │       └── AudioUnreadable      no decoder can open it
    ├── Disconnected                 the client has gone; nobody is left to answer
    └── ServerError                  our fault or our limits; the message never shows insides
        ├── EngineFailed             the engine died or refused
        │   └── EngineStalled        it lives, but makes no progress
        ├── NotReady                 the engine is still loading, or gone
        ├── Overloaded               a queue is full; carries `retry_after_s` and `reason`
        ├── StorageUnavailable       the bucket of uploaded files, or the database of usage, cannot be used
        ├── DeadlineExceeded         nothing generated in time
        └── Internal                 anything else
"""

from __future__ import annotations

import copyreg
import re
from typing import TYPE_CHECKING, Any, Self

from serving.types import Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping


class CaptionerError(Exception):
    """Root of the tree. `str(error)` is safe to show to the caller."""

    message = "An internal error has occured, please try again later or contact service support."  # sic

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or self.message)

    def __reduce__(self) -> tuple[Any, ...]:
        # Skip `__init__`, whose arguments differ from class to class: `args` and the attributes are the complete state.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class ClientError(CaptionerError):
    """An error that the caller can correct."""


class InvalidRequest(ClientError):
    """A malformed body, message or parameter. `param` names the field, if one is at fault."""

    message = "Required body invalid, please check the request body format."

    def __init__(self, message: str | None = None, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    @classmethod
    def because(cls, reason: str, *, sentence: str | None = None, param: str | None = None) -> Self:
        """Return the error with one of the manual's sentences, by default the class's, and the reason."""
        return cls(f"{sentence or cls.message} {reason}", param=param)


class MissingModel(InvalidRequest):
    message = 'Required parameter "model" missing from request.'


class MissingInput(InvalidRequest):
    message = "Required input parameter missing from request."


class InlineTooLarge(InvalidRequest):
    message = "Exceeded limit on max bytes per data-uri item : 10485760"


class TooManyValues(InvalidRequest):
    pass


class BodyTimeout(InvalidRequest):
    message = "The request body did not arrive: the connection was idle or slow for too long."


class MalformedHttp(InvalidRequest):
    message = "Invalid HTTP request received."


class HeadersTooLarge(ClientError):
    message = "Request line and header fields are too large."


class BodyTooLarge(ClientError):
    message = "Payload Too Large."


class ModelNotFound(ClientError):
    """No such model. `model` is the requested name; `hint` is a sentence with the names that are served, or empty."""

    def __init__(self, model: str, hint: str = "") -> None:
        super().__init__(f"The model `{model}` does not exist or you do not have access to it.{hint and ' '}{hint}")
        self.model = model
        self.hint = hint


class NotFound(ClientError):
    message = "Not found!"


class IdempotencyConflict(ClientError):
    message = "This Idempotency-Key was sent with another request within the last 24 hours; use a new key."


class MethodNotAllowed(ClientError):
    """`allowed` are the methods of the path, separated by commas, if known."""

    def __init__(self, method: str, allowed: str = "") -> None:
        super().__init__(f"Request method '{method}' is not supported.{allowed and f' Use {allowed}.'}")


class AsyncNotSupported(ClientError):
    message = "Current user api does not support asynchronous calls."


class UnsupportedOperation(ClientError):
    message = "The operation is not supported."


class Unauthenticated(ClientError):
    message = "Invalid API-key provided."


class MissingApiKey(Unauthenticated):
    message = "No API-key provided."


class InvalidApiKey(Unauthenticated):
    pass


class AccessDenied(ClientError):
    message = "Access denied."


class FreeTierExhausted(AccessDenied):
    message = (
        "The free tier of the model has been exhausted. If you wish to continue access the model "  # sic
        'on a paid basis, please disable the "use free tier only" mode in the management console.'
    )


class Arrearage(ClientError):
    message = "Access denied, please make sure your account is in good standing."


class RateLimited(ClientError):
    """The caller has reached a limit. `limit` names it; `retry_after_s`: when to retry, in seconds.

    `headers` hold the caller's limits and what remains of them (`x-ratelimit-…`).
    """

    message = "Requests throttling triggered."

    def __init__(self, message: str | None = None, *, limit: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.limit = limit
        self.retry_after_s = retry_after_s
        self.headers: Mapping[str, str] = {}


class RequestsLimited(RateLimited):
    message = "Requests rate limit exceeded, please try again later."


class BurstLimited(RateLimited):
    message = (
        "Request rate increased too quickly. To ensure system stability, please adjust your client logic to scale "
        "requests more smoothly over time."
    )


class TokensLimited(RateLimited):
    message = "Allocated quota exceeded, please increase your quota limit."


class AudioLimited(RateLimited):
    pass


class ConcurrencyLimited(RateLimited):
    message = "Too many requests in route. Please try again later."


class BudgetExhausted(RateLimited):
    message = "Allocated quota exceeded, please increase your quota limit."


class UploadRejected(ClientError):
    """An upload is refused. `code` is the code that an OSS client reads in the XML of the response (PROTOCOL 6.2)."""

    code = "AccessDenied"


class PolicyInvalid(UploadRejected):
    message = "Invalid according to Policy: the policy or its signature is not valid."


class PolicyExpired(UploadRejected):
    message = "Invalid according to Policy: Policy expired."


class KeyNotAllowed(UploadRejected):
    message = "Invalid according to Policy: the key must be upload_dir, a slash and one file name."


class UploadEmpty(UploadRejected):
    code = "EntityTooSmall"
    message = "Your proposed upload is smaller than the minimum allowed size."


class UploadTooLarge(UploadRejected):
    code = "EntityTooLarge"
    message = "Your proposed upload exceeds the maximum allowed size."


class UploadExists(UploadRejected):
    code = "FileAlreadyExists"
    message = "The object you specified already exists and can not be overwritten."  # sic


class AudioError(ClientError):
    """The audio, or the path to it, is at fault."""


class InvalidAudioUrl(AudioError):
    message = "The provided URL does not appear to be valid. Ensure it is correctly formatted."

    @classmethod
    def because(cls, reason: str) -> Self:
        """Return the error with the manual's sentence, which eleven mistakes share, and the reason."""
        return cls(f"{cls.message} {reason}")


class DownloadFailed(AudioError):
    message = "Failed to download multimodal content."


class SourceUnavailable(DownloadFailed):
    """The server of a URL cannot be reached now. `retry_after_s`: its wish for when to retry, in seconds, else 0."""

    def __init__(self, message: str | None = None, *, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DownloadTimeout(AudioError):
    message = "Download the media resource timed out during the data inspection process."


class UploadNotFound(AudioError):
    message = "Failed to find the requested media resource during the data inspection process."


class AudioTooLarge(AudioError):
    message = "Multimodal file size is too large"


class AudioTooLong(AudioError):
    message = "The audio is too long"


class AudioEmpty(AudioError):
    message = "The audio is empty"


class AudioUnreadable(AudioError):
    message = "The audio format is illegal and cannot be opened"


class Disconnected(CaptionerError):
    message = "The client has closed the connection."


class ServerError(CaptionerError):
    """A fault or a limit of the service."""


class EngineFailed(ServerError):
    message = "inference internal error."


class EngineStalled(EngineFailed):
    pass


class NotReady(ServerError):
    """`progress`: how far the start is, for `/readyz` and the log; callers do not get it."""

    message = "Model is unavailable, please try again later."

    def __init__(self, message: str | None = None, *, progress: str = "") -> None:
        super().__init__(message)
        self.progress = progress


class Overloaded(ServerError):
    """A bound is reached. `retry_after_s`: when to retry, in seconds. `reason`: the name of the bound."""

    message = (
        "Too many requests. Your requests are being throttled due to system capacity limits. Please try again later."
    )

    def __init__(self, message: str | None = None, *, retry_after_s: int = 5, reason: str = "capacity") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.reason = reason


class StorageUnavailable(ServerError):
    message = "The storage of uploaded files is unavailable, please try again later."


class DeadlineExceeded(ServerError):
    message = "Request timed out, please try again later."


class Internal(ServerError):
    pass


def error_code(kind: type[CaptionerError]) -> str:
    """Return the error's name as metric labels have it: `engine_stalled` for `EngineStalled`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


def outcome_of(error: BaseException | None, *, partial: bool, generated: bool) -> tuple[Outcome, str]:
    """Return the outcome of a request, and the code of the error that ended it ("" if it was answered).

    `error`: the exception that ended the request, `None` if it was answered; `partial`: the response's deadline cut the
    answer; `generated`: the engine had generated at least one token.
    """
    failed = Outcome.FAILED_MIDSTREAM if generated else Outcome.FAILED
    match error:
        case None:
            return (Outcome.PARTIAL if partial else Outcome.FINISHED), ""
        case Disconnected():
            return Outcome.DISCONNECTED, "disconnected"
        case ClientError():
            return Outcome.REJECTED, error_code(type(error))
        case CaptionerError():
            return failed, error_code(type(error))
        case Exception():
            return failed, "internal"
        case _:
            return Outcome.CANCELLED, "cancelled"
