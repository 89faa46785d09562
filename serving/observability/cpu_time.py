"""CPU time: a counter over other processes that survives their end, and the CPU share of the current thread."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_UTIME = 11
"""Index of user time in `/proc/PID/stat` after the name; system time follows."""


class CpuTime:
    """CPU seconds used by a changing set of processes; of an ended process the last sample is kept.

    A process that has ended can still be sampled until it is waited for: sample before waiting, and nothing is missed.
    """

    def __init__(self) -> None:
        self._used_s: dict[int, float] = {}
        self._ended_s = 0.0

    def sample(self, pids: Iterable[int]) -> float:
        """Return the CPU seconds used by these processes and by all that were sampled before."""
        living = set()
        for pid in pids:
            with suppress(OSError, ValueError, IndexError):
                self._used_s[pid] = max(self._used_s.get(pid, 0.0), _used_s(pid))
                living.add(pid)
        for pid in self._used_s.keys() - living:
            self._ended_s += self._used_s.pop(pid)
        return self._ended_s + sum(self._used_s.values())


class Busy:
    """CPU share of the calling thread since its last call, 0 to 1: at 1 its event loop no longer keeps up."""

    def __init__(self) -> None:
        self._called_s, self._used_s = time.monotonic(), time.thread_time()

    def share(self) -> float:
        """Return the share since the last call, or since this object was made."""
        called_s, used_s = self._called_s, self._used_s
        self._called_s, self._used_s = time.monotonic(), time.thread_time()
        return min(1.0, (self._used_s - used_s) / max(self._called_s - called_s, 1e-3))


def descendants(pids: Iterable[int]) -> list[int]:
    """Return these processes and their descendants, as far as they are alive."""
    found: list[int] = []
    for pid in pids:
        with suppress(OSError):
            tasks = [task.joinpath("children").read_text().split() for task in Path(f"/proc/{pid}/task").iterdir()]
            found += [pid, *descendants(int(child) for children in tasks for child in children)]
    return found


def _used_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[_UTIME]) + int(fields[_UTIME + 1])) / _TICKS_PER_S
