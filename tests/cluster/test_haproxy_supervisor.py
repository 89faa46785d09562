"""HAProxy behind its supervisor, with the configuration that Ray writes and one small frontend. No Ray runs here."""

from __future__ import annotations

import http.server
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

import httpx
import psutil
import pytest

from serving.cluster import haproxy_wrapper
from serving.cluster.haproxy_supervisor import UnsafeDirectoryError, protect, split
from tests.cluster.ray_haproxy import render
from tests.cluster.running import free_port, until

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as another user")
NOBODY = 65534


class _Frontend(http.server.BaseHTTPRequestHandler):
    """Answers every GET with 200."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer."""
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: object) -> None:
        """Log nothing."""


class Proxy:
    """Supervisors of one node, as Ray starts them: one after another with the same files."""

    def __init__(self, directory: Path, port: int, frontend: int) -> None:
        self.directory, self.port = directory, port
        self._numbers = {"port": port, "metrics": free_port(), "stats": free_port(), "frontend": frontend}
        self.ports = [self._numbers[name] for name in ("port", "metrics", "stats")]
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """Write Ray's configuration and start a supervisor; return it when it answers the admin socket."""
        path = render(self.directory, fallback=free_port(), **self._numbers)
        process = subprocess.Popen(self.command(path, *arguments), env=self.environment(**environment))
        self.running.append(process)
        until(lambda: process.poll() is not None or self.pid() == process.pid, 30)
        assert process.poll() is None
        return process

    def command(self, path: Path, *arguments: str) -> list[str]:
        """Return the command of Ray."""
        return [haproxy_wrapper.__file__, "-db", "-f", str(path), "-dR", *arguments]

    def environment(self, **environment: str) -> dict[str, str]:
        """Return the environment of Ray's process."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return os.environ | {"PATH": path} | environment

    @property
    def admin(self) -> Path:
        """The admin socket."""
        return self.directory / "admin.sock"

    def ask(self, command: str) -> str:
        """Return the answer to a command on the admin socket, as Ray sends it."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(self.admin))
            connection.sendall(f"{command}\n".encode())
            answer = b""
            while data := connection.recv(65536):
                answer += data
        return answer.decode()

    def pid(self) -> int | None:
        """Return the process id that the admin socket answers, if it answers."""
        with suppress(OSError):
            for line in self.ask("show info").splitlines():
                if line.startswith("Pid: "):
                    return int(line.removeprefix("Pid: "))
        return None

    def get(self) -> int:
        """Return the status of a request on a new connection."""
        return httpx.get(f"http://127.0.0.1:{self.port}/", timeout=10).status_code

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.running:
            process.kill()
            process.wait()


