"""Audio behind URLs, through the complete service, in both dialects."""

from __future__ import annotations

import base64
import gzip
import socket
import statistics
import subprocess
import sys
import threading
import time
import zlib
from typing import TYPE_CHECKING

import httpx
import psutil
import pytest

from tests.support.service import RunningService
from tests.support.wire import (
    COMPATIBLE,
    NATIVE,
    ask_compatible,
    ask_native,
    compatible_body,
    data_url,
    native_body,
    wav,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.media import MediaServer

CLIP = wav(1)
UNAVAILABLE = "Failed to download multimodal content. The server answered with status 503."


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    """A service that may download from loopback."""
    with RunningService("--engine=fake", "--audio-workers=1", "--fetch-allow=127.0.0.0/8") as running:
        yield running


def captions(service: RunningService, reference: str) -> set[str]:
    """Return the captions of a reference in both dialects and in their two kinds of parts."""
    return {ask_native(service.url, reference).text, ask_compatible(service.url, reference).text}


@pytest.mark.parametrize("coding", ["aws-chunked", "utf-8", "binary", "none", "gzip", "deflate"])
def test_content_codings(service: RunningService, media: MediaServer, coding: str) -> None:
    """A clip is the same under every name of plain bytes, and when it is compressed."""
    body = {"gzip": gzip.compress(CLIP), "deflate": zlib.compress(CLIP)}.get(coding, CLIP)
    headers = {"content-encoding": coding, "content-length": str(len(body))}
    media.answers[coding] = 200, headers, body
    assert captions(service, media.url(coding)) == captions(service, data_url(CLIP))


def test_blanks_around_and_in_a_url(service: RunningService, media: MediaServer) -> None:
    """A URL that was copied with blanks, and one with a blank in its name, are downloaded."""
    media.files["my clip.wav"] = CLIP
    url = media.url("my clip.wav")
    for reference in (f" {url}\n", f"\ufeff{url}", url.replace("%20", " ")):
        assert captions(service, reference) == captions(service, data_url(CLIP))


def test_data_urls_as_people_write_them(service: RunningService) -> None:
    """Escaped, wrapped, marked and quoted data URLs are the same clip."""
    text = base64.b64encode(CLIP).decode()
    escaped = text.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D")
    wrapped = "\r\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    for reference in (
        f"data:audio/wav;base64,{escaped}",
        f"data:audio/wav; codecs=pcm; base64, {wrapped.replace(chr(13) + chr(10), '%0A')}",
        f'\n\ufeffdata: audio/wav ; codecs="a,b;c" ; BASE64 ,\n{wrapped}\n',
        f"data:;base64,{text.replace('+', '-').replace('/', '_').rstrip('=')}",
    ):
        assert captions(service, reference) == captions(service, data_url(CLIP))


def test_a_server_that_is_away_is_503_in_both_dialects(service: RunningService, media: MediaServer) -> None:
    """A source that is not available is answered 503 with `retry-after`, and counts as no failure of the service."""
    media.answers["away"] = 503, {"content-length": "0", "retry-after": "1"}, b""
    with socket.create_server(("127.0.0.1", 0)) as free:
        refused = f"http://127.0.0.1:{free.getsockname()[1]}/clip"
    for url, message in ((media.url("away"), UNAVAILABLE), (refused, "Failed to download multimodal content.")):
        native = httpx.post(service.url + NATIVE, json=native_body(url), timeout=30)
        compatible = httpx.post(service.url + COMPATIBLE, json=compatible_body(url), timeout=30)
        assert (native.status_code, compatible.status_code) == (503, 503)
        assert (native.json()["code"], native.json()["message"]) == ("ServiceUnavailable", message)
        error = compatible.json()["error"]
        assert (error["type"], error["code"], error["message"]) == (
            "service_unavailable",
            "service_unavailable",
            message,
        )
        assert (native.headers["retry-after"], compatible.headers["retry-after"]) == ("5", "5")
    assert service.metric("captioner_requests_total", outcome="failed") == 0


def test_a_server_that_is_away_once_costs_the_caller_nothing(service: RunningService) -> None:
    """One 503 of a store is followed by the clip, in one request of the caller."""
    answers = [b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\n\r\n", _answer(CLIP)] * 2

    def serve() -> None:
        for answer in answers:
            client, _ = server.accept()
            with client:
                client.recv(65_536)
                client.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/clip"
        assert captions(service, url) == captions(service, data_url(CLIP))


FLOOD = """
import contextlib, socket, sys, threading
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
piece = sys.argv[1].encode().decode("unicode_escape").encode()

def serve(client):
    with contextlib.suppress(OSError), client:
        client.recv(65536)
        client.sendall(b"HTTP/1.1 200 OK\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n")
        while True:
            client.sendall(piece * (200_000 // len(piece)))

while True:
    threading.Thread(target=serve, args=server.accept()[:1], daemon=True).start()
"""


@pytest.mark.parametrize("piece", [r"1\r\na\r\n", r"19\r\naaaaaaaaaaaaaaaaaaaaaaaaa\r\n"], ids=["1", "25"])
def test_a_flood_of_tiny_chunks_delays_no_other_caller(service: RunningService, piece: str) -> None:
    """While servers flood 8 downloads with tiny chunks, another caller's caption takes what it takes alone.

    On the frontend's event loop one such download made it wait 2.6 s in the median, and 16 up to 27 s.
    """
    flood = subprocess.Popen([sys.executable, "-c", FLOOD, piece], stdout=subprocess.PIPE, text=True)
    assert flood.stdout
    url = f"http://127.0.0.1:{int(flood.stdout.readline())}/clip"
    refused: list[httpx.Response] = []

    def attack() -> None:
        while not stop.is_set():
            refused.append(httpx.post(service.url + COMPATIBLE, json=compatible_body(url), timeout=60))

    stop = threading.Event()
    attackers = [threading.Thread(target=attack) for _ in range(8)]
    try:
        for attacker in attackers:
            attacker.start()
        time.sleep(0.5)
        waits = []
        for _ in range(10):
            began = time.perf_counter()
            ask_native(service.url, data_url(CLIP))
            waits.append(time.perf_counter() - began)
    finally:
        stop.set()
        for attacker in attackers:
            attacker.join()
        flood.kill()
        flood.communicate()
    assert statistics.median(waits) < 1.0
    assert {answer.status_code for answer in refused} == {400}
    assert "pieces that are too small" in refused[0].text


def test_a_download_process_that_is_killed_is_replaced(service: RunningService, media: MediaServer) -> None:
    """The service continues, counts the death, and the next download works."""
    before = service.metric("captioner_download_process_deaths_total")
    children = psutil.Process(service.process.pid).children()
    (downloader,) = (child for child in children if "serving.audio.downloader" in child.cmdline())
    downloader.kill()
    downloader.wait(10)
    media.files["after.wav"] = CLIP
    assert captions(service, media.url("after.wav")) == captions(service, data_url(CLIP))
    assert service.metric("captioner_download_process_deaths_total") == before + 1
    assert service.metric("captioner_cpu_seconds_total", part="downloads") > 0


def _answer(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
