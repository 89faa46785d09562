"""deploy/tls: the nginx example before a service, and the figures of both examples against the settings."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from typing import TYPE_CHECKING

import httpx
import pytest

from benchmarks.servers import free_port
from serving.config import Settings
from tests.support.language import ROOT
from tests.support.programs import program
from tests.support.service import RunningService
from tests.support.wire import COMPATIBLE, MODEL, compatible_body, data_url, wav

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DIRECTORY = ROOT / "deploy" / "tls"
NGINX, PROXY = (DIRECTORY / "nginx.conf").read_text(), (DIRECTORY / "captioner.proxy").read_text()
CADDY = (DIRECTORY / "Caddyfile").read_text()
NAME = "captions.example.com"
KEY = "sk-of-the-test-of-tls"
AUTHORIZED = {"authorization": f"Bearer {KEY}"}

_MAIN = """
{user}daemon off; pid {directory}/nginx.pid; error_log {directory}/error.log warn; worker_processes 1;
events {{ worker_connections 64; }}
http {{
  access_log off;
  client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy; fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;
  include {directory}/captioner.conf;
}}
"""


def written(directory: Path, upstream: str, port: int) -> Path:
    """Write the example with a certificate, a port and a service of this test; return the main file."""
    key, certificate = directory / "privkey.pem", directory / "fullchain.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", f"/CN={NAME}"]
    command += ["-addext", f"subjectAltName=DNS:{NAME}", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    text = NGINX.replace("server 127.0.0.1:8000;", f"server {upstream};").replace("/etc/ssl/captions", str(directory))
    text = text.replace("/etc/nginx/captioner.proxy", str(directory / "captioner.proxy"))
    text = text.replace("listen 443 ssl", f"listen 127.0.0.1:{port} ssl")
    text = re.sub(r"^ *listen \[::\].*\n", "", text, flags=re.MULTILINE)
    (directory / "captioner.conf").write_text(text)
    (directory / "captioner.proxy").write_text(PROXY)
    user = "user root; " if os.geteuid() == 0 else ""  # another user's worker cannot write to root's directories
    (directory / "nginx.conf").write_text(_MAIN.format(user=user, directory=directory))
    return directory / "nginx.conf"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client that trusts the certificate, of a service behind nginx as the example configures it."""
    directory, port = tmp_path_factory.mktemp("tls"), free_port()
    with RunningService("--engine=fake", "--audio-workers=1", f"--api-keys={KEY}") as service:
        main = written(directory, service.url.removeprefix("http://"), port)
        command = [program("nginx"), "-e", str(directory / "error.log"), "-c", str(main)]
        nginx = subprocess.Popen(command)
        transport = httpx.HTTPTransport(verify=False)
        try:
            with httpx.Client(
                transport=transport, base_url=f"https://127.0.0.1:{port}", headers={"host": NAME}, timeout=60
            ) as through:
                deadline = time.monotonic() + 60
                while True:
                    try:
                        through.get("/healthz")
                        break
                    except httpx.ConnectError:
                        assert time.monotonic() < deadline
                        assert nginx.poll() is None, (directory / "error.log").read_text()
                        time.sleep(0.05)
                yield through
        finally:
            nginx.terminate()
            nginx.wait(60)


def test_a_caption_through_nginx(client: httpx.Client) -> None:
    """A whole and a streamed caption arrive."""
    body = compatible_body(data_url(wav(0.4)))
    whole = client.post(COMPATIBLE, json=body, headers=AUTHORIZED)
    assert whole.status_code == 200
    assert whole.json()["choices"][0]["message"]["content"]
    with client.stream("POST", COMPATIBLE, json=body | {"stream": True}, headers=AUTHORIZED) as streamed:
        assert streamed.headers["content-type"].startswith("text/event-stream")
        parts = list(streamed.iter_raw())
    assert len(parts) > 1  # not buffered into one
    assert b"".join(parts).rstrip().endswith(b"data: [DONE]")


def test_large_bodies_reach_the_service(client: httpx.Client) -> None:
    """A body over the service's limit gets the service's own error, and one within it a caption."""
    too_large = client.post(COMPATIBLE, content=b'{"x": "' + b"a" * (16 * 2**20) + b'"}', headers=AUTHORIZED)
    assert too_large.status_code in {400, 413}
    assert too_large.headers["content-type"] == "application/json"
    assert "x-request-id" in too_large.headers
    large = client.post(COMPATIBLE, json=compatible_body(data_url(wav(200))), headers=AUTHORIZED)
    assert large.status_code == 200, large.text


def test_clients_cannot_forge_the_origin(client: httpx.Client) -> None:
    """Upload addresses have the proxy's name and https, whatever headers the client sends."""
    forged = {
        "forwarded": "host=evil.example;proto=http",
        "x-forwarded-host": "evil.example",
        "x-forwarded-proto": "http",
        "x-forwarded-prefix": "/evil",
    }
    answer = client.get("/api/v1/uploads", params={"action": "getPolicy", "model": MODEL}, headers=AUTHORIZED | forged)
    assert answer.json()["data"]["upload_host"] == f"https://{NAME}/oss-upload"


def test_metrics_are_not_passed_on(client: httpx.Client) -> None:
    """Neither the metrics nor the list of their addresses is served."""
    assert [client.get(path).status_code for path in ("/metrics", "/metrics/targets")] == [404, 404]
    assert json.loads(client.get("/readyz").text) == {"ready": True}


def test_figures_agree_with_the_settings() -> None:
    """Bodies may be as large as the service accepts; a response may take as long; both examples say the same."""
    settings = Settings()
    sizes = [int(size) for size in re.findall(r"client_max_body_size (\d+)m;", NGINX)]
    assert sizes == [int(size) for size in ("17", "26", "201")]
    assert sorted(int(size) for size in re.findall(r"max_size (\d+)MiB", CADDY)) == sorted(sizes)
    for size, limit in zip(
        sizes, (settings.max_body_bytes, settings.max_transcription_bytes, settings.max_file_bytes), strict=True
    ):
        assert limit < size * 2**20 <= limit + 2**20
    for text, directive in ((PROXY, "proxy_read_timeout "), (CADDY, "response_header_timeout ")):
        timeout = re.search(rf"{directive}(\d+)s", text)
        assert timeout
        assert settings.response_timeout_s < int(timeout[1])


def test_caddy_removes_what_it_does_not_overwrite() -> None:
    """Caddy overwrites `X-Forwarded-For`, `-Proto` and `-Host`; the example removes the others, and hides metrics."""
    assert re.findall(r"header_up -(\S+)", CADDY) == ["Forwarded", "X-Forwarded-Prefix"]
    assert "respond @metrics 404" in CADDY
    assert "flush_interval -1" in CADDY
