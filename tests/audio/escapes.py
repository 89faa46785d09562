"""A program that enters the sandbox of audio workers and tries to leave it, in every way that is listed here.

    python -m tests.audio.escapes READABLE_FILE WRITABLE_DIRECTORY [LAYER …]

Prints a JSON object: for each attempt `null` where it succeeded, else the error. `LAYER` names the protections that are
left out (`landlock`, `seccomp`), or `all` to enter no sandbox and make the harmless attempts alone.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from serving.audio import sandbox

if TYPE_CHECKING:
    from collections.abc import Callable

HARMLESS = (
    *("internet socket", "unix socket", "spawn", "fork", "thread", "read a file", "write a file", "delete a file"),
    *("own environment", "signal the parent", "limit the parent", "type into the terminal", "many descriptors"),
)

_libc = ctypes.CDLL(None, use_errno=True)
_X86 = os.uname().machine == "x86_64"
_PTRACE_ATTACH, _PTRACE_DETACH = 16, 17
_PROCESS_VM_READV = 310 if _X86 else 270
_IO_URING_SETUP, _PIDFD_OPEN, _BPF, _USERFAULTFD = 425, 434, 321 if _X86 else 280, 323 if _X86 else 282
_TIOCSTI = 0x5412
_CLONE_NEWUSER = 0x10000000
_F_SETOWN = 8


def attempts(readable: Path, directory: Path, memory: int) -> dict[str, Callable[[], object]]:
    """Return the attempts by name; each raises `OSError` or `RuntimeError` where it fails."""
    parent = os.getppid()
    kept = directory / "kept"
    return {
        "internet socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
        "datagram socket": lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM),
        "unix socket": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM),
        "netlink socket": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
        "socket pair": socket.socketpair,
        "listen": lambda: _call("listen", memory, 1),
        "bind": lambda: _call("bind", memory, b"\2\0" + bytes(14), 16),
        "connect": lambda: _call("connect", memory, b"\2\0" + bytes(14), 16),
        "execute": lambda: os.execv("/bin/true", ["true"]),  # noqa: S606
        "execute memory": lambda: os.execve(memory, ["true"], {}),  # noqa: S606
        "spawn": lambda: os.posix_spawn("/bin/true", ["true"], {}),
        "fork": _fork,
        "shell": _shell,
        "thread": lambda: threading.Thread(target=int).start(),
        "read a file": readable.read_bytes,
        "list a directory": lambda: list(directory.iterdir()),
        "environment of the parent": lambda: Path(f"/proc/{parent}/environ").read_bytes(),
        "memory of the parent": lambda: Path(f"/proc/{parent}/mem").open("rb"),
        "own environment": lambda: Path("/proc/self/environ").read_bytes(),
        "trace the parent": lambda: _trace(parent),
        "read the parent": lambda: _read_process(parent),
        "open the parent": lambda: _call("syscall", ctypes.c_long(_PIDFD_OPEN), parent, 0),
        "signal the parent": lambda: os.kill(parent, 0),
        "signal the parent's thread": lambda: _call("tgkill", parent, parent, 0),
        "signal by a descriptor": lambda: fcntl.fcntl(memory, _F_SETOWN, parent),
        "limit the parent": lambda: _call("prlimit", parent, 0, None, ctypes.create_string_buffer(16)),
        "renice the parent": lambda: os.setpriority(os.PRIO_PROCESS, parent, os.getpriority(os.PRIO_PROCESS, 0)),
        "place the parent": lambda: os.sched_setaffinity(parent, {0}),
        "write a file": lambda: (directory / "new").write_bytes(b"x"),
        "append to a file": lambda: kept.open("ab").write(b"x"),
        "overwrite a file": lambda: os.open(kept, os.O_RDWR),
        "truncate a file": lambda: os.truncate(kept, 0),
        "delete a file": lambda: kept.with_name("delete").unlink(),
        "rename a file": lambda: kept.with_name("rename").rename(directory / "renamed"),
        "change a mode": lambda: kept.chmod(0o777),
        "make a directory": (directory / "made").mkdir,
        "make a link": lambda: (directory / "link").symlink_to("/etc/passwd"),
        "make a pipe": lambda: os.mkfifo(directory / "fifo"),
        "change the root": lambda: os.chroot(directory),
        "change the directory": lambda: os.chdir(directory),
        "mount": lambda: _call("mount", b"none", str(directory).encode(), b"tmpfs", 0, None),
        "new user namespace": lambda: _call("unshare", _CLONE_NEWUSER),
        "change the user": lambda: os.setresuid(65534, 65534, 65534),
        "io_uring": lambda: _call("syscall", ctypes.c_long(_IO_URING_SETUP), 1, ctypes.create_string_buffer(120)),
        "bpf": lambda: _call("syscall", ctypes.c_long(_BPF), 0, ctypes.create_string_buffer(120), 72),
        "userfaultfd": lambda: _call("syscall", ctypes.c_long(_USERFAULTFD), 0),
        "type into the terminal": lambda: _type(memory),
        "shared memory": lambda: _call("shmget", 0, 4096, 0o600),
        "large memory file": lambda: os.ftruncate(memory, 2**20 + 1),
        "many descriptors": lambda: [os.dup(memory) for _ in range(64)],
        "32-bit call": lambda: _call("syscall", ctypes.c_long(0x40000000 | 39)),
    }


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)


def _shell() -> None:
    if status := os.system("true"):  # noqa: S605
        raise OSError(status, "shell")


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def _trace(pid: int) -> None:
    # The parent is never left stopped: the attempt is made on init where there is one, and must fail there, too.
    _call("ptrace", _PTRACE_ATTACH, pid, None, None)
    os.kill(pid, signal.SIGCONT)
    _libc.ptrace(_PTRACE_DETACH, pid, None, None)


def _read_process(pid: int) -> None:
    buffer = ctypes.create_string_buffer(8)
    vector = (ctypes.c_ulong * 2)(ctypes.addressof(buffer), 8)
    own = (ctypes.c_ulong * 2)(id(buffer), 8)
    # A bad address (EFAULT) is a failure of the address alone: the kernel has allowed the access.
    if _libc.syscall(ctypes.c_long(_PROCESS_VM_READV), pid, vector, 1, own, 1, 0) < 0 and ctypes.get_errno() != 14:
        raise OSError(ctypes.get_errno(), "process_vm_readv")


def _type(descriptor: int) -> None:
    # ENOTTY (25) comes from the file: the call got through.
    if _libc.ioctl(descriptor, ctypes.c_ulong(_TIOCSTI), b"x") < 0 and ctypes.get_errno() != 25:
        raise OSError(ctypes.get_errno(), "ioctl")


def main(readable: str, directory: str, *left_out: str) -> None:
    """Enter the sandbox without the layers `left_out`, make all attempts and print their results."""
    for name in ("kept", "delete", "rename"):
        Path(directory, name).write_bytes(b"kept")
    for layer in left_out:
        setattr(sandbox, f"_restrict_by_{layer}", lambda: False)
    memory = os.memfd_create("memory")
    missing = [] if "all" in left_out else sandbox.enter(memory_file_bytes=2**20)
    results: dict[str, object] = {"missing": missing}
    for name, attempt in attempts(Path(readable), Path(directory), memory).items():
        if "all" in left_out and name not in HARMLESS:
            continue
        try:
            attempt()
        except (OSError, RuntimeError, MemoryError) as error:
            results[name] = repr(error)
        else:
            results[name] = None
    os.write(1, json.dumps(results).encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
