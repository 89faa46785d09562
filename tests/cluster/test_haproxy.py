"""HAProxy's own responses, with the configuration that Ray writes. No Ray runs here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from serving.api.dialects.dashscope import DashScopeCodec
from serving.api.dialects.openai import OpenAICodec
from serving.cluster import haproxy_wrapper as haproxy
from serving.config import Settings
from serving.errors import NotReady
from tests.cluster.ray_haproxy import render
from tests.cluster.running import free_port, until

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(params=["knows no frontend", "knows a frontend that is gone"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """HAProxy as Ray starts it by way of `serving/cluster/haproxy_wrapper.py`."""
    port, frontend = free_port(), free_port() if "gone" in request.param else 0
    path = render(tmp_path, port=port, metrics=free_port(), stats=free_port(), frontend=frontend, fallback=free_port())
    program = [haproxy.__file__, "-db", "-f", str(path)]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_SERVE_HAPROXY_BINARY_PATH": haproxy.__file__,
    }
    with subprocess.Popen(program, env=environment, stderr=subprocess.DEVNULL) as running:
        try:
            until(lambda: _answers(f"http://127.0.0.1:{port}/"))
            yield f"http://127.0.0.1:{port}"
        finally:
            running.kill()


def _answers(url: str) -> bool:
    try:
        httpx.get(url, timeout=20)
    except httpx.TransportError:
        return False
    return True


def test_without_a_frontend_the_response_is_in_the_callers_dialect(url: str) -> None:
    """HAProxy answers 503 with `Retry-After` and one request id, as a frontend without an engine; never Ray's texts."""
    for path, codec in (
        ("/v1/chat/completions", OpenAICodec(Settings())),
        ("/compatible-mode/v1/chat/completions", OpenAICodec(Settings())),
        ("/api/v1/services/aigc/multimodal-generation/generation", DashScopeCodec(Settings())),
    ):
        answer = httpx.post(url + path, json={}, timeout=60)
        request_id = answer.headers["x-request-id"]
        expected = codec.error(NotReady(), request_id)
        assert (answer.status_code, answer.content) == (expected.status, expected.body)
        assert answer.headers["retry-after"] == expected.headers["retry-after"]
        assert answer.headers["content-type"] == "application/json"
        assert len(request_id) == 36


RAYS = """\
frontend http_frontend
    bind *:8000
defaults
    errorfile 502 /tmp/500.http
    errorfile 503 /tmp/500.http
    errorfile 504 /tmp/500.http
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path not found."
backend http-captioner
    server frontend 10.0.0.1:30000 check
    server fallback 10.0.0.2:8500 check backup
"""
"""The lines of Ray's configuration that the wrapper needs."""


@pytest.mark.parametrize(
    ("line", "other", "named"),
    [
        ("frontend http_frontend", "frontend web", "`frontend http_frontend` with a `bind` line"),
        ("    bind *:8000\n", "", "`frontend http_frontend` with a `bind` line"),
        ("    errorfile 503 /tmp/500.http\n", "", "one of each, found 502, 504"),
        ("errorfile 504", "errorfile 502", "one of each, found 502, 503, 502"),
        ("status 404", "status 410", "status 404 content-type text/plain`: expected 1, found 0"),
        (
            "check backup",
            "check weight 1 backup",
            "found instead `server fallback 10.0.0.2:8500 check weight 1 backup`",
        ),
    ],
)
def test_a_configuration_that_is_not_recognized_stops_the_start(
    tmp_path: Path, line: str, other: str, named: str
) -> None:
    """The wrapper ends with status 1, names the line that it has not found, and leaves the file as it was."""
    path = tmp_path / "haproxy.cfg"
    text = RAYS.replace(line, other)
    path.write_text(text)
    command = [sys.executable, haproxy.__file__, "-db", "-f", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert named in done.stderr
    assert str(path) in done.stderr
    assert path.read_text() == text


def test_a_changed_configuration_stays_as_it_is() -> None:
    """A second pass over the same file changes nothing, and Ray's proxy is no server any more."""
    text = haproxy.with_own_responses(RAYS)
    assert haproxy.with_own_responses(text) == text
    assert "backup" not in text
    assert text.count(haproxy.RESPONSE_BODY) == 4
