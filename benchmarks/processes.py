"""CPU time and memory of a system's processes, by part."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1024 * 1024

PARTS = {
    "VLLM::EngineCore": "engine core",
    "VLLM::Worker": "engine worker",
    "serving.audio.worker": "audio workers",
    "ray::ServeReplica": "replicas",
    "ray::Proxy": "proxy",
    "ray::HAProxy": "proxy",
    "haproxy": "proxy",
    "raylet": "Ray",
    "gcs_server": "Ray",
    "ray::": "Ray",
    "ray/": "Ray",
}
"""Part by a pattern in the command line; the first match counts. The root process of a family is its frontend."""

ENGINE = ("engine core", "engine worker")
"""Parts that run the model; all other parts are the cost of serving."""


@dataclass(frozen=True, slots=True)
class Family:
    """A process and all its descendants, daemons that detached (Ray's) included.

    Detached ones are recognised by `mark`, a NAME=value in the environment that they inherited.
    """

    root: psutil.Process
    mark: str

    def members(self) -> list[psutil.Process]:
        """Return the living processes, the root first."""
        children, found = defaultdict(list), {self.root.pid: self.root}
        marked = self.mark.encode()
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                children[process.ppid()].append(process)
                # Raw bytes, since psutil parses them: a process that sets its title may have overwritten some.
                if marked in Path(f"/proc/{process.pid}/environ").read_bytes():
                    found.setdefault(process.pid, process)
        unseen = list(found)
        while unseen:
            for child in children[unseen.pop()]:
                if child.pid not in found:
                    found[child.pid] = child
                    unseen.append(child.pid)
        return list(found.values())

    def by_part(self, figure: Callable[[psutil.Process], float]) -> dict[tuple[str, int], float]:
        """Return a figure of every process, by part and process id."""
        figures = {}
        for process in self.members():
            with suppress(psutil.Error):  # the process ended in the meantime
                figures[self.part(process), process.pid] = figure(process)
        return figures

    def part(self, process: psutil.Process) -> str:
        """Return the part of a member."""
        if process.pid == self.root.pid:
            return "frontend"
        command = " ".join(process.cmdline())
        return next((part for pattern, part in PARTS.items() if pattern in command), "other")


@dataclass(frozen=True, slots=True)
class Use:
    """CPU use during an interval."""

    wall_s: float
    cpu_s: dict[str, float]
    """CPU-seconds by part."""
    machine_cpu_s: float
    """CPU-seconds of all processes on the machine, those of this system included."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Accumulated CPU time at a moment."""

    at: float
    cpu_s: dict[tuple[str, int], float]
    machine_cpu_s: float

    @classmethod
    def of(cls, family: Family) -> Snapshot:
        """Read the counters of a family and of the machine."""
        cpu_s = family.by_part(_cpu_s)
        # The parent's counters include children that have ended, for example replaced audio workers.
        times = family.root.cpu_times()
        cpu_s["ended", 0] = times.children_user + times.children_system
        machine = psutil.cpu_times()
        busy_s = sum(machine) - machine.idle - machine.iowait - machine.guest
        return cls(time.perf_counter(), cpu_s, busy_s)

    def until(self, later: Snapshot) -> Use:
        """Return the use between this snapshot and `later`."""
        cpu_s: defaultdict[str, float] = defaultdict(float)
        for (part, pid), seconds in later.cpu_s.items():
            cpu_s[part] += seconds - self.cpu_s.get((part, pid), 0.0)
        used = {part: seconds for part, seconds in cpu_s.items() if seconds > 0}
        return Use(later.at - self.at, used, later.machine_cpu_s - self.machine_cpu_s)


def memory_mib(family: Family) -> dict[str, float]:
    """Return the proportional set size (shared pages divided among the processes that map them) by part, in MiB."""
    pss: defaultdict[str, float] = defaultdict(float)
    for (part, _), mib in family.by_part(lambda process: process.memory_full_info().pss / MIB).items():
        pss[part] += mib
    return dict(pss)


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
