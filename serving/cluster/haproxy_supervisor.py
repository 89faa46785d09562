"""Parent of HAProxy: starts it again within a second after a crash, and guards its administration.

    Ray ── admin.sock (0600, in a directory 0700) ─► Supervisor ── unnamed socket pair ─► HAProxy
            `show info`, `show stat`, `show servers state`           │                       ▲
    clients ── TCP ─► listening sockets, opened here and kept ───────┴── inherited (`fd@`) ──┘

The supervisor opens the listening sockets and keeps them open: connections that arrive while no HAProxy runs wait in
the kernel's queue and are not refused. At a reload Ray starts another supervisor, which gets the same sockets from the
supervisor before (`SOCKETS` on the admin socket); the HAProxy before accepts nothing more and finishes its streams.

HAProxy dies with its supervisor, as Ray ends the supervisor by SIGKILL. A supervisor whose parent is gone waits
`ORPHANED_S` for a successor. Free of other modules of this package and of Ray: it is started at each reload.
"""

from __future__ import annotations

import array
import ctypes
import json
import os
import re
import signal
import socket
import socketserver
import stat
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = (b"show info", b"show stat", b"show servers state")
"""The only commands of HAProxy that the admin socket answers: those that Ray sends."""
SOCKETS = b"captioner sockets"
"""Command of a succeeding supervisor: answered with the listening sockets and their addresses."""

ORPHANED_S = 30.0
"""Ray needs about 20 s to replace the process that started this one."""
_QUICK_S = 1.0
_QUICK_ENDINGS = 5
_ANSWER_S = 4.0
"""Below the 5 s after which Ray gives up."""
_BIND_S = 5.0
_BACKLOG = 4096
_MAX_SOCKETS = 16
_MAX_LINE_BYTES = 1024
_PR_SET_PDEATHSIG = 1

_SIGNALS = (
    signal.SIGCHLD,
    signal.SIGUSR1,
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGTTOU,
    signal.SIGTTIN,
)
_ENDING = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

_BIND = re.compile(r"^( +bind )(\S*:\d+)((?: proto h2)?)$", re.MULTILINE)
_STATS_SOCKET = re.compile(r"^( +stats socket )(\S+) .*$", re.MULTILINE)
_LOAD_STATE = re.compile(r"^ +load-server-state-from-file .*\n", re.MULTILINE)
_PID = re.compile(rb"^Pid: \d+", re.MULTILINE)


class UnsafeDirectoryError(OSError):
    """The directory of the admin socket can be changed by another user."""


def protect(directory: Path) -> None:
    """Close the directory of the admin socket to other users: mode 0700.

    Raises `UnsafeDirectoryError` if another user owns the directory or can replace it in its parent.
    """
    for path in (directory, directory.parent):
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid not in {os.geteuid(), 0}:
            raise UnsafeDirectoryError(f"{path} is not a directory of this user (owner uid={status.st_uid})")
        shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if path == directory:
            path.chmod(0o700)
        elif shared and not status.st_mode & stat.S_ISVTX:
            if status.st_uid != os.geteuid():
                raise UnsafeDirectoryError(f"{path} can be written by other users (mode={status.st_mode & 0o7777:o})")
            path.chmod(status.st_mode & ~(stat.S_IWGRP | stat.S_IWOTH) & 0o7777)


