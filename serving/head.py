"""Ray's own processes on this machine, for a cluster of one node."""

from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import ExitStack

_PORTS = (
    "port",
    "ray-client-server-port",
    "dashboard-agent-grpc-port",
    "dashboard-agent-listen-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)


def start_head(host: str) -> tuple[subprocess.Popen[bytes], str]:
    """Start Ray's processes, and tell where they will be. Set ports save most of what they wait for, 15 s at most."""
    ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--include-dashboard=false"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    head = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)  # noqa: S603 - our own
    return head, f"{host}:{ports['port']}"


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]
