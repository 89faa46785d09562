"""Privacy of a process: its memory and its environment hold secrets that other processes of its user may not read."""

from __future__ import annotations

import ctypes

_PR_SET_DUMPABLE = 4


def forbid_inspection() -> bool:
    """Hide this process's memory and environment from other processes of its user; return whether that worked.

    Afterwards `ptrace`, `/proc/PID/mem` and `/proc/PID/environ` need root (CAP_SYS_PTRACE), so `py-spy` does, too, and
    there are no core dumps. Processes that this process forks are hidden as well, programs that it executes are not.
    """
    unused = ctypes.c_ulong(0)
    return bool(ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, unused, unused, unused, unused) == 0)
