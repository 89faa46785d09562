"""What HAProxy says by itself, with the configuration that Ray makes: no Ray runs here."""

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
from tests.cluster.running import free_port, until

if TYPE_CHECKING:
    from collections.abc import Iterator

RAYS_CONFIGURATION = """
import sys
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions
directory, port, metrics, stats, frontend, fallback = sys.argv[1], *map(int, sys.argv[2:])
options = HTTPOptions(host="127.0.0.1", port=port)
configuration = HAProxyConfig(
    http_options=options, socket_path=f"{directory}/admin.sock", metrics_port=metrics, stats_port=stats,
    server_state_base=directory, server_state_file=f"{directory}/state", metrics_socket_path=f"{directory}/m.sock",
)
api = HAProxyApi(cfg=configuration, config_file_path=f"{directory}/haproxy.cfg")
if frontend:
    api.set_backend_configs({"http-captioner": BackendConfig(
        name="http-captioner", path_prefix="/", app_name="captioner",
        servers=[ServerConfig(name="frontend", host="127.0.0.1", port=frontend)],
        fallback_server=ServerConfig(name="fallback", host="127.0.0.1", port=fallback),
    )})
api._generate_config_file_internal()
"""


@pytest.fixture(params=["knows no frontend", "knows a frontend that is gone"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """HAProxy as Ray would start it in `serving/cluster/haproxy_wrapper.py`'s place."""
    port, frontend = free_port(), free_port() if "gone" in request.param else 0
    numbers = [str(number) for number in (port, free_port(), free_port(), frontend, free_port())]
    made = [sys.executable, "-c", RAYS_CONFIGURATION, str(tmp_path), *numbers]
    subprocess.run(made, check=True, timeout=200)
    program = [haproxy.__file__, "-db", "-f", str(tmp_path / "haproxy.cfg")]
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


def test_without_a_frontend_a_caller_is_told_in_its_dialect(url: str) -> None:
    """503 with `Retry-After` and one request id, as a frontend without an engine says it; never Ray's own texts."""
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


def test_a_configuration_that_is_not_rays_stays_as_it_is() -> None:
    """Another version of Ray may write another one: then HAProxy says what Ray would."""
    assert haproxy.changed("global\n    maxconn 10\n") == "global\n    maxconn 10\n"
