"""A local Ray cluster: the one runner of autoscaling, chaos, updates, scaling and proxies.

The cluster is started as a user would start it (`captioner cluster`, or `ray start` and `serve deploy`), with ports and
directories that do not collide with those of another cluster on this machine. `captioner serve` runs in it as well.
"""

from __future__ import annotations

import secrets
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

import psutil

from benchmarks.managed_process import ManagedProcess
from benchmarks.program import CAPTIONER

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

KINDS = {
    "engine": "ray::ServeReplica:captioner:engine",
    "frontend": "ray::ServeReplica:captioner:frontend",
    "directory": "ray::ServeReplica:captioner:membership",
    "controller": "ray::ServeController",
    "proxy manager": "ray::HAProxyManager",
    "proxy": "ray::ProxyActor",
    "haproxy": "/haproxy ",
    "audio worker": "serving.audio.worker",
    "download process": "serving.audio.downloader",
    "idle worker": "ray::IDLE",
    "raylet": "/raylet/raylet ",
    "head (GCS)": "/gcs_server ",
}
"""Kind of process by a pattern in the command line."""

SMALL = ("--audio-workers=1", "--frontend-cpus=0.2", "--engine-cpus=0.2")
"""Options by which several replicas fit on two cores."""


def captioner_command(subcommand: str, port: int, *flags: str) -> list[str]:
    """Return the command of this service with a fake engine, without keys."""
    return [str(CAPTIONER), subcommand, f"--port={port}", "--no-auth", "--engine=fake", *flags]


def replicas(frontends: int, engines: int) -> tuple[str, ...]:
    """Return the options for fixed numbers of frontends and engines."""
    return (
        *(f"--min-frontends={frontends}", f"--max-frontends={frontends}"),
        *(f"--min-engine-replicas={engines}", f"--max-engine-replicas={engines}"),
    )


class Cluster(ManagedProcess):
    """A command that starts a cluster, and all processes of that cluster. A context manager; does not wait on entry."""

    name = "cluster"
    start_timeout_s = 400

    def __init__(
        self, command: Sequence[str], directory: Path, port: int, environment: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(directory, f"http://127.0.0.1:{port}")
        self._command = command
        direct = 32_000 + port % 10 * 300
        self._environment = {
            "CAPTIONER_UPLOADS_DIR": str(directory / "uploads"),
            "CAPTIONER_DATA_DIR": str(directory / "data"),
            "CAPTIONER_UPLOAD_SECRET": secrets.token_hex(),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(),
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(direct),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(direct + 299),
            # Ray's default niceness of 15 would starve its workers on a busy machine.
            "RAY_worker_niceness": "0",
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(port + 1),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(port + 3),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(port + 2),
            **(environment or {}),
        }

    @property
    def command(self) -> Sequence[str]:
        return self._command

    @property
    def environment(self) -> Mapping[str, str]:
        return self._environment

    def __enter__(self) -> Self:
        self.start()
        return self

    def processes(self) -> dict[str, list[psutil.Process]]:
        """Return the living processes by kind."""
        found: dict[str, list[psutil.Process]] = {kind: [] for kind in KINDS}
        for process in self.family.members():
            with suppress(psutil.Error):
                command = " ".join(process.cmdline())
                for kind, pattern in KINDS.items():
                    if pattern in command and process.status() != psutil.STATUS_ZOMBIE:
                        found[kind].append(process)
                        break
        return found

    def counts(self) -> Counter[str]:
        """Return the number of living processes by kind."""
        return Counter({kind: len(processes) for kind, processes in self.processes().items()})


def brief(result: Mapping[str, Any], *without: str) -> dict[str, Any]:
    """Return a result without its long lists, to print it."""
    return {key: value for key, value in result.items() if key not in without}
