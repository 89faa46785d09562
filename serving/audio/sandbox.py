"""Sandbox of a process that parses strangers' bytes: what is left to a decoder that has been taken over.

`enter` is called once the libraries are loaded. From then on the process computes, uses the descriptors that it has or
is sent, and makes memory files; the kernel refuses everything else. In the order of their effect:

- seccomp: an allowlist of system calls. No file is opened, no socket made, no program executed, no process or thread
  started, no other process signalled, traced or read, and no terminal written to by `ioctl`. A call that the list does
  not have fails with EPERM; a call that Linux has had only since 5.1 fails with ENOSYS, on which libraries fall back to
  an older one.
- Landlock: no file and no TCP port is opened, no process outside is signalled or traced, even without seccomp.
- No capabilities and no way to gain any (`no_new_privs`), also as root.
- Limits: size of a memory file, open files, processes.

Numbers of system calls: `arch/x86/entry/syscalls/syscall_64.tbl` and `include/uapi/asm-generic/unistd.h` of Linux.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SYSCALLS = {
    # name: (x86-64, aarch64), -1 where an architecture has no such call
    "brk": (12, 214),
    "clock_getres": (229, 114),
    "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115),
    "close": (3, 57),
    "dup": (32, 23),
    "dup2": (33, -1),
    "dup3": (292, 24),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "fcntl": (72, 25),
    "fstat": (5, 80),
    "ftruncate": (77, 46),
    "futex": (202, 98),
    "getcpu": (309, 168),
    "getegid": (108, 177),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getitimer": (36, 102),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "getrandom": (318, 278),
    "getrlimit": (97, 163),
    "getrusage": (98, 165),
    "gettid": (186, 178),
    "gettimeofday": (96, 169),
    "getuid": (102, 174),
    "ioctl": (16, 29),
    "lseek": (8, 62),
    "madvise": (28, 233),
    "mbind": (237, 235),
    "membarrier": (324, 283),
    "memfd_create": (319, 279),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "munmap": (11, 215),
    "nanosleep": (35, 101),
    "newfstatat": (262, 79),
    "poll": (7, -1),
    "ppoll": (271, 73),
    "prctl": (157, 167),
    "pread64": (17, 67),
    "prlimit64": (302, 261),
    "pselect6": (270, 72),
    "read": (0, 63),
    "readv": (19, 65),
    "recvfrom": (45, 207),
    "recvmsg": (47, 212),
    "restart_syscall": (219, 128),
    "rseq": (334, 293),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sched_getaffinity": (204, 123),
    "sched_yield": (24, 124),
    "select": (23, -1),
    "sendmsg": (46, 211),
    "sendto": (44, 206),
    "set_robust_list": (273, 99),
    "setitimer": (38, 103),
    "setrlimit": (160, 164),
    "sigaltstack": (131, 132),
    "statx": (332, 291),
    "sysinfo": (99, 179),
    "tgkill": (234, 131),
    "time": (201, -1),
    "times": (100, 153),
    "uname": (63, 160),
    "write": (1, 64),
    "writev": (20, 66),
}
"""System calls that the sandbox allows, some of them with certain arguments alone (`_arguments`)."""

_SECCOMP = (317, 277)
_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446  # on every architecture
_SINCE_5_1 = 424
"""First number of the calls that are numbered alike on every architecture, since Linux 5.1."""

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of `SYSCALLS` and AUDIT_ARCH constant, by machine."""

_PR_SET_NAME, _PR_GET_NAME, _PR_SET_NO_NEW_PRIVS = 15, 16, 38
_PR_SET_VMA = 0x53564D41
_TCGETS, _FIONBIO, _FIONREAD, _FIONCLEX, _FIOCLEX = 0x5401, 0x5421, 0x541B, 0x5450, 0x5451
_F_ADD_SEALS, _F_GET_SEALS, _F_DUPFD_CLOEXEC = 1033, 1034, 1030

_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_EPERM, _ENOSYS = 1, 38
_NUMBER_OFFSET, _ARCHITECTURE_OFFSET, _ARGUMENTS_OFFSET = 0, 4, 16  # in `struct seccomp_data`
_SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC = 1, 1
_CAPABILITY_VERSION_3 = 0x20080522

_OPEN_FILES = 32

_libc = ctypes.CDLL(None, use_errno=True)


def enter(*, memory_file_bytes: int) -> list[str]:
    """Confine this process for good; return the protections that this kernel does not have.

    `memory_file_bytes` is the largest memory file that the process may make.
    """
    for kind, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, memory_file_bytes),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_NPROC, 0),
    ):
        _, hard = resource.getrlimit(kind)
        limit = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (limit, limit))
    steps = {
        "no_new_privs": lambda: _prctl(_PR_SET_NO_NEW_PRIVS, 1),
        "capabilities": _drop_capabilities,
        "landlock": _restrict_by_landlock,
        "seccomp": _restrict_by_seccomp,
    }
    return [name for name, step in steps.items() if not step()]


