"""CPU time: of other processes, as a counter that goes on when one of them ends; and the share of it a thread takes."""

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
"""Where user time stands in `/proc/PID/stat` after the name; system time follows."""


class CpuTime:
    """What processes have used, in seconds. Of one that has ended it keeps what was seen last.

    A process that has ended and was not waited for yet can still be seen: look before waiting, and nothing is missed.
    """

    def __init__(self) -> None:
        self._seen: dict[int, float] = {}
        self._ended_s = 0.0

    def look(self, pids: Iterable[int]) -> float:
        """What these, and all that were seen before, have used."""
        living = set()
        for pid in pids:
            with suppress(OSError, ValueError, IndexError):
                self._seen[pid] = max(self._seen.get(pid, 0.0), _used_s(pid))
                living.add(pid)
        for pid in self._seen.keys() - living:
            self._ended_s += self._seen.pop(pid)
        return self._ended_s + sum(self._seen.values())


class Busy:
    """How busy the thread that asks has been since it asked last, 0 to 1: at 1 its event loop keeps up no more."""

    def __init__(self) -> None:
        self._asked_s, self._used_s = time.monotonic(), time.thread_time()

    def share(self) -> float:
        """Since the last call, or since this was made."""
        before = self._asked_s, self._used_s
        self._asked_s, self._used_s = time.monotonic(), time.thread_time()
        return min(1.0, (self._used_s - before[1]) / max(self._asked_s - before[0], 1e-3))


def descendants(pids: Iterable[int]) -> list[int]:
    """These processes and all that they started, as far as they live."""
    found: list[int] = []
    for pid in pids:
        with suppress(OSError):
            tasks = [task.joinpath("children").read_text().split() for task in Path(f"/proc/{pid}/task").iterdir()]
            found += [pid, *descendants(int(child) for children in tasks for child in children)]
    return found


def _used_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[_UTIME]) + int(fields[_UTIME + 1])) / _TICKS_PER_S