def listen(address: str) -> socket.socket:
    """Open a listening socket on `HOST:PORT`; no host or `*` is every IPv4 address, as in HAProxy.

    Raises `OSError` if the address stays in use for `_BIND_S`.
    """
    host, _, port = address.rpartition(":")
    found = socket.getaddrinfo(
        "0.0.0.0" if host in {"", "*"} else host.strip("[]"),  # noqa: S104 - the operator's `host`
        int(port),
        type=socket.SOCK_STREAM,
        flags=socket.AI_PASSIVE,
    )
    family, _, _, _, name = found[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    deadline_s = time.monotonic() + _BIND_S
    while True:
        try:
            listener.bind(name)
        except OSError as error:
            if time.monotonic() > deadline_s:
                listener.close()
                raise OSError(error.errno, f"cannot listen on {address}: {error.strerror}") from error
            time.sleep(0.1)  # HAProxy before has been killed and may not be gone
        else:
            listener.listen(_BACKLOG)
            return listener


def adopt(admin: Path) -> tuple[int | None, dict[str, socket.socket]]:
    """Return the process id and the listening sockets by address of the supervisor at this admin socket, if any."""
    descriptors: list[int] = []
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_ANSWER_S)
            connection.connect(str(admin))
            connection.sendall(SOCKETS + b"\n")
            data, descriptors, _, _ = socket.recv_fds(connection, 65536, _MAX_SOCKETS)
            answer = json.loads(data)
            pairs = list(zip(map(str, answer["addresses"]), descriptors, strict=True))
            return int(answer["pid"]), {address: socket.socket(fileno=descriptor) for address, descriptor in pairs}
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or it has ended, or it has been replaced
        for descriptor in descriptors:
            with suppress(OSError):
                os.close(descriptor)
        return None, {}


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return HAProxy's arguments without `-f FILE`, `-x SOCKET` and `-sf PID…`, and the process ids of `-sf`."""
    others, pids, skip, in_pids = [], [], False, False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in {"-f", "-x"}:
            skip, in_pids = True, False
        elif argument in {"-sf", "-st"}:
            in_pids = True
        elif in_pids and argument.isdigit():
            pids.append(argument)
        else:
            in_pids = False
            others.append(argument)
    return others, pids