def seccomp_program(machine: str, pid: int) -> bytes:
    """Return the filter for a machine as BPF instructions. Raises `KeyError` for an unknown machine."""
    column, architecture = _ARCHITECTURES[machine]
    arguments = _arguments(pid)
    program = [
        _instruction(_LOAD, _ARCHITECTURE_OFFSET),
        _instruction(_EQUAL, architecture, if_true=1),
        _instruction(_RETURN, _KILL_PROCESS),
        _instruction(_LOAD, _NUMBER_OFFSET),
    ]
    for name, numbers in SYSCALLS.items():
        if (number := numbers[column]) < 0:
            continue
        body = [*_checks(*arguments[name])] if name in arguments else [_instruction(_RETURN, _ALLOW)]
        program += [_instruction(_EQUAL, number, if_false=len(body)), *body]
    program += [
        _instruction(_AT_LEAST, _SINCE_5_1, if_false=1),  # x32 calls, too: their numbers have bit 30 set
        _instruction(_RETURN, _ERRNO | _ENOSYS),
        _instruction(_RETURN, _ERRNO | _EPERM),
    ]
    return b"".join(program)


def _arguments(pid: int) -> dict[str, tuple[int, Sequence[int]]]:
    """Return the calls that are allowed with certain arguments alone: index of the argument, allowed values."""
    return {
        # No F_SETOWN and F_SETSIG, which send signals to other processes.
        "fcntl": (1, (0, 1, 2, 3, 4, _F_DUPFD_CLOEXEC, _F_ADD_SEALS, _F_GET_SEALS)),
        # No TIOCSTI, which types into the terminal of the service.
        "ioctl": (1, (_TCGETS, _FIONBIO, _FIONREAD, _FIONCLEX, _FIOCLEX)),
        "prctl": (0, (_PR_SET_NAME, _PR_GET_NAME, _PR_SET_VMA)),
        "prlimit64": (0, (0, pid)),
        "tgkill": (0, (pid,)),  # `abort`
    }


def _checks(index: int, values: Sequence[int]) -> Iterator[bytes]:
    """Yield instructions that allow the call if the low half of an argument is one of the values."""
    yield _instruction(_LOAD, _ARGUMENTS_OFFSET + 8 * index)  # both machines are little-endian
    for value in values:
        yield _instruction(_EQUAL, value, if_false=1)
        yield _instruction(_RETURN, _ALLOW)
    yield _instruction(_RETURN, _ERRNO | _EPERM)


def _instruction(code: int, value: int, *, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _restrict_by_seccomp() -> bool:
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        return False
    instructions = seccomp_program(machine, os.getpid())
    buffer = ctypes.create_string_buffer(instructions, len(instructions))
    program = struct.pack("=HxxxxxxQ", len(instructions) // 8, ctypes.addressof(buffer))
    number = _SECCOMP[_ARCHITECTURES[machine][0]]
    done = _libc.syscall(
        ctypes.c_long(number), _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC, ctypes.c_char_p(program)
    )
    return bool(done == 0)


def _restrict_by_landlock() -> bool:
    """Forbid every access that this kernel's Landlock knows, without exception."""
    version = _libc.syscall(ctypes.c_long(_LANDLOCK_CREATE_RULESET), None, ctypes.c_size_t(0), ctypes.c_uint(1))
    if version < 1:
        return False
    # Bits of accesses to files, of accesses to the network, and of scopes, by the version that has added them.
    files = (1 << (13 if version < 2 else 14 if version < 3 else 15 if version < 5 else 16)) - 1  # noqa: PLR2004
    network, scopes = (3 if version >= 4 else 0), (3 if version >= 6 else 0)  # noqa: PLR2004
    rules = struct.pack("=QQQ", files, network, scopes)
    size = 8 if version < 4 else 16 if version < 6 else 24  # noqa: PLR2004
    ruleset = _libc.syscall(
        ctypes.c_long(_LANDLOCK_CREATE_RULESET), ctypes.c_char_p(rules), ctypes.c_size_t(size), ctypes.c_uint(0)
    )
    if ruleset < 0:
        return False
    try:
        return bool(_libc.syscall(ctypes.c_long(_LANDLOCK_RESTRICT_SELF), ctypes.c_int(ruleset), ctypes.c_uint(0)) == 0)
    finally:
        os.close(ruleset)


def _drop_capabilities() -> bool:
    header, none = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), bytes(24)
    return bool(_libc.capset(ctypes.c_char_p(header), ctypes.c_char_p(none)) == 0)


def _prctl(option: int, value: int) -> bool:
    unused = ctypes.c_ulong(0)
    return bool(_libc.prctl(ctypes.c_int(option), ctypes.c_ulong(value), unused, unused, unused) == 0)