def haproxy(supervisor: int) -> psutil.Process:
    """Return the HAProxy of a supervisor."""
    (child,) = psutil.Process(supervisor).children()
    return child


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxy]:
    """A proxy that is not started, in front of one frontend."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", free_port()), _Frontend)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    directory = tmp_path / "node"
    directory.mkdir(mode=0o755)
    with Proxy(directory, free_port(), server.server_address[1]) as proxy:
        yield proxy
    server.shutdown()
    server.server_close()


class _Requests:
    """Context of steady requests, each on a new connection; collects what failed and when."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy, self._stop = proxy, threading.Event()
        self.count, self.failures = 0, dict[float, str]()
        self._threads = [threading.Thread(target=self._run) for _ in range(4)]

    def _run(self) -> None:
        while not self._stop.is_set():
            self.count += 1
            try:
                status = self._proxy.get()
            except httpx.TransportError as error:
                self.failures[time.monotonic()] = repr(error)
            else:
                if status != 200:
                    self.failures[time.monotonic()] = str(status)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        time.sleep(0.5)
        return self

    def __exit__(self, *_: object) -> None:
        time.sleep(1)
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_only_the_owner_reaches_the_admin_socket(proxy: Proxy) -> None:
    """The directory is 0700 and the socket 0600, although Ray makes them 0755 and 0666; HAProxy has no other socket."""
    process = proxy.start()
    assert stat.S_IMODE(proxy.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(proxy.admin.stat().st_mode) == 0o600
    assert proxy.admin.stat().st_uid == os.geteuid()
    assert not [each for each in haproxy(process.pid).net_connections("unix") if each.laddr]


@ROOT
def test_another_user_cannot_connect(proxy: Proxy) -> None:
    """Another user of the machine is refused by the directory, and by the socket where the directory is open."""
    proxy.start()
    program = f"import socket; socket.socket(socket.AF_UNIX).connect({str(proxy.admin)!r})"
    for parent in proxy.directory.parents:
        if parent.stat().st_mode & 0o001 == 0:
            parent.chmod(parent.stat().st_mode | 0o011)
    for mode in (0o700, 0o755):
        proxy.directory.chmod(mode)
        done = subprocess.run(
            ["/usr/bin/python3", "-c", program],
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            capture_output=True,
            text=True,
            check=False,
        )
        assert "PermissionError" in done.stderr


def test_the_admin_socket_answers_only_what_ray_asks(proxy: Proxy) -> None:
    """Three commands that show something are answered, with the supervisor's process id; changes are refused."""
    process = proxy.start()
    assert proxy.pid() == process.pid
    assert proxy.ask("show stat").startswith("# pxname,svname,")
    assert proxy.ask("show servers state").startswith("1\n# be_id ")
    for command in (
        "set server http-captioner/frontend addr 127.0.0.1 port 1",
        "disable frontend http_frontend",
        "show info; disable frontend http_frontend",
        "show stat typed",
        "show env",
        "shutdown frontend http_frontend",
        "_getsocks",
        "expert-mode on",
        "",
        "x" * 1000,
    ):
        assert proxy.ask(command) == "Permission denied: HAProxy cannot be changed here.\n"
    assert proxy.get() == 200


def test_every_port_is_on_one_host(proxy: Proxy) -> None:
    """Clients' port, metrics and statistics are on Ray's `http_options.host`; Ray has the latter on every address."""
    process = proxy.start()
    for pid in (process.pid, haproxy(process.pid).pid):
        found = {each.laddr for each in psutil.Process(pid).net_connections("inet") if each.status == "LISTEN"}
        assert found == {("127.0.0.1", port) for port in proxy.ports}
    assert "http_frontend" in httpx.get(f"http://127.0.0.1:{proxy.ports[1]}/metrics").text
    assert httpx.get(f"http://127.0.0.1:{proxy.ports[2]}/stats").status_code == 200


@pytest.mark.parametrize(
    "host",
    ["127.0.0.2", "::1", "0.0.0.0"],  # noqa: S104 - of a test
)
def test_the_host_of_the_cluster_command_is_used(proxy: Proxy, host: str) -> None:
    """`captioner cluster` names the host of all three ports; frontends are reached by loopback."""
    process = proxy.start(CAPTIONER_CLUSTER_HOST=host)
    sockets = haproxy(process.pid).net_connections("inet")
    assert {each.laddr[:2] for each in sockets if each.status == "LISTEN"} == {(host, port) for port in proxy.ports}
    url = f"http://{f'[{host}]' if ':' in host else host}:{proxy.port}/"
    assert httpx.get(url, timeout=10).text == "ok"


def test_a_killed_haproxy_is_back_within_a_second(proxy: Proxy) -> None:
    """Only requests inside the killed process fail. No connection is refused, and Ray's process id stays."""
    process = proxy.start()
    with _Requests(proxy) as requests:
        for _ in range(3):
            victim = haproxy(process.pid)
            killed_s = time.monotonic()
            victim.kill()
            victim.wait(timeout=5)
            assert proxy.get() == 200  # it waits in the kernel's queue
            assert time.monotonic() - killed_s < 1
            time.sleep(1.2)  # five endings, each within a second, stop the supervisor
    assert requests.count > 100
    assert "refused" not in " ".join(requests.failures.values())
    assert len(requests.failures) <= 3 * 4
    assert proxy.pid() == process.pid


def test_a_haproxy_that_always_ends_stops_the_supervisor(proxy: Proxy) -> None:
    """Five endings in a row, each within a second, end the supervisor with HAProxy's status: Ray replaces it."""
    process = proxy.start()
    began_s = time.monotonic()
    while process.poll() is None and time.monotonic() - began_s < 30:
        for child in psutil.Process(process.pid).children():
            with suppress(psutil.Error):
                child.kill()
        time.sleep(0.05)
    assert process.wait(timeout=10) == 128 + signal.SIGKILL
    assert not list(proxy.directory.glob("captioner-*.cfg"))


def test_a_reload_loses_no_request(proxy: Proxy) -> None:
    """Ray's reload, `-sf PID -x SOCKET`: the next supervisor takes over under load, and the one before ends."""
    process = proxy.start()
    with _Requests(proxy) as requests:
        for _ in range(3):
            before, process = process, proxy.start("-sf", str(process.pid), "-x", str(proxy.admin))
            assert before.wait(timeout=20) == 0
    assert requests.count > 100
    assert requests.failures == {}
    # The sockets went through three hands.
    assert proxy.get() == 200


def test_a_reload_lets_running_requests_end(proxy: Proxy) -> None:
    """A connection of the HAProxy before stays open until its response is complete."""
    process = proxy.start()
    with socket.create_connection(("127.0.0.1", proxy.port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n")
        time.sleep(0.2)
        proxy.start("-sf", str(process.pid), "-x", str(proxy.admin))
        assert process.poll() is None
        client.sendall(b"connection: close\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200")
    assert process.wait(timeout=20) == 0


def test_haproxy_dies_with_its_supervisor(proxy: Proxy) -> None:
    """Ray ends the supervisor by SIGKILL: no HAProxy stays behind on the port, and the next one starts at once."""
    process = proxy.start()
    child = haproxy(process.pid)
    process.kill()
    process.wait()
    child.wait(timeout=5)
    proxy.start()
    assert proxy.get() == 200


def test_a_supervisor_without_ray_is_succeeded(proxy: Proxy) -> None:
    """A lost process of Ray's costs no request: its supervisor serves until that of Ray's next process takes over."""
    path = render(proxy.directory, port=proxy.port, metrics=proxy.ports[1], stats=proxy.ports[2], frontend=free_port())
    program = f"import subprocess, time; subprocess.Popen({proxy.command(path)!r}); time.sleep(1000)"
    with subprocess.Popen([sys.executable, "-c", program], env=proxy.environment()) as ray:
        until(proxy.pid, 30)
        orphan = psutil.Process(proxy.pid())
        ray.kill()
    with orphan.oneshot():
        assert orphan.is_running()
    process = proxy.start()  # without `-sf`: Ray's next process does not know it
    assert process.pid != orphan.pid
    until(lambda: not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE, 20)
    assert proxy.get() == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_end_both(proxy: Proxy, number: signal.Signals) -> None:
    """Signals that end HAProxy are passed on, and it is not started again."""
    process = proxy.start()
    child = haproxy(process.pid)
    process.send_signal(number)
    process.wait(timeout=10)
    assert not child.is_running()
    assert not list(proxy.directory.glob("captioner-*.cfg"))


def test_a_start_that_fails_ends_with_haproxys_status(proxy: Proxy) -> None:
    """A configuration that HAProxy refuses ends the start at once: Ray reads status and standard error."""
    path = render(proxy.directory, port=proxy.port, metrics=proxy.ports[1], stats=proxy.ports[2])
    path.write_text(path.read_text().replace("    maxconn 4096\n", "    maxconn none\n"))
    done = subprocess.run(
        proxy.command(path), env=proxy.environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "maxconn" in done.stderr


def test_a_port_in_use_is_named(proxy: Proxy) -> None:
    """A port of another program ends the start with its address."""
    path = render(proxy.directory, port=proxy.port, metrics=proxy.ports[1], stats=proxy.ports[2])
    with socket.create_server(("127.0.0.1", proxy.port)):
        done = subprocess.run(
            proxy.command(path), env=proxy.environment(), capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{proxy.port}: Address already in use" in done.stderr


@ROOT
def test_a_directory_of_another_user_refuses_the_start(tmp_path: Path) -> None:
    """A directory, or its parent, that another user made first, or may write, or a link is refused by name."""
    for made_by_other in ("node", ""):
        parent = tmp_path / f"parent-{made_by_other}"
        (parent / "node").mkdir(parents=True)
        shutil.chown(parent / made_by_other, NOBODY)
        with pytest.raises(UnsafeDirectoryError, match="is not a directory of this user"):
            protect(parent / "node")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UnsafeDirectoryError, match="is not a directory of this user"):
        protect(tmp_path / "link")


def test_a_shared_parent_is_closed(tmp_path: Path) -> None:
    """Write permission of group and others is removed from the parent, which they could otherwise rename in."""
    parent = tmp_path / "haproxy-serve"
    (parent / "node").mkdir(parents=True)
    parent.chmod(0o777)
    protect(parent / "node")
    assert stat.S_IMODE(parent.stat().st_mode) == 0o755


@pytest.mark.parametrize(
    ("arguments", "others", "pids"),
    [
        ("-db -f a.cfg -dR", ["-db", "-dR"], []),
        ("-db -f a.cfg -dR -sf 12 345 -x a.sock", ["-db", "-dR"], ["12", "345"]),
        ("-x a.sock -sf 7 -db", ["-db"], ["7"]),
        ("-sf 7 -n 5", ["-n", "5"], ["7"]),
    ],
)
def test_arguments_of_a_reload_are_taken_apart(arguments: str, others: list[str], pids: list[str]) -> None:
    """File, socket and process ids are the supervisor's; everything else goes to HAProxy."""
    assert split(arguments.split()) == (others, pids)
