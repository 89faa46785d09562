"""Bad forms at `/v1/audio/transcriptions`: each is a clear error in OpenAI's dialect, in bounded time and memory."""

from __future__ import annotations

import json
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from serving.api.dialects.transcriptions import TranscriptionCodec
from serving.config import Settings
from serving.errors import InvalidRequest
from tests.support.service import RunningService
from tests.support.wire import MODEL, wav

if TYPE_CHECKING:
    from collections.abc import Iterator

PATH = "/v1/audio/transcriptions"
CLIP = wav(1)
FORM = {"content-type": "multipart/form-data; boundary=x"}
FILE = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n%b\r\n'
END = b"--x--\r\n"
FIELD = b'--x\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'
NESTED = (
    b'--x\r\nContent-Disposition: form-data; name="file"\r\nContent-Type: multipart/mixed; boundary=y\r\n\r\n'
    b'--y\r\nContent-Disposition: file; filename="a.wav"\r\n\r\nRIFF\r\n--y--\r\n'
)

BODIES: dict[str, tuple[dict[str, str], bytes, str]] = {
    "no content type": ({"content-type": ""}, FILE % CLIP + END, "multipart/form-data with a boundary"),
    "no boundary": ({"content-type": "multipart/form-data"}, FILE % CLIP + END, "with a boundary"),
    "empty boundary": ({"content-type": "multipart/form-data; boundary="}, FILE % CLIP + END, "with a boundary"),
    "a long boundary": (
        {"content-type": f"multipart/form-data; boundary={'x' * 1000}"},
        FILE % CLIP + END,
        "The boundary of the form is too long.",
    ),
    "another boundary": (
        {"content-type": "multipart/form-data; boundary=z"},
        FILE % CLIP + END,
        "The form is malformed: it does not begin with its boundary.",
    ),
    "URL-encoded": (
        {"content-type": "application/x-www-form-urlencoded"},
        b"file=RIFF",
        "The request must be a form: multipart/form-data",
    ),
    "mixed": ({"content-type": "multipart/mixed; boundary=x"}, FILE % CLIP + END, "The request must be a form"),
    "empty": (FORM, b"", "The form is malformed"),
    "no part": (FORM, END, "The form is malformed"),
    "cut in a header": (FORM, b"--x\r\nContent-Disp", "The form is cut off"),
    "cut in the file": (FORM, FILE % CLIP, "The form is cut off"),
    "no file": (FORM, FIELD % (b"model", MODEL.encode()) + END, "The form has no part with the name file."),
    "two files": (FORM, FILE % CLIP + FILE % CLIP + END, "more than one part with the name file"),
    "a nested form": (FORM, NESTED + END, "The audio format is illegal and cannot be opened: it is text"),
    "thousands of parts": (FORM, FIELD % (b"a", b"") * 5000 + END, "The form has too many parts."),
    "a header without end": (FORM, b"--x\r\nContent-Disposition: " + b"a" * 10_000_000, "The form is cut off"),
    "headers without end": (FORM, b"--x\r\n" + b"a: b\r\n" * 1_000_000 + END, "too many headers"),
    "a header after the file": (FORM, FILE % CLIP + b"--x\r\n" + b"a" * 1_000_000 + b"\r\n" + END, "too many headers"),
    "large fields": (FORM, FIELD % (b"prompt", b"a" * 70_000) + FILE % CLIP + END, "fields of the form are too large"),
    "a field that is not UTF-8": (FORM, FIELD % (b"prompt", b"\xff") + FILE % CLIP + END, "is not UTF-8"),
    "a name without value": (
        FORM,
        b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n" + END,
        "no part with the name",
    ),
    "line feeds alone": (FORM, (FILE % b"RIFF" + END).replace(b"\r\n", b"\n"), "The form is malformed"),
}


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    """A service whose bodies have a second, and a second more for each 8 KiB."""
    with RunningService("--engine=fake", "--audio-workers=1", "--body-timeout-s=1") as running:
        yield running


