"""Bad input of every kind, over HTTP, in both dialects: the right status and code, and a service that keeps running."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx
import psutil
import pytest

from tests.api.dialects.bad_requests import BAD_URL, DASHSCOPE, OPENAI
from tests.audio.clips import clip
from tests.support.service import RunningService
from tests.support.wire import (
    COMPATIBLE,
    NATIVE,
    ask_native,
    compatible_body,
    data_url,
    native_body,
    upload,
    wav,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.api.dialects.bad_requests import Case
    from tests.support.media import MediaServer

DOWNLOAD_FAILED = "Failed to download multimodal content."
TIMED_OUT = "Download the media resource timed out"
TOO_LARGE = "Multimodal file size is too large"
UNREADABLE = "The audio format is illegal and cannot be opened"
EMPTY = "The audio is empty"
TOO_LONG = "The audio is too long"
UPLOAD_MISSING = "Failed to find the requested media resource"


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    """A service that may fetch from loopback, with limits that tests can reach: 60 s of audio, 1 MB, 1 s to fetch."""
    with RunningService(
        "--engine=fake",
        "--audio-workers=1",
        "--fetch-allow=127.0.0.1",
        "--max-audio-s=60",
        "--max-url-bytes=1000000",
        "--fetch-timeout-s=1",
    ) as running:
        yield running


@pytest.fixture(scope="module")
def guarded() -> Iterator[RunningService]:
    """A service with the default egress guard."""
    with RunningService("--engine=fake", "--audio-workers=1") as running:
        yield running


@dataclass(frozen=True)
class Refusal:
    """Both dialects' refusal: status, native code, compatible code, a part of the message."""

    message: str
    native_code: str = "InvalidParameter"
    compatible_code: str = "invalid_parameter_error"
    status: int = 400


def assert_refused(
    service: RunningService, audio: str, refusal: Refusal, headers: dict[str, str] | None = None
) -> None:
    """Assert that both dialects refuse this audio with this refusal."""
    native = httpx.post(service.url + NATIVE, json=native_body(audio), headers=headers, timeout=30)
    assert native.status_code == refusal.status, native.text
    assert native.json()["code"] == refusal.native_code
    assert refusal.message in native.json()["message"]
    assert native.json()["request_id"] == native.headers["x-request-id"]
    compatible = httpx.post(service.url + COMPATIBLE, json=compatible_body(audio), headers=headers, timeout=30)
    assert compatible.status_code == refusal.status, compatible.text
    assert compatible.json()["error"]["code"] == refusal.compatible_code
    assert refusal.message in compatible.json()["error"]["message"]


def test_requests(service: RunningService) -> None:
    """Every bad message, parameter, reference and header is refused over HTTP as by its codec; memory is released."""
    assert ask_native(service.url, data_url(wav(1))).text
    process = psutil.Process(service.process.pid)
    before = process.memory_info().rss
    with httpx.Client(timeout=60) as client:
        for path, cases in ((NATIVE, DASHSCOPE), (COMPATIBLE, OPENAI)):
            assert len(cases) >= 150
            for case in cases:
                _check_over_http(client, service.url + path, case)
    service.settle()
    assert ask_native(service.url, data_url(wav(1))).text
    assert process.memory_info().rss < before + 128 * 2**20


def _check_over_http(client: httpx.Client, url: str, case: Case) -> None:
    response = client.post(url, content=case.body, headers=dict(case.headers))
    assert response.status_code == case.status, (case.name, response.text)
    body = response.json()
    error = body if url.endswith(NATIVE) else body["error"]
    assert error["code"] == case.code, (case.name, response.text)
    assert case.message in error["message"], (case.name, response.text)
    assert body["request_id"] == response.headers["x-request-id"], case.name


