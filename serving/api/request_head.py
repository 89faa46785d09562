"""Rules for the head of a request: its fields may not contradict each other, and the answer if they do."""

from __future__ import annotations

import re
import uuid
from collections import Counter
from typing import TYPE_CHECKING

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from serving.api.dialects.dashscope import DashScopeCodec
from serving.api.dialects.openai import OpenAICodec
from serving.errors import MalformedHttp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serving.api.dialects.base import Codec
    from serving.config import Settings
    from serving.errors import CaptionerError

_SINGLETONS = frozenset(
    (
        *(b"authorization", b"content-type", b"content-encoding", b"host", b"x-actor"),
        *(b"x-dashscope-sse", b"x-dashscope-async", b"x-dashscope-ossresourceresolve", b"x-dashscope-encryptionkey"),
    )
)
"""Fields of which a request has one at most: with two, a proxy before the service could read the other one."""

_HOST = re.compile(rb"(?:(?:[A-Za-z0-9._~-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?)?")
"""A host with an optional port (RFC 9110, 7.2), or nothing: no list, path, user or blank."""


_COMPATIBLE = (
    *("/v1/", "/compatible-mode/"),
    # Base URLs without `/v1`: what OpenAI's clients request there.
    *("/chat/", "/audio/", "/models", "/completions", "/embeddings", "/responses", "/files", "/batches"),
)


def check_fields(http_version: str, headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Raise `MalformedHttp` for repeated fields that are read once, and for a host that is missing or not one."""
    count = Counter(name for name, _ in headers if name in _SINGLETONS)
    for name, times in count.items():
        if times > 1:
            raise MalformedHttp(f"The header {name.decode()} must not be repeated.")
    if not count[b"host"] and http_version != "1.0":
        raise MalformedHttp("The header host is missing.")
    for name, value in headers:
        if name == b"host" and not is_host(value):
            raise MalformedHttp("The header host is not a host.")
        if name == b"transfer-encoding":
            _check_transfer_encoding(http_version, value)


def _check_transfer_encoding(http_version: str, value: bytes) -> None:
    """Raise `MalformedHttp` for every coding but chunked: the parser would take the coded bytes for the body.

    RFC 9112, 6.1, has 501 for an unknown coding; clients repeat a request after that, and it would never succeed.
    """
    if http_version == "1.0":
        raise MalformedHttp("HTTP/1.0 has no transfer-encoding.")
    if value.strip().lower() != b"chunked":
        raise MalformedHttp("The only transfer-encoding is chunked.")


def is_host(value: bytes) -> bool:
    """Return whether the value is a host with an optional port, or empty."""
    return _HOST.fullmatch(value) is not None


def is_compatible(path: str) -> bool:
    """Return whether errors on the path are in OpenAI's dialect; on all other paths they are in the native one."""
    return path.startswith(_COMPATIBLE)


class HeadRefusals:
    """Renders complete responses to requests that reach no endpoint."""

    def __init__(self, settings: Settings) -> None:
        self._openai: Codec = OpenAICodec(settings)
        self._dashscope: Codec = DashScopeCodec(settings)

    def response(self, error: CaptionerError, url: bytes, default_headers: Sequence[tuple[bytes, bytes]]) -> bytes:
        """Return the response in the dialect of the path, in OpenAI's if the URL is unknown; it ends the connection."""
        path = url.partition(b"?")[0].decode("latin-1")
        codec = self._openai if not path or is_compatible(path) else self._dashscope
        rendered = codec.error(error, str(uuid.uuid4()))
        fields = [
            *default_headers,
            (b"content-type", rendered.content_type.encode()),
            (b"content-length", str(len(rendered.body)).encode()),
            *((name.encode(), value.encode("latin-1")) for name, value in rendered.headers.items()),
            (b"connection", b"close"),
        ]
        head = b"".join(b"%s: %s\r\n" % field for field in fields)
        return STATUS_LINE[rendered.status] + head + b"\r\n" + rendered.body
