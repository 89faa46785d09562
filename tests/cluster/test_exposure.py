"""Ports and sockets of a real cluster on one machine, and the loss of its HAProxy."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

import httpx
import psutil
import pytest

from serving.cluster.ray_env import RAY_ENVIRONMENT, host_variables
from tests.cluster.test_cluster import ask, caption

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.cluster.running import RunningCluster

pytestmark = pytest.mark.cluster

HAPROXY = "bin/haproxy -db"
SUPERVISOR = "haproxy_wrapper.py -db"
OTHER_APPLICATION = """
import sys, ray
from ray import serve
ray.init(address=sys.argv[1], logging_level="WARNING")
class Other:
    async def __call__(self, request):
        return "other"
options = {"num_cpus": 0}
serve.run(serve.deployment(ray_actor_options=options)(Other).bind(), name="other", route_prefix="/other")
serve.delete("other")
"""
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


class _Load:
    """Context of steady captions and of quick requests that HAProxy answers itself; collects failures with times."""

    def __init__(self, cluster: RunningCluster) -> None:
        self._cluster, self._stop = cluster, threading.Event()
        self.count, self.failed_s = 0, list[float]()
        self.reasons = list[str]()
        self._threads = [
            threading.Thread(target=self._run, args=[each]) for each in (self._caption,) * 3 + (self._quick,)
        ]

    def _caption(self) -> None:
        caption(ask(self._cluster.url, "compatible"))

    def _quick(self) -> None:
        assert httpx.get(f"{self._cluster.url}/-/routes", timeout=10).status_code == 200
        time.sleep(0.01)

    def _run(self, one: Callable[[], None]) -> None:
        while not self._stop.is_set():
            self.count += 1
            try:
                one()
            except (httpx.TransportError, AssertionError) as error:
                self.failed_s.append(time.monotonic())
                self.reasons.append(repr(error)[:200])

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        time.sleep(2)
        return self

    def __exit__(self, *_: object) -> None:
        time.sleep(3)
        self._stop.set()
        for thread in self._threads:
            thread.join()


def admin_socket(cluster: RunningCluster) -> Path:
    """Return HAProxy's admin socket, from the configuration that Ray has written."""
    (config,) = cluster.directory.glob("*/haproxy.cfg")
    (line,) = [line for line in config.read_text().splitlines() if "stats socket" in line]
    return Path(line.split()[2])


def test_every_port_is_on_host(cluster: RunningCluster) -> None:
    """No process of the cluster, Ray's included, listens on another address than `host`, 127.0.0.1."""
    listening = {
        (process.name(), each.laddr.ip, each.laddr.port)
        for process in cluster.processes()
        for each in process.net_connections("inet")
        if each.status == psutil.CONN_LISTEN
    }
    assert len(listening) > 20
    assert [each for each in listening if each[1] not in LOOPBACK] == []


def test_haproxys_socket_is_the_owners(cluster: RunningCluster) -> None:
    """The admin socket is 0600 in a directory 0700 below another 0700, and has the owner of the service."""
    path = admin_socket(cluster)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [stat.S_IMODE(each.stat().st_mode) for each in (path.parent, path.parent.parent)] == [0o700, 0o700]
    assert {each.stat().st_uid for each in (path, path.parent, path.parent.parent)} == {os.geteuid()}
    (haproxy,) = cluster.pids(HAPROXY)
    assert not [each.laddr for each in psutil.Process(haproxy).net_connections("unix") if each.laddr]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as another user")
def test_another_user_cannot_administer_haproxy(cluster: RunningCluster) -> None:
    """Connecting as `nobody` fails."""
    program = f"import socket; socket.socket(socket.AF_UNIX).connect({str(admin_socket(cluster))!r})"
    done = subprocess.run(
        ["/usr/bin/python3", "-c", program],
        user=65534,
        group=65534,
        extra_groups=[],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "PermissionError" in done.stderr


def test_a_killed_haproxy_is_back_within_a_second(cluster: RunningCluster) -> None:
    """The requests inside it fail, at most one of each client; none fails a second later, and Ray replaces nothing."""
    (supervisor,) = cluster.pids(SUPERVISOR)
    with _Load(cluster) as load:
        for _ in range(3):
            (victim,) = cluster.pids(HAPROXY)
            failed = len(load.failed_s)
            killed_s = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            time.sleep(4)
            assert max(load.failed_s[failed:], default=killed_s) - killed_s < 1, load.reasons
            assert len(load.failed_s) - failed <= 4, load.reasons
    assert load.count > 40
    assert cluster.pids(SUPERVISOR) == {supervisor}


def test_reloads_lose_nothing(cluster: RunningCluster) -> None:
    """Ray reloads HAProxy when another application comes and goes: no request of the service fails."""
    before = cluster.pids(HAPROXY)
    (ray_start,) = cluster.pids("ray.scripts.scripts start")
    arguments = psutil.Process(ray_start).cmdline()
    (port,) = [each.removeprefix("--port=") for each in arguments if each.startswith("--port=")]
    with _Load(cluster) as load:
        subprocess.run(
            [sys.executable, "-c", OTHER_APPLICATION, f"127.0.0.1:{port}"],
            env=cluster.environment | RAY_ENVIRONMENT | host_variables("127.0.0.1"),
            check=True,
            timeout=200,
        )
    assert load.reasons == []
    assert load.count > 40
    cluster.wait(lambda: cluster.pids(HAPROXY) - before and not cluster.pids(HAPROXY) & before)