FORBIDDEN = [
    "http://127.0.0.1:8000/a.wav",
    "http://127.1:8000/a.wav",
    "http://2130706433:8000/a.wav",
    "http://0x7f000001:8000/a.wav",
    "http://0177.0.0.1:8000/a.wav",
    "http://0.0.0.0:8000/a.wav",
    "http://localhost:8000/a.wav",
    "http://localhost.:8000/a.wav",
    "http://LOCALHOST:8000/a.wav",
    "http://[::1]:8000/a.wav",
    "http://[::]:8000/a.wav",
    "http://[::ffff:127.0.0.1]:8000/a.wav",
    "http://[::ffff:7f00:1]:8000/a.wav",
    "http://[64:ff9b::7f00:1]/a.wav",
    "http://[64:ff9b:1::a00:1]/a.wav",
    "http://[2002:7f00:1::]/a.wav",
    "http://[2001:0:53aa:64c::1]/a.wav",
    "http://[fe80::1]/a.wav",
    "http://[fd00:ec2::254]/latest/meta-data/",
    "http://[ff02::1]/a.wav",
    "http://10.0.0.1/a.wav",
    "http://172.16.0.1/a.wav",
    "http://192.168.1.1/a.wav",
    "http://100.64.0.1/a.wav",
    "http://169.254.169.254/latest/meta-data/iam/security-credentials/",
    "http://100.100.100.200/latest/meta-data/",
    "http://198.18.0.1/a.wav",
    "http://192.0.2.1/a.wav",
    "http://224.0.0.1/a.wav",
    "http://255.255.255.255/a.wav",
    "http://240.0.0.1/a.wav",
    "http://media.example:22/a.wav",
    "http://media.example:6379/a.wav",
    "http://media.example:0/a.wav",
    "https://no-such-host.invalid/a.wav",
    "http://a..b/a.wav",
    f"http://{'a' * 64}.example/a.wav",
]


@pytest.mark.parametrize("url", FORBIDDEN)
def test_forbidden_hosts(guarded: RunningService, url: str) -> None:
    """No URL reaches into the network of the service, and the answer does not reveal what is there."""
    native = httpx.post(guarded.url + NATIVE, json=native_body(url), timeout=30)
    compatible = httpx.post(guarded.url + COMPATIBLE, json=compatible_body(url), timeout=30)
    assert (native.status_code, native.json()["code"]) == (400, "InvalidParameter"), native.text
    assert (compatible.status_code, compatible.json()["error"]["code"]) == (400, "invalid_parameter_error")
    for message in (native.json()["message"], compatible.json()["error"]["message"]):
        assert message.startswith((DOWNLOAD_FAILED, BAD_URL))
        assert "127.0.0.1" not in message


@pytest.mark.parametrize(
    "reference",
    [
        "file:///etc/passwd",
        "file://localhost/etc/passwd",
        "/etc/passwd",
        "ftp://media.example/a.wav",
        "gopher://media.example/a.wav",
        "http:/media.example/a.wav",
        "http://",
        "https://?x",
        "http://[::1/a.wav",
        "http://media.example:port/a.wav",
        "http://media.example:99999/a.wav",
        "http://user:secret@media.example/a.wav",
        "http://media.example/a\r\nx-injected: 1",
        "concat:http://media.example/a.wav|/etc/passwd",
        "data:audio/wav,RIFF",
        "data:audio/wav;base64",
        "data:audio/wav;base64,SUQzBAAA…....",
        "data:audio/wav;base64,!!!!",
        "data:audio/wav;base64,A",
        "SUQzBAAA…....",
        "oss://",
    ],
)
def test_references_that_are_none(guarded: RunningService, reference: str) -> None:
    """A text that is no reference to audio is refused as such."""
    assert_refused(guarded, reference, Refusal(BAD_URL))


