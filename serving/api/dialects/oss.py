"""Wire format of uploads (PROTOCOL 6): a policy from the service (E3), then a form to an object store (E4).

The store's refusals are XML with the codes and messages of Alibaba Cloud OSS.
"""

from __future__ import annotations

from xml.sax.saxutils import escape

from serving import errors
from serving.api.dialects.base import STATUS, HttpError, error_headers, nearest
from serving.api.dialects.json_codec import quote

_CODE: dict[type[errors.CaptionerError], str] = {
    errors.ClientError: "InvalidArgument",
    errors.BodyTooLarge: "EntityTooLarge",
    errors.Unauthenticated: "AccessDenied",
    errors.AccessDenied: "AccessDenied",
    errors.Arrearage: "AccessDenied",
    errors.RateLimited: "QpsLimitExceeded",
    errors.CaptionerError: "InternalError",
    errors.Overloaded: "ServiceUnavailable",
    errors.StorageUnavailable: "ServiceUnavailable",
}


def policy_body(
    request_id: str,
    *,
    policy: str,
    signature: str,
    upload_dir: str,
    upload_host: str,
    expire_in_seconds: int,
    max_file_size_mb: int,
    oss_access_key_id: str,
) -> bytes:
    """Render the response to `GET /api/v1/uploads?action=getPolicy` (PROTOCOL 6.1).

    Clients send the strings back as form fields.
    """
    return (
        f'{{"request_id":{quote(request_id)},"data":{{"policy":{quote(policy)},"signature":{quote(signature)},'
        f'"upload_dir":{quote(upload_dir)},"upload_host":{quote(upload_host)},'
        f'"expire_in_seconds":{expire_in_seconds},"max_file_size_mb":{max_file_size_mb},'
        f'"capacity_limit_mb":999999999,"oss_access_key_id":{quote(oss_access_key_id)},'
        f'"x_oss_object_acl":"private","x_oss_forbid_overwrite":"true"}}}}'
    ).encode("ascii")


def error(error: errors.CaptionerError, request_id: str) -> HttpError:
    """Render the error as the object store does, in XML."""
    code = error.code if isinstance(error, errors.UploadRejected) else nearest(_CODE, error)
    body = f"<Error><Code>{code}</Code><Message>{escape(str(error))}</Message></Error>"
    return HttpError(nearest(STATUS, error), body.encode(), error_headers(error, request_id), "application/xml")
