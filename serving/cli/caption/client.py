"""Client of a running service in the OpenAI dialect, streamed, with retries; the standard library alone.

The proxies of the environment are used as by other programs, except for a service on this machine.
"""

from __future__ import annotations

import http.client
import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

DEFAULT_MODEL = "qwen3-omni-30b-a3b-captioner"
"""Name that a request carries if the service lists no model."""

ATTEMPTS = 5
"""Most attempts for one clip."""

LONGEST_WAIT_S = 120
"""Longest `Retry-After` in seconds that is waited for; with a longer one the clip fails."""

_SILENCE_S = 300
"""Longest silence of the service in seconds. A stream has a keep-alive line at least each 15 s by default."""

_FIRST_PAUSE_S = 0.5
_RETRIED = frozenset({408, 409, 429, 500, 502, 503, 504})
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_MOST_CHARACTERS = 300


class ServiceError(Exception):
    """A request failed. `status` is 0 if no answer came; `retry_after_s` is None if a retry does not help."""

    def __init__(
        self, message: str, *, status: int = 0, code: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Caption:
    """The caption of one clip. `stopped`: reason for which the service cut it short; None if it did not."""

    text: str
    finish_reason: str | None
    usage: Mapping[str, Any] = field(default_factory=dict)
    stopped: str | None = None
    segments: tuple[Mapping[str, Any], ...] | None = None
    """Parts of a timeline with `start` and `end` in seconds, and `caption`; None without a timeline."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which would carry the key and the audio to another address."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Service:
    """A service at an address. Raises `ValueError` if the address is none of http or https, or the key is no header."""

    def __init__(self, url: str, key: str | None = None) -> None:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError(f"--url: must be an address such as http://127.0.0.1:8000, not {url!r}")
        _ = parts.port  # raises ValueError
        if key is not None and not re.fullmatch(r"[\x21-\x7e]+", key):
            raise ValueError("--key: must be a key without blanks, such as sk-…")
        self.origin = f"{parts.scheme}://{parts.netloc}"
        path = re.sub(r"/(v1/?)?$", "", parts.path)
        self._base = f"{self.origin}{path}"
        self._headers = {"user-agent": "captioner-cli"} | ({"authorization": f"Bearer {key}"} if key else {})
        local = parts.hostname in _LOOPBACK
        handlers: list[Any] = [_NoRedirects(), *([urllib.request.ProxyHandler({})] if local else [])]
        self._opener = urllib.request.build_opener(*handlers)
        self.model = DEFAULT_MODEL

    def readiness(self) -> str | None:
        """Return what the service waits for, empty if it is ready, and None if it does not report readiness.

        Raises `ServiceError` if the address does not answer.
        """
        try:
            with self._open("/readyz", None, timeout_s=5) as response:
                return "" if _json(response.read()).get("ready") is True else None
        except ServiceError as error:
            if not error.status:
                raise
            return str(error) if error.status == http.client.SERVICE_UNAVAILABLE else None

    def choose_model(self) -> None:
        """Choose the model from the service's list: the captioner, or else the first. Raises `ServiceError`."""
        try:
            with self._open("/v1/models", None, timeout_s=30) as response:
                listed = [str(each.get("id")) for each in _json(response.read()).get("data") or ()]
        except ServiceError as error:
            if error.status == http.client.NOT_FOUND:
                return
            raise
        if listed and DEFAULT_MODEL not in listed:
            self.model = listed[0]

    def caption(
        self,
        audio: str,
        *,
        timeline: bool = False,
        on_text: Callable[[str], None] = lambda _: None,
        on_retry: Callable[[ServiceError, float], None] = lambda *_: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> Caption:
        """Return the caption of a URL or data URL. Retry until a first piece of text has arrived.

        `on_text` gets each piece of a stream, `on_retry` each failed attempt and the pause after it in seconds.

        Raises `ServiceError`.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": audio}}]}],
        }
        body |= {"stream": True, "stream_options": {"include_usage": True}} | ({"timeline": True} if timeline else {})
        encoded = json.dumps(body).encode()
        started = False

        def pieces(text: str) -> None:
            nonlocal started
            started = True
            on_text(text)

        for attempt in range(1, ATTEMPTS + 1):
            try:
                with self._open("/v1/chat/completions", encoded, timeout_s=_SILENCE_S) as response:
                    return _stream(response, pieces, timeline=timeline)
            except ServiceError as error:
                if error.retry_after_s is None or started or attempt == ATTEMPTS:
                    raise
                if error.retry_after_s > LONGEST_WAIT_S:
                    message = f"{error} (the service asks to retry in {error.retry_after_s:.0f} s)"
                    raise ServiceError(message, status=error.status, code=error.code) from error
                pause_s = max(error.retry_after_s, _FIRST_PAUSE_S * 2 ** (attempt - 1))
                on_retry(error, pause_s)
                sleep(pause_s)
        raise AssertionError

    def _open(self, path: str, body: bytes | None, *, timeout_s: float) -> _Response:
        headers = self._headers | ({"content-type": "application/json"} if body else {})
        request = urllib.request.Request(f"{self._base}{path}", body, headers)  # noqa: S310 - http or https
        try:
            return _Response(self._opener.open(request, timeout=timeout_s))
        except urllib.error.HTTPError as error:
            with error:
                raise _refused(error) from None
        except (OSError, http.client.HTTPException) as error:
            raise _lost(error, f"cannot reach {self.origin}") from None


class _Response:
    """An open response, whose reading raises `ServiceError`. A context."""

    def __init__(self, response: Any) -> None:
        self._response = response

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._response.close()

    def read(self) -> bytes:
        try:
            body: bytes = self._response.read()
        except (OSError, http.client.HTTPException) as error:
            raise _lost(error, "the connection was lost") from None
        return body

    def lines(self) -> Iterator[bytes]:
        try:
            yield from self._response
        except (OSError, http.client.HTTPException) as error:
            raise _lost(error, "the connection was lost within the caption") from None


def _stream(response: _Response, on_text: Callable[[str], None], *, timeline: bool) -> Caption:
    """Return the caption of a stream of server-sent events, with the segments of its timeline if one is requested."""
    texts: list[str] = []
    segments: list[Mapping[str, Any]] = []
    finish_reason: str | None = None
    usage: Mapping[str, Any] = {}
    stopped: str | None = None
    for line in response.lines():
        if not line.startswith(b"data:"):
            continue  # a comment that keeps the connection alive, or the end of an event
        data = line[5:].strip()
        if data == b"[DONE]":
            if timeline and not segments:
                raise ServiceError("this service makes no timelines: its answer has none")
            return Caption("".join(texts), finish_reason, usage, stopped, tuple(segments) if timeline else None)
        event = _json(data)
        if event.get("error"):
            raise _reported(event, 0, retry_after_s=None)
        usage = event.get("usage") or usage
        stopped = (event.get("captioner") or {}).get("stopped") or stopped
        for choice in event.get("choices") or ():
            finish_reason = choice.get("finish_reason") or finish_reason
            delta = choice.get("delta") or {}
            segments += (delta.get("timeline") or {}).get("segments") or ()
            if text := delta.get("content"):
                texts.append(text)
                on_text(text)
    raise ServiceError("the stream ended within the caption", retry_after_s=0)


def _refused(error: urllib.error.HTTPError) -> ServiceError:
    """Return the error of a response whose status is none of success."""
    wait_s: float | None = None
    if error.code in _RETRIED and error.headers.get("x-should-retry") != "false":
        given = error.headers.get("retry-after") or ""
        wait_s = float(given) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", given) else 0.0
    if location := error.headers.get("location"):
        return ServiceError(f"the service redirects to {location}; pass that address as --url", status=error.code)
    try:
        body = error.read(65_536)
    except (OSError, http.client.HTTPException):
        body = b""
    try:
        return _reported(_json(body), error.code, wait_s)
    except ServiceError:
        return ServiceError(f"HTTP {error.code} {error.reason}", status=error.code, retry_after_s=wait_s)


def _reported(answer: Mapping[str, Any], status: int, retry_after_s: float | None) -> ServiceError:
    """Return the error that the service describes: OpenAI's object, or the reason of a service that is not ready."""
    found = answer.get("error")
    about: Mapping[str, Any] = found if isinstance(found, dict) else {}
    message = about.get("message") or answer.get("progress") or answer.get("reason") or f"HTTP {status}"
    code = about.get("code")
    plain = " ".join(str(message).split())[:_MOST_CHARACTERS]
    return ServiceError(plain, status=status, code=None if code is None else str(code), retry_after_s=retry_after_s)


def _lost(error: BaseException, what: str) -> ServiceError:
    """Return the error of a connection that failed."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause) or type(cause).__name__
    return ServiceError(f"{what}: {reason}", retry_after_s=0)


def _json(body: bytes) -> dict[str, Any]:
    """Return the object. Raises `ServiceError`."""
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise ServiceError("the answer is no JSON object: is there a captioner at this address?")
    return answer
