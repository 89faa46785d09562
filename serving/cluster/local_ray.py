"""Ray's own processes on this machine, for a cluster of one node: their command and their ports."""

from __future__ import annotations

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
)


def start_local_ray(host: str) -> tuple[subprocess.Popen[bytes], str]:
    """Start Ray's processes; return the process that ends with them, and the address where they will be.

    Fixed ports save most of the time that Ray's processes wait for each other's, 15 s at most.
    """
    ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--include-dashboard=false"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)  # noqa: S603 - our own
    return process, f"{host}:{ports['port']}"


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
