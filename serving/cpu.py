"""CPU time of other processes, as a counter that goes on when one of them ends."""

from __future__ import annotations

import os
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