@pytest.mark.parametrize("name", BODIES)
def test_bad_bodies(service: RunningService, name: str) -> None:
    """A body that is no good form is 400 in OpenAI's dialect, and says what is wrong."""
    headers, body, message = BODIES[name]
    answer = httpx.post(service.url + PATH, content=body, headers=headers, timeout=30)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (
        400,
        "invalid_request_error",
        "invalid_parameter_error",
    )
    assert message in error["message"]
    assert len(answer.content) < 1024


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        (b"preamble\r\n" + FILE % CLIP + END + b"epilogue" * 10, 1),
        (FIELD % (b"model", MODEL.encode()) + FILE % CLIP + FIELD % (b"language", b"en") + END, 3),
        ((FILE % CLIP).replace(b"filename", b"filename*=utf-8''%e2%82%ac.wav; filename") + END, 1),
        ((FILE % CLIP).replace(b"\r\n\r\n", b"\r\nContent-Type: audio/wav\r\nX: y\r\n\r\n", 1) + END, 1),
    ],
    ids=["preamble and epilogue", "fields after the file", "two names", "more headers"],
)
def test_unusual_forms_are_accepted(service: RunningService, body: bytes, parts: int) -> None:
    """A preamble, any order of the parts, and further headers are within the standard, and work."""
    answer = httpx.post(service.url + PATH, content=body, headers=FORM, timeout=30)
    assert (answer.status_code, parts) == (200, body.count(b"Content-Disposition")), answer.text


def _raw(service: RunningService, length: int, *pieces: bytes, pause_s: float = 0.0) -> dict[str, Any]:
    """Send a form with this content length piece by piece; return the answer's body."""
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\nconnection: close\r\n"
    head += f"content-type: {FORM['content-type']}\r\n\r\n"
    url = httpx.URL(service.url)
    with socket.create_connection((url.host, url.port or 0), timeout=30) as connection:
        connection.sendall(head.encode())
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(pause_s)
        received = b"".join(iter(lambda: connection.recv(65_536), b""))
    status, _, rest = received.partition(b"\r\n")
    body: dict[str, Any] = json.loads(rest.partition(b"\r\n\r\n")[2])
    return body | {"status": int(status.split()[1])}


def test_wrong_content_lengths(service: RunningService) -> None:
    """A length that is too short cuts the form; one that is too long ends as a body that did not arrive."""
    body = FILE % CLIP + END
    short = _raw(service, len(body) - 10, body[:-10])
    assert (short["status"], short["error"]["message"]) == (400, "The form is cut off: its last boundary is missing.")
    long = _raw(service, len(body) + 10, body)
    assert (long["status"], long["error"]["message"]) == (
        400,
        "The request body did not arrive: the connection was idle or slow for too long.",
    )


def test_a_slow_body_is_given_up(service: RunningService) -> None:
    """A client that sends a few bytes a second is answered 400, and its memory is released."""
    slow = _raw(service, 10_000, *(FILE[:1],) * 12, pause_s=0.2)
    assert slow["status"] == 400
    assert slow["error"]["message"].startswith("The request body did not arrive")
    service.settle()


def test_a_form_of_the_largest_size_costs_little() -> None:
    """26 MB of whatever resembles boundaries or parts is parsed or refused in less than 0.5 s of CPU time."""
    codec = TranscriptionCodec(Settings(audio_workers=1))
    size = 25 * 2**20
    for filler in (b"\0", b"\r\n", b"\r\n--", b"\r\n--y", b"\r\n--x-", b"\r", b"--x\r\n", FIELD % (b"a", b"b")):
        body = FILE % (filler * (size // len(filler))) + END
        started = time.thread_time()
        with suppress(InvalidRequest):
            codec.decode_request(body, FORM, "id")
        assert time.thread_time() - started < 0.5, filler
