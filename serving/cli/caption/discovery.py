"""Choice of the service: the one that is named, one that runs on the default port, or the embedded one."""

from __future__ import annotations

import os
import re
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

from serving.cli.caption.client import Service, ServiceError

if TYPE_CHECKING:
    from collections.abc import Callable

HOST, PORT = "127.0.0.1", 8000
"""Default address of `captioner serve`."""

_LISTENING = "0A"
_READY_TIMEOUT_S = 600
_POLL_S = 0.5


def running(port: int = PORT) -> Service | None:
    """Return the captioner that listens on a port of this machine, without a key; None if there is none.

    A program of another user is none: it would receive the clips, and the key.
    """
    with socket.socket() as probe:
        probe.settimeout(1)
        if probe.connect_ex((HOST, port)):
            return None
    if not _is_ours(port):
        return None
    service = Service(f"http://{HOST}:{port}")
    try:
        return service if service.readiness() is not None else None
    except ServiceError:
        return None


def wait_until_ready(service: Service, on_progress: Callable[[str], None]) -> None:
    """Wait while the service loads its model. Raises `ServiceError` if it takes too long or cannot be reached."""
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while waits_for := service.readiness():
        if time.monotonic() > deadline:
            raise ServiceError(f"{service.origin} is not ready after {_READY_TIMEOUT_S} s: {waits_for}")
        on_progress(f"waiting for {service.origin}: {waits_for.partition(' for ')[0]}")
        time.sleep(_POLL_S)


def _is_ours(port: int, tables: tuple[Path, ...] = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))) -> bool:
    """Return whether the listener belongs to this user or to root; True where the kernel has no such table."""
    owners = set()
    for table in tables:
        try:
            lines = table.read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            columns = line.split()
            if columns[3] == _LISTENING and int(re.split(":", columns[1])[1], 16) == port:
                owners.add(int(columns[7]))
    return owners <= {0, os.getuid()}
