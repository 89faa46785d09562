"""Ray's real configuration of HAProxy, rendered by Ray's own template in a separate process. No Ray runs."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = """
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


def render(directory: Path, *, port: int, metrics: int, stats: int, frontend: int = 0, fallback: int = 0) -> Path:
    """Write the configuration, with one frontend unless its port is 0, into `directory`; return its path."""
    numbers = [str(number) for number in (port, metrics, stats, frontend, fallback)]
    subprocess.run([sys.executable, "-c", PROGRAM, str(directory), *numbers], check=True, timeout=200)
    return directory / "haproxy.cfg"
