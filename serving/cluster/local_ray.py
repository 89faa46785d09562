"""Ray's own processes on this machine, for a cluster of one node: their command and their ports."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_PORTS = (
    "port",
    "ray-client-server-port",
    "dashboard-agent-grpc-port",
    "dashboard-agent-listen-port",
    "runtime-env-agent-port",
    "metrics-export-port",
    "node-manager-port",
    "object-manager-port",
)
_VARIABLES = ("AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT")
"""Environment variables of ports for which `ray start` has no option. Ray's defaults are fixed: 44217 and 44227."""
_DAEMONS = len(_PORTS) + len(_VARIABLES)
_FIRST_FRONTEND, _FIRST_WORKER, PORTS = 100, 200, 1000
"""Offsets in the range of `ray_first_port`: of frontends, of Ray's workers, and its end."""


def start_local_ray(host: str, first_port: int | None = None) -> tuple[subprocess.Popen[bytes], str]:
    """Start Ray's processes; return the process that ends with them, and the address where they will be.

    Their ports are those from `first_port`. Fixed ports save most of the time that Ray's processes wait for each
    other's, 15 s at most, so without `first_port` free ones are chosen.
    """
    numbers = free_ports(_DAEMONS) if first_port is None else range(first_port, first_port + _DAEMONS)
    ports = dict(zip(_PORTS, numbers, strict=False))
    variables = dict(zip(_VARIABLES, map(str, numbers[len(_PORTS) :]), strict=True))
    if first_port is not None:
        ports |= {"min-worker-port": first_port + _FIRST_WORKER, "max-worker-port": first_port + PORTS - 1}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--include-dashboard=false"]
    command += [f"--node-ip-address={host}", *(f"--{name}={port}" for name, port in ports.items())]
    process = subprocess.Popen(  # noqa: S603 - our own
        command, env=os.environ | variables, stdout=subprocess.DEVNULL, start_new_session=True
    )
    return process, f"{host}:{ports['port']}"


def serve_ports(metrics_port: int, stats_port: int, first_port: int | None) -> dict[str, str]:
    """Return the variables with ports of Ray Serve: of HAProxy, of frontends and of the proxy behind HAProxy."""
    ports = {"HAPROXY_METRICS_PORT": metrics_port, "HAPROXY_STATS_PORT": stats_port}
    if first_port is not None:
        ports |= {
            "FALLBACK_PROXY_HTTP_PORT": first_port + _DAEMONS,
            "DIRECT_INGRESS_MIN_HTTP_PORT": first_port + _FIRST_FRONTEND,
            "DIRECT_INGRESS_MAX_HTTP_PORT": first_port + _FIRST_WORKER - 1,
        }
    return {f"RAY_SERVE_{name}": str(port) for name, port in ports.items()}


def free_ports(count: int) -> list[int]:
    """Return ports that no process listens on now, and that none is likely to listen on before Ray does.

    They are above those of Serve's replicas, and below those that the system uses for outgoing connections, of which a
    starting Ray opens hundreds. Raises `OSError` if fewer than `count` are free.
    """
    candidates = iter(random.sample(range(31_001, 32_768), 1_000))
    with ExitStack() as stack:
        return [_first_free(candidates, stack) for _ in range(count)]


def _first_free(candidates: Iterator[int], stack: ExitStack) -> int:
    for port in candidates:
        listener = stack.enter_context(socket.socket())
        with suppress(OSError):
            listener.bind(("", port))
            return port
    message = "no free port between 31001 and 32767 for Ray"
    raise OSError(message)
