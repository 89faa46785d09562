"""A cluster on this machine, next to any other: its command, its processes, its addresses."""

from __future__ import annotations

import os
import random
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

import httpx
import psutil

from serving.cluster.local_ray import free_ports

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PORTS = ("HAPROXY_METRICS", "HAPROXY_STATS", "FALLBACK_PROXY_HTTP")
"""Ports of Serve that two clusters on one machine must not share."""

BIN = Path(sys.executable).parent

METRICS_TOKEN = "scrapes-of-the-tests"  # noqa: S105 - of clusters of tests
SCRAPE = {"authorization": f"Bearer {METRICS_TOKEN}"}
"""Header of scrapes: the port of callers of a cluster answers none without the token."""

ENGINE = "ray::ServeReplica:captioner:engine"
FRONTEND = "ray::ServeReplica:captioner:frontend"


_given: set[int] = set()


def free_port() -> int:
    """Return a port that no process listens on now, a different one each time."""
    while (port := free_ports(1)[0]) in _given:
        pass
    _given.add(port)
    return port


def until(condition: Callable[[], object], timeout_s: float = 60) -> None:
    """Wait until the condition is true. Raises `TimeoutError`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.1)


class RunningCluster:
    """Context of a command that starts a cluster on `port`. Leaves no process behind."""

    def __init__(self, command: Sequence[str], port: int, **environment: str) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="captioner-test-", ignore_cleanup_errors=True)
        self.directory = Path(self._directory.name)
        self._command = [str(BIN / command[0]), *command[1:]]
        self._mark = secrets.token_hex()
        self.url = f"http://127.0.0.1:{port}"
        self.environment = os.environ | {
            "CAPTIONER_TEST_MARK": self._mark,
            "CAPTIONER_METRICS_TOKEN": METRICS_TOKEN,
            "CAPTIONER_UPLOADS_DIR": str(self.directory / "uploads"),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(self.directory / "haproxy.cfg"),
            **{f"RAY_SERVE_{name}_PORT": str(free_port()) for name in PORTS},
            # Ray runs its workers at 15, where they would hardly run on a busy machine.
            "RAY_worker_niceness": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first := random.randrange(20_000, 30_000)),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + 99),
            "RAY_AUTH_TOKEN": secrets.token_hex(),
            **environment,
        }

    def __enter__(self) -> Self:
        with (self.directory / "log").open("w") as log:
            self.process = subprocess.Popen(
                self._command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=30)
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()
        self.process.wait()
        self._directory.cleanup()

    def wait(self, condition: Callable[[], object], timeout_s: float = 400) -> None:
        """Wait until the condition is true. Raises `RuntimeError` with the log if the cluster ends or time is up."""
        try:
            until(lambda: self.process.poll() is not None or condition(), timeout_s)
        except TimeoutError:
            raise RuntimeError(self.log()) from None
        if self.process.poll() is not None:
            raise RuntimeError(self.log())

    def log(self) -> str:
        """Return the end of the command's output."""
        return (self.directory / "log").read_text()[-5000:]

    def get(self, path: str) -> httpx.Response | None:
        """Return the response to a GET, if there is one."""
        with suppress(httpx.TransportError):
            return httpx.get(self.url + path, timeout=5)
        return None

    def ready(self) -> bool:
        """Return whether captions can be made now."""
        answer = self.get("/readyz")
        return answer is not None and answer.status_code == 200

    def pids(self, text: str) -> set[int]:
        """Return the living processes of this cluster with `text` in their command line."""
        found = set()
        for process in self.processes():
            with suppress(psutil.Error):
                if text in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.add(process.pid)
        return found

    def frontends(self) -> list[str]:
        """Return the addresses of the frontends in HAProxy's configuration."""
        (config,) = self.directory.glob("*/haproxy.cfg")  # in a directory for the node
        text = config.read_text()
        servers = re.findall(r"^ *server (\S+) (\S+:\d+) check(?!.* backup)", text, re.MULTILINE)
        return sorted({f"http://{address}" for _, address in servers})

    def engines(self, frontend: str) -> int:
        """Return the number of engine replicas that are ready, as a frontend reports it."""
        return round(metric(frontend, "captioner_engine_replicas_ready"))

    def engine_running(self) -> float:
        """Return the number of captions in all engines, from the metrics of the replicas in `/metrics/targets`."""
        targets = httpx.get(f"{self.url}/metrics/targets", headers=SCRAPE, timeout=5).json()
        engines = [address for each in targets if each["labels"]["role"] == "engine" for address in each["targets"]]
        if not engines:
            raise KeyError("captioner_engine_running")
        return sum(metric(f"http://{address}", "captioner_engine_running") for address in engines)

    def complete(self, frontends: int = 2, engines: int = 2) -> bool:
        """Return whether there are `frontends` frontends, and each of them sees `engines` engine replicas.

        With engines HAProxy, which learns of frontends a moment later, sends requests there.
        """
        with suppress(httpx.TransportError, OSError, KeyError, ValueError):
            return (
                len(self.frontends()) == frontends
                and all(self.engines(frontend) == engines for frontend in self.frontends())
                and (not engines or self.ready())
            )
        return False

    def processes(self) -> list[psutil.Process]:
        """Return the processes of this cluster, by a mark in their environment."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                # Not by psutil, which parses it: a process that sets its title may have overwritten a part of it.
                if self._mark.encode() in Path(f"/proc/{process.pid}/environ").read_bytes():
                    found.append(process)
        return found


def metric(url: str, name: str) -> float:
    """Return the value of a gauge of one process. Raises `KeyError`."""
    for line in httpx.get(f"{url}/metrics", headers=SCRAPE, timeout=5).text.splitlines():
        if line.startswith(f"{name} "):
            return float(line.split()[1])
    raise KeyError(name)