class Supervisor:
    """One HAProxy process after another, with the same listening sockets and one admin socket."""

    def __init__(self, program: str, arguments: Sequence[str], configuration: str, path: Path) -> None:
        """Open the listening sockets, or get them from the supervisor before.

        `configuration` is what `haproxy_wrapper` has made of Ray's file at `path`. Raises `OSError`.
        """
        self._parent, self._pid = os.getppid(), os.getpid()
        with suppress(OSError):  # it leads its session already
            os.setpgid(0, 0)  # Ray kills the process group of a lost process; this one waits for a successor
        self._program = program
        others, self._replaced = split(arguments)
        self._others = others
        found = _STATS_SOCKET.search(configuration)
        if found is None:
            raise ValueError("no `stats socket` in the configuration")
        self._admin = Path(found[2])
        protect(self._admin.parent)
        previous, sockets = adopt(self._admin)
        if previous is not None and str(previous) not in self._replaced:
            self._replaced.append(str(previous))  # its parent was lost, and Ray does not know it
        self._listeners = {
            address: sockets.pop(address) if address in sockets else listen(address)
            for address in (match[2] for match in _BIND.finditer(configuration))
        }
        for unused in sockets.values():
            unused.close()
        self._control, self._control_of_haproxy = socket.socketpair()
        self._file = path.with_name(f"captioner-{self._pid}.cfg")
        self._configuration = self._private(configuration)
        self._stopping = self._ready = False
        # Before the fork: nothing is imported or loaded between fork and exec.
        self._prctl = ctypes.CDLL(None, use_errno=True).prctl
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)

    def run(self) -> int:
        """Run HAProxy until a signal ends it, or Ray's process is gone; return its exit status."""
        self._remove_old_files()
        started_s = self._start(self._configuration, ["-sf", *self._replaced] if self._replaced else [])
        threading.Thread(target=self._serve_when_ready, daemon=True).start()
        quick, orphaned_s = 0, None
        while True:
            received = signal.sigtimedwait(_SIGNALS, 0.5)
            if received is not None and received.si_signo != signal.SIGCHLD:
                self._forward(signal.Signals(received.si_signo))
            status = self._haproxy.poll()
            if status is not None:
                quick = quick + 1 if time.monotonic() - started_s < _QUICK_S else 0
                if self._stopping or not self._ready or quick >= _QUICK_ENDINGS:
                    self._file.unlink(missing_ok=True)
                    return status if status >= 0 else 128 - status
                _log(f"HAProxy ended and is started again (pid={self._haproxy.pid}, status={status})")
                # The state of servers in Ray's file is that of the last reload.
                started_s = self._start(_LOAD_STATE.sub("", self._configuration), [])
            if os.getppid() != self._parent and not self._stopping:
                orphaned_s = orphaned_s or time.monotonic()
                if time.monotonic() - orphaned_s > ORPHANED_S:
                    _log(f"HAProxy is stopped: the process that started it is gone (pid={self._parent})")
                    self._forward(signal.SIGTERM)

    def _private(self, configuration: str) -> str:
        """Return the configuration with inherited listening sockets, and an admin socket without a name."""
        text = _BIND.sub(lambda match: f"{match[1]}fd@{self._listeners[match[2]].fileno()}{match[3]}", configuration)
        return _STATS_SOCKET.sub(rf"\1sockpair@{self._control_of_haproxy.fileno()} level user", text)

    def _start(self, configuration: str, arguments: list[str]) -> float:
        """Start HAProxy; return the time of its start."""
        self._file.write_text(configuration)
        descriptors = [each.fileno() for each in self._listeners.values()]
        self._haproxy = subprocess.Popen(  # noqa: S603 - Ray's arguments, no shell
            [
                self._program,
                "-db",
                "-f",
                str(self._file),
                *(each for each in self._others if each != "-db"),
                *arguments,
            ],
            pass_fds=[*descriptors, self._control_of_haproxy.fileno()],
            preexec_fn=self._in_child,  # noqa: PLW1509 - calls that neither lock nor import
        )
        return time.monotonic()

    def _in_child(self) -> None:
        self._prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != self._pid:
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _forward(self, number: signal.Signals) -> None:
        """Send a signal to HAProxy. SIGUSR1 ends it after its streams, SIGTERM and SIGINT at once."""
        if number in _ENDING:
            self._stopping = True
            for listener in self._listeners.values():
                listener.close()
        self._haproxy.send_signal(number)

    def ask(self, command: bytes) -> bytes:
        """Return HAProxy's answer to a command; nothing if there is none in `_ANSWER_S`."""
        deadline_s = time.monotonic() + _ANSWER_S
        answer = b""
        while not answer and (left_s := deadline_s - time.monotonic()) > 0:
            ours, other = socket.socketpair()
            with ours, other, suppress(OSError):
                ours.settimeout(left_s)
                socket.send_fds(self._control, [b"\0"], [other.fileno()])
                other.close()
                ours.sendall(command + b"\n")
                while data := ours.recv(65536):
                    answer += data
            if not answer:
                time.sleep(0.05)  # it has ended and is started again
        return _PID.sub(b"Pid: %d" % self._pid, answer) if command == b"show info" else answer

    def hand_over(self, connection: socket.socket) -> None:
        """Send the listening sockets to the next supervisor, unless they are closed."""
        listeners = {} if self._stopping else dict(self._listeners)
        data = json.dumps({"pid": self._pid, "addresses": list(listeners)}).encode()
        descriptors = array.array("i", [each.fileno() for each in listeners.values()])
        connection.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)] if listeners else [])

    def _serve_when_ready(self) -> None:
        """Answer the admin socket as soon as HAProxy answers: until then the supervisor before does."""
        while not self.ask(b"show info"):
            pass
        self._ready = True
        supervisor = self

        class Connection(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                supervisor.answer(self.request)

        temporary = self._admin.with_name(f"{self._admin.name}.{self._pid}")
        temporary.unlink(missing_ok=True)
        with _PrivateServer(str(temporary), Connection) as server:
            temporary.replace(self._admin)
            server.serve_forever()

    def answer(self, connection: socket.socket) -> None:
        """Answer one command on the admin socket and close the connection."""
        connection.settimeout(_ANSWER_S)
        with suppress(OSError):
            line = b""
            while b"\n" not in line and len(line) < _MAX_LINE_BYTES and (data := connection.recv(_MAX_LINE_BYTES)):
                line += data
            command = line.strip()
            if command == SOCKETS:
                self.hand_over(connection)
            elif command in COMMANDS:
                connection.sendall(self.ask(command))
            else:
                connection.sendall(b"Permission denied: HAProxy cannot be changed here.\n")

    def _remove_old_files(self) -> None:
        """Remove the configurations of supervisors that were killed."""
        for path in self._file.parent.glob("captioner-*.cfg"):
            if not Path(f"/proc/{path.stem.removeprefix('captioner-')}").exists():
                path.unlink(missing_ok=True)


class _PrivateServer(socketserver.ThreadingUnixStreamServer):
    """A Unix socket of mode 0600."""

    daemon_threads = True

    def server_bind(self) -> None:
        """Bind, and close the socket to other users before it is found."""
        super().server_bind()
        Path(str(self.server_address)).chmod(0o600)


def _log(text: str) -> None:
    sys.stderr.write(f"captioner: {text}\n")
    sys.stderr.flush()
