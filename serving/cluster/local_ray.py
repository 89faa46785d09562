"""Ray's own processes on this machine, for a cluster of one node."""

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


def start_head(host: str) -> tuple[subprocess.Popen[bytes], str]:
    """Start Ray's processes, and tell where they will be. Set ports save most of what they wait for, 15 s at most."""
    ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--include-dashboard=false"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    head = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)  # noqa: S603 - our own
    return head, f"{host}:{ports['port']}"


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, and that nothing takes before Ray does.

    They are above those of Serve's replicas, and below those that the system gives to outgoing connections, of which a
    starting Ray opens hundreds. Raises `OSError` if there are not so many.
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
