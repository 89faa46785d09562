"""What a system's processes use: CPU time and memory, by the part that each process plays."""

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
"""Part by the first sign that stands in the process's command line. The first process of a family is its frontend."""

ENGINE = ("engine core", "engine worker")
"""Parts that run the model. All others are what serving it costs."""


@dataclass(frozen=True, slots=True)
class Family:
    """A process and all that came of it, also those that were adopted away, as Ray's daemons are.

    Those are known by a word in the environment that they inherited.
    """

    root: psutil.Process
    mark: str

    def members(self) -> list[psutil.Process]:
        """The processes that are there now; the root first."""
        children, found = defaultdict(list), {self.root.pid: self.root}
        marked = self.mark.encode()
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                children[process.ppid()].append(process)
                # Not by psutil, which takes it apart: a process that sets its title may have overwritten some of it.
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
        """A figure of every process, by part and process id."""
        figures = {}
        for process in self.members():
            with suppress(psutil.Error):  # it has ended meanwhile
                figures[self.part(process), process.pid] = figure(process)
        return figures

    def part(self, process: psutil.Process) -> str:
        """The part that a member plays."""
        if process.pid == self.root.pid:
            return "frontend"
        command = " ".join(process.cmdline())
        return next((part for sign, part in PARTS.items() if sign in command), "other")


@dataclass(frozen=True, slots=True)
class Use:
    """What was used over a stretch of time."""

    wall_s: float
    cpu_s: dict[str, float]
    """CPU-seconds by part."""
    machine_cpu_s: float
    """CPU-seconds of everything on the machine, this system and others."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """CPU time so far."""

    at: float
    cpu_s: dict[tuple[str, int], float]
    machine_cpu_s: float

    @classmethod
    def of(cls, family: Family) -> Snapshot:
        """Read the counters of a family and of the machine."""
        cpu_s = family.by_part(_cpu_s)
        # Processes that have ended, audio workers that were replaced for example, live on in their parent's account.
        times = family.root.cpu_times()
        cpu_s["ended", 0] = times.children_user + times.children_system
        machine = psutil.cpu_times()
        busy_s = sum(machine) - machine.idle - machine.iowait - machine.guest
        return cls(time.perf_counter(), cpu_s, busy_s)

    def until(self, later: Snapshot) -> Use:
        """What was used from here to `later`."""
        cpu_s: defaultdict[str, float] = defaultdict(float)
        for (part, pid), seconds in later.cpu_s.items():
            cpu_s[part] += seconds - self.cpu_s.get((part, pid), 0.0)
        used = {part: seconds for part, seconds in cpu_s.items() if seconds > 0}
        return Use(later.at - self.at, used, later.machine_cpu_s - self.machine_cpu_s)


def memory_mib(family: Family) -> dict[str, float]:
    """Proportional set size (shared pages divided among those who share them) by part."""
    pss: defaultdict[str, float] = defaultdict(float)
    for (part, _), mib in family.by_part(lambda process: process.memory_full_info().pss / MIB).items():
        pss[part] += mib
    return dict(pss)


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
