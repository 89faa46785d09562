"""Every error of the tree, in every dialect: status, code, message, headers, shape."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import pytest

from serving import errors
from serving.api.dialects import oss
from serving.api.dialects.dashscope import DashScopeCodec
from serving.api.dialects.openai import OpenAICodec
from serving.config import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

REQUEST_ID = "d532f72c-e75b-4ffb-a1ef-d2465e758958"
DASHSCOPE, OPENAI = DashScopeCodec(Settings()), OpenAICodec(Settings())

BAD = (400, "InvalidParameter", 400, "invalid_request_error", "invalid_parameter_error")
DENIED = (401, "InvalidApiKey", 401, "invalid_request_error", "invalid_api_key")
BROKEN = (500, "InternalError", 500, "internal_error", "internal_error")
REFUSED = (403, "InvalidParameter", 403, "invalid_request_error", "invalid_parameter_error")

# Native status and code; compatible status, type and code (PROTOCOL 9).
EXPECTED: dict[type[errors.CaptionerError], tuple[int, str, int, str, str | None]] = {
    errors.CaptionerError: BROKEN,
    errors.ClientError: BAD,
    errors.InvalidRequest: BAD,
    errors.MissingModel: (400, "BadRequest.EmptyModel", 400, "invalid_request_error", None),
    errors.MissingInput: (400, "BadRequest.EmptyInput", 400, "invalid_request_error", "invalid_parameter_error"),
    errors.InlineTooLarge: (400, "BadRequest.TooLarge", 400, "invalid_request_error", "invalid_parameter_error"),
    errors.TooManyValues: (400, "InvalidParameter", 400, "invalid_request_error", "invalid_parameter_error"),
    errors.BodyTimeout: (400, "InvalidParameter", 400, "invalid_request_error", "invalid_parameter_error"),
    errors.MalformedHttp: (400, "InvalidParameter", 400, "invalid_request_error", "invalid_parameter_error"),
    errors.HeadersTooLarge: (431, "InvalidParameter", 431, "invalid_request_error", "invalid_parameter_error"),
    errors.BodyTooLarge: (413, "BadRequest.TooLarge", 413, "invalid_request_error", "request_too_large"),
    errors.ModelNotFound: (400, "InvalidParameter", 404, "invalid_request_error", "model_not_found"),
    errors.NotFound: (404, "NotFound", 404, "invalid_request_error", "not_found"),
    errors.IdempotencyConflict: (409, "InvalidParameter", 409, "invalid_request_error", "idempotency_conflict"),
    errors.MethodNotAllowed: (400, "InvalidParameter", 405, "invalid_request_error", "method_not_allowed"),
    errors.AsyncNotSupported: (403, "AccessDenied", 403, "access_denied", "access_denied"),
    errors.UnsupportedOperation: (
        400,
        "UnsupportedOperation",
        400,
        "invalid_request_error",
        "unsupported_operation",
    ),
    errors.Unauthenticated: DENIED,
    errors.MissingApiKey: DENIED,
    errors.InvalidApiKey: DENIED,
    errors.AccessDenied: (403, "AccessDenied", 403, "access_denied", "access_denied"),
    errors.FreeTierExhausted: (
        403,
        "AllocationQuota.FreeTierOnly",
        403,
        "AllocationQuota.FreeTierOnly",
        "AllocationQuota.FreeTierOnly",
    ),
    errors.Arrearage: (400, "Arrearage", 400, "Arrearage", "Arrearage"),
    errors.RateLimited: (429, "Throttling", 429, "limit_requests", "limit_requests"),
    errors.RequestsLimited: (429, "Throttling.RateQuota", 429, "limit_requests", "limit_requests"),
    errors.BurstLimited: (429, "Throttling.BurstRate", 429, "limit_burst_rate", "limit_burst_rate"),
    errors.TokensLimited: (429, "Throttling.AllocationQuota", 429, "insufficient_quota", "insufficient_quota"),
    errors.AudioLimited: (429, "Throttling", 429, "limit_requests", "limit_requests"),
    errors.ConcurrencyLimited: (429, "Throttling", 429, "limit_requests", "limit_requests"),
    errors.BudgetExhausted: (429, "Throttling.AllocationQuota", 429, "insufficient_quota", "insufficient_quota"),
    errors.UploadRejected: REFUSED,
    errors.PolicyInvalid: REFUSED,
    errors.PolicyExpired: REFUSED,
    errors.KeyNotAllowed: REFUSED,
    errors.UploadEmpty: BAD,
    errors.UploadEmpty: BAD,
    errors.UploadTooLarge: BAD,
    errors.UploadExists: (409, *REFUSED[1:2], 409, *REFUSED[3:]),
    errors.AudioError: BAD,
    errors.InvalidAudioUrl: BAD,
    errors.DownloadFailed: BAD,
    errors.SourceUnavailable: (503, "ServiceUnavailable", 503, "service_unavailable", "service_unavailable"),
    errors.DownloadTimeout: (
        400,
        "InvalidParameter.DataInspection",
        400,
        "invalid_request_error",
        "invalid_parameter_error",
    ),
    errors.UploadNotFound: BAD,
    errors.AudioTooLarge: BAD,
    errors.AudioTooLong: BAD,
    errors.AudioEmpty: BAD,
    errors.AudioUnreadable: BAD,
    errors.Disconnected: BROKEN,
    errors.ServerError: BROKEN,
    errors.EngineFailed: (500, "InternalError.Algo", 500, "internal_error", "internal_error"),
    errors.EngineStalled: (500, "InternalError.Algo", 500, "internal_error", "internal_error"),
    errors.NotReady: (503, "ModelUnavailable", 503, "service_unavailable", "model_unavailable"),
    errors.Overloaded: (503, "ModelServingError", 503, "service_unavailable", "service_unavailable"),
    errors.StorageUnavailable: (503, "ServiceUnavailable", 503, "service_unavailable", "service_unavailable"),
    errors.DeadlineExceeded: (500, "RequestTimeOut", 500, "request_timeout", "request_timeout"),
    errors.Internal: BROKEN,
}


def tree(root: type[errors.CaptionerError] = errors.CaptionerError) -> Iterator[type[errors.CaptionerError]]:
    """Yield the class and all its descendants."""
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


def made(cls: type[errors.CaptionerError]) -> errors.CaptionerError:
    """Return an error of the class, with the argument it needs."""
    if issubclass(cls, errors.RateLimited):
        return cls(limit="some_limit", retry_after_s=7)
    return cls("some-name") if cls in (errors.ModelNotFound, errors.MethodNotAllowed) else cls()


def native(error: errors.CaptionerError) -> dict[str, Any]:
    """Return the native body."""
    body: dict[str, Any] = json.loads(DASHSCOPE.error(error, REQUEST_ID).body)
    return body


def compatible(error: errors.CaptionerError) -> dict[str, Any]:
    """Return the compatible body."""
    body: dict[str, Any] = json.loads(OPENAI.error(error, REQUEST_ID).body)
    return body


def test_every_class_is_expected() -> None:
    """A class that is added to the tree must be added to this table, with its rendering in both dialects."""
    assert set(tree()) == set(EXPECTED)


@pytest.mark.parametrize("cls", EXPECTED, ids=lambda cls: cls.__name__)
def test_in_both_dialects(cls: type[errors.CaptionerError]) -> None:
    """Status, code and type are the manual's; no field that Java reads as a string is null."""
    status, code, compatible_status, compatible_type, compatible_code = EXPECTED[cls]
    answer = DASHSCOPE.error(made(cls), REQUEST_ID)
    assert (answer.status, answer.content_type) == (status, "application/json")
    body = json.loads(answer.body)
    assert list(body) == ["code", "message", "request_id"]
    assert all(isinstance(value, str) and value for value in body.values())
    assert (body["code"], body["request_id"]) == (code, REQUEST_ID)

    answer = OPENAI.error(made(cls), REQUEST_ID)
    assert (answer.status, answer.content_type) == (compatible_status, "application/json")
    body = json.loads(answer.body)
    assert list(body) == ["error", "request_id"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["message"]
    assert (body["error"]["type"], body["error"]["code"]) == (compatible_type, compatible_code)


def test_bodies_to_the_byte() -> None:
    """The manual's own two examples are reproduced."""
    assert DASHSCOPE.error(errors.InvalidApiKey(), "1").body == (
        b'{"code":"InvalidApiKey","message":"Invalid API-key provided.","request_id":"1"}'
    )
    assert OPENAI.error(errors.InvalidApiKey(), "1").body == (
        b'{"error":{"message":"Incorrect API key provided.","type":"invalid_request_error","param":null,'
        b'"code":"invalid_api_key"},"request_id":"1"}'
    )


def test_texts_that_differ_by_dialect() -> None:
    """Missing key, missing model and unknown model have the messages of each dialect."""
    assert native(errors.MissingApiKey())["message"] == "No API-key provided."
    assert compatible(errors.MissingApiKey())["error"]["message"] == "Incorrect API key provided."
    assert native(errors.ModelNotFound("x"))["message"] == "Model not exist."
    assert compatible(errors.ModelNotFound("x"))["error"]["message"] == (
        "The model `x` does not exist or you do not have access to it."
    )
    assert native(errors.MissingModel())["message"] == 'Required parameter "model" missing from request.'
    assert compatible(errors.MissingModel())["error"]["message"] == "you must provide a model parameter."
    assert native(errors.MethodNotAllowed("GET"))["message"] == "Request method 'GET' is not supported."


def test_param_is_named_if_one_is_at_fault() -> None:
    """The compatible dialect names the parameter at fault."""
    assert compatible(errors.InvalidRequest("no", param="top_p"))["error"]["param"] == "top_p"
    assert compatible(errors.AudioTooLong())["error"]["param"] is None


@pytest.mark.parametrize("codec", [DASHSCOPE, OPENAI], ids=["native", "compatible"])
def test_headers_say_when_to_retry(codec: DashScopeCodec | OpenAICodec) -> None:
    """Every error has its request id; a temporary one has the time of a retry; a lasting one forbids retries."""
    assert codec.error(errors.AudioEmpty(), "1").headers == {"x-request-id": "1"}
    assert codec.error(errors.Overloaded(retry_after_s=7), "1").headers == {"x-request-id": "1", "retry-after": "7"}
    assert 0 < int(codec.error(errors.NotReady(), "1").headers["retry-after"]) <= 60
    for wish_s, header in ((0, "5"), (12.5, "13"), (9999, "60")):
        unavailable = errors.SourceUnavailable(retry_after_s=wish_s)
        assert codec.error(unavailable, "1").headers == {"x-request-id": "1", "retry-after": header}
    limited = errors.TokensLimited(limit="tokens_per_minute", retry_after_s=7)
    assert codec.error(limited, "1").headers == {"x-request-id": "1", "retry-after": "7"}
    spent = errors.BudgetExhausted(limit="tokens_per_day", retry_after_s=3600)
    assert codec.error(spent, "1").headers == {"x-request-id": "1", "retry-after": "3600", "x-should-retry": "false"}
    for lasting in (errors.DeadlineExceeded(), errors.Arrearage(), errors.FreeTierExhausted()):
        assert codec.error(lasting, "1").headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (errors.PolicyExpired(), 403, "AccessDenied"),
        (errors.KeyNotAllowed(), 403, "AccessDenied"),
        (errors.UploadEmpty(), 400, "EntityTooSmall"),
        (errors.UploadTooLarge(), 400, "EntityTooLarge"),
        (errors.RequestsLimited(limit="requests_per_minute", retry_after_s=7), 429, "QpsLimitExceeded"),
        (errors.InvalidApiKey(), 401, "AccessDenied"),
        (errors.AccessDenied(), 403, "AccessDenied"),
        (errors.BodyTooLarge(), 413, "EntityTooLarge"),
        (errors.UploadExists(), 409, "FileAlreadyExists"),
        (errors.InvalidRequest("<&> 声\N{GRINNING FACE}"), 400, "InvalidArgument"),
        (errors.Overloaded(), 503, "ServiceUnavailable"),
        (errors.Internal(), 500, "InternalError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_refused_upload_is_xml(error: errors.CaptionerError, status: int, code: str) -> None:
    """A refused upload is rendered in the object store's XML, for any message."""
    answer = oss.error(error, REQUEST_ID)
    assert (answer.status, answer.content_type) == (status, "application/xml")
    root = ET.fromstring(answer.body)  # noqa: S314 - our own bytes
    assert [(child.tag, child.text) for child in root] == [("Code", code), ("Message", str(error))]
    assert answer.headers["x-request-id"] == REQUEST_ID


def test_expired_policy_to_the_byte() -> None:
    """The manual's example is reproduced."""
    assert oss.error(errors.PolicyExpired(), "1").body == (
        b"<Error><Code>AccessDenied</Code><Message>Invalid according to Policy: Policy expired.</Message></Error>"
    )


def test_policy_body() -> None:
    """An upload policy has every key that clients send back, as strings, and no `output`."""
    body = json.loads(
        oss.policy_body(
            REQUEST_ID,
            policy="eyJ9",
            signature="c2ln",
            upload_dir="dashscope-instant/0/2025-11-18/1",
            upload_host="http://127.0.0.1:8000/oss-upload",
            expire_in_seconds=300,
            max_file_size_mb=10,
            oss_access_key_id="LTAI",
        )
    )
    assert list(body) == ["request_id", "data"]
    assert body["data"] == {
        "policy": "eyJ9",
        "signature": "c2ln",
        "upload_dir": "dashscope-instant/0/2025-11-18/1",
        "upload_host": "http://127.0.0.1:8000/oss-upload",
        "expire_in_seconds": 300,
        "max_file_size_mb": 10,
        "capacity_limit_mb": 999_999_999,
        "oss_access_key_id": "LTAI",
        "x_oss_object_acl": "private",
        "x_oss_forbid_overwrite": "true",
    }