ANSWERS: dict[str, tuple[tuple[int, dict[str, str], bytes], str]] = {
    "400": ((400, {}, b""), DOWNLOAD_FAILED),
    "403": ((403, {}, b"secret"), DOWNLOAD_FAILED),
    "404": ((404, {}, b""), DOWNLOAD_FAILED),
    "500": ((500, {}, b""), DOWNLOAD_FAILED),
    "204": ((204, {}, b""), EMPTY),
    "redirect to nowhere": ((302, {}, b""), DOWNLOAD_FAILED),
    "redirect to itself": ((302, {"location": "/redirect%20to%20itself"}, b""), DOWNLOAD_FAILED),
    "redirect to a file": ((302, {"location": "file:///etc/passwd"}, b""), DOWNLOAD_FAILED),
    "redirect to another host": ((302, {"location": "http://127.0.0.2:8000/"}, b""), DOWNLOAD_FAILED),
    "redirect to metadata": ((301, {"location": "http://169.254.169.254/latest/"}, b""), DOWNLOAD_FAILED),
    "empty": ((200, {"content-length": "0"}, b""), EMPTY),
    "not HTTP at all": ((200, {"content-length": "minus one"}, b"x"), DOWNLOAD_FAILED),
    "says too large": ((200, {"content-length": str(2**40)}, b"RIFF"), TOO_LARGE),
    "is too large": ((200, {}, bytes(1_000_001)), TOO_LARGE),
    "gzip": ((200, {"content-encoding": "gzip"}, b"\x1f\x8b\x08"), DOWNLOAD_FAILED),
    "HTML": ((200, {"content-type": "audio/wav"}, b"<!DOCTYPE html><html></html>"), UNREADABLE),
    "playlist": ((200, {}, b"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1/secret.ts\n"), UNREADABLE),
    "concat script": ((200, {}, b"ffconcat version 1.0\nfile /etc/passwd\n"), UNREADABLE),
    "picture": ((200, {}, b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"), UNREADABLE),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_bad_downloads(service: RunningService, media: MediaServer, name: str) -> None:
    """Any response of a web server that is not audio is refused with its own cause."""
    media.answers[name], message = ANSWERS[name]
    assert_refused(service, media.url(name), Refusal(message))


def test_a_download_that_is_cut_off(service: RunningService, media: MediaServer) -> None:
    """A body shorter than its server has said is a fault of that server, which SDKs request again."""
    media.answers["cut off"] = (200, {"content-length": "99999"}, wav(1))
    refusal = Refusal(DOWNLOAD_FAILED, "ServiceUnavailable", "service_unavailable", 503)
    assert_refused(service, media.url("cut off"), refusal)


def test_forbidden_codes_of_slow_sources(service: RunningService) -> None:
    """A source that does not finish in time has its own code."""
    with httpx.Client() as client, _Silent() as url:
        response = client.post(service.url + NATIVE, json=native_body(url), timeout=30)
        assert (response.status_code, response.json()["code"]) == (400, "InvalidParameter.DataInspection")
        assert TIMED_OUT in response.json()["message"]


class _Silent:
    """Listen, accept connections and never answer."""

    def __enter__(self) -> str:
        import socket  # noqa: PLC0415

        self._socket = socket.create_server(("127.0.0.1", 0))
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}/a.wav"

    def __exit__(self, *exc_info: object) -> None:
        self._socket.close()


def _flipped(data: bytes) -> bytes:
    """Return the file with its first half of samples as noise, its header kept."""
    return data[:64] + bytes((byte * 7 + 13) & 0xFF for byte in data[64:])


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "WAV without samples": (wav(0), EMPTY),
    "WAV header alone": (wav(1)[:20], UNREADABLE),
    "WAV, 61 s": (wav(61), TOO_LONG),
    "FLAC header alone": (clip("FLAC 16").data[:42], UNREADABLE),
    "FLAC, noise behind the header": (_flipped(clip("FLAC 16").data), EMPTY),
    "Ogg, first page alone": (clip("Ogg Vorbis").data[:58], UNREADABLE),
    "AMR, magic alone": (b"#!AMR\n", EMPTY),
    "M4A without its index": (clip("MP4 AAC (M4A)").data[:2000], UNREADABLE),
    "random bytes": (bytes(range(256)) * 40, UNREADABLE),
    "zeros": (bytes(10_000), UNREADABLE),
    "one byte": (b"R", UNREADABLE),
    "text": (b"this is no audio, though its name says so", UNREADABLE),
    "JSON": (b'{"audio": "yes"}', UNREADABLE),
    "SDP": (b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\nm=audio 5004 RTP/AVP 0\r\n", UNREADABLE),
    "MIDI": (b"MThd\x00\x00\x00\x06\x00\x01\x00\x02\x01\xe0", UNREADABLE),
    "ZIP": (b"PK\x03\x04\x14\x00\x00\x00\x08\x00" + bytes(100), UNREADABLE),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(service: RunningService, name: str) -> None:
    """A file with no audio, too little or too much is refused with its cause, inline and uploaded."""
    data, message = BAD_FILES[name]
    assert_refused(service, data_url(data, "audio/wav"), Refusal(message))
    assert_refused(service, upload(service.url, data), Refusal(message), {"x-dashscope-ossresourceresolve": "enable"})


def test_inline_limit(service: RunningService) -> None:
    """Base64 text of 10 MiB and more is refused, a little less is decoded (and found to be no audio)."""
    too_long = "data:;base64," + "A" * (10 * 2**20)
    assert_refused(service, too_long, Refusal("Exceeded limit on max bytes per data-uri item", "BadRequest.TooLarge"))
    assert_refused(service, "data:;base64," + "A" * (10 * 2**20 - 4), Refusal(UNREADABLE))


RESOLVE = {"x-dashscope-ossresourceresolve": "enable"}


@pytest.mark.parametrize("key", ["nothing", "../../etc/passwd", "/etc/passwd", "dashscope-instant/x/y/z.wav", "a\x00b"])
def test_uploads_that_are_not_there(service: RunningService, key: str) -> None:
    """A key that was not uploaded is not found."""
    assert_refused(service, f"oss://{key}", Refusal(UPLOAD_MISSING), RESOLVE)


def test_upload_without_its_header(service: RunningService) -> None:
    """A reference to an upload is accepted only with the header that allows it."""
    assert_refused(service, upload(service.url, wav(1)), Refusal(BAD_URL))


def test_keys(service: RunningService) -> None:
    """With keys configured, a missing and a wrong key are refused by each dialect's rules; an upload is its owner's."""
    with RunningService("--engine=fake", "--audio-workers=1", "--api-keys=sk-one,sk-two") as guarded:
        for headers, text in (
            ({}, "No API-key provided."),
            ({"authorization": "Bearer"}, "No API-key provided."),
            ({"authorization": "Basic c2stb25l"}, "No API-key provided."),
            ({"authorization": "Bearer sk-three"}, "Invalid API-key provided."),
            ({"authorization": "Bearer sk-on"}, "Invalid API-key provided."),
        ):
            for path in (NATIVE, "/api/v1/uploads?action=getPolicy", "/api/v1/models"):
                method = "POST" if path == NATIVE else "GET"
                native = httpx.request(method, guarded.url + path, headers=headers)
                assert (native.status_code, native.json()["code"]) == (401, "InvalidApiKey")
                assert native.json()["message"] == text
            for path in (COMPATIBLE, "/v1/models"):
                method = "POST" if path == COMPATIBLE else "GET"
                compatible = httpx.request(method, guarded.url + path, headers=headers)
                assert (compatible.status_code, compatible.json()["error"]["code"]) == (401, "invalid_api_key")
        one, two = ({"authorization": f"Bearer sk-{name}"} for name in ("one", "two"))
        address = upload(guarded.url, wav(1), headers=one)
        assert ask_native(guarded.url, address, headers=two | RESOLVE).text  # both keys belong to one tenant
    # Without configured keys, each key is a tenant.
    address = upload(service.url, wav(1), headers=one)
    assert ask_native(service.url, address, headers=one | RESOLVE).text
    refused = httpx.post(service.url + NATIVE, json=native_body(address), headers=two | RESOLVE)
    assert (refused.status_code, refused.json()["message"].startswith(UPLOAD_MISSING)) == (400, True)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"])
def test_methods_and_paths(service: RunningService, method: str) -> None:
    """A wrong method or path is refused in the dialect of the path, with a request id."""
    native, compatible = (httpx.request(method, service.url + path) for path in (NATIVE, COMPATIBLE))
    assert (native.status_code, compatible.status_code) == (400, 405)
    unknown = [httpx.request(method, service.url + path) for path in ("/none", "/api/v1/tasks/1", "/v1/embeddings")]
    assert [response.status_code for response in unknown] == [404] * 3
    for response in (native, compatible, *unknown):
        assert response.headers["x-request-id"]
    if method != "HEAD":
        assert native.json()["code"] == "InvalidParameter"
        assert compatible.json()["error"]["code"] == "method_not_allowed"
        assert unknown[1].json()["code"] == "NotFound"
        assert unknown[2].json()["error"]["code"] == "not_found"


def test_the_service_still_answers(service: RunningService, guarded: RunningService) -> None:
    """At the end both services answer, hold nothing, and have logged no error."""
    for running in (service, guarded):
        running.settle()
        assert ask_native(running.url, data_url(wav(1))).text
        for outcome in ("failed", "failed_midstream"):
            assert running.metric("captioner_requests_total", outcome=outcome) == 0
        lines = [json.loads(line) for line in running.log().splitlines()]
        assert [line for line in lines if line["level"] == "error"] == []
