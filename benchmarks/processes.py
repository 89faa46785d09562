"""What a system's processes use: CPU time and memory, by the part that each process plays."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1024 * 1024

PARTS = {"VLLM::EngineCore": "engine core", "VLLM::Worker": "engine worker", "serving.audio.worker": "audio workers"}
"""Part by what stands in the process's command line. The first process of a tree is its front."""


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

    at: float = field(default_factory=time.perf_counter)
    cpu_s: dict[tuple[str, int], float] = field(default_factory=dict)
    machine_cpu_s: float = 0.0

    @classmethod
    def of(cls, root: psutil.Process) -> Snapshot:
        """Read the counters of a process, of all below it, and of the machine."""
        cpu_s = _by_process(root, _cpu_s)
        # Processes that have ended, audio workers that were replaced for example, live on in their parent's account.
        times = root.cpu_times()
        cpu_s["ended", 0] = times.children_user + times.children_system
        machine = psutil.cpu_times()
        return cls(cpu_s=cpu_s, machine_cpu_s=sum(machine) - machine.idle - machine.iowait - machine.guest)

    def until(self, later: Snapshot) -> Use:
        """What was used from here to `later`."""
        cpu_s: defaultdict[str, float] = defaultdict(float)
        for (part, pid), seconds in later.cpu_s.items():
            cpu_s[part] += seconds - self.cpu_s.get((part, pid), 0.0)
        used = {part: seconds for part, seconds in cpu_s.items() if seconds > 0}
        return Use(later.at - self.at, used, later.machine_cpu_s - self.machine_cpu_s)


def memory_mib(root: psutil.Process) -> dict[str, float]:
    """Proportional set size (shared pages divided among those who share them) by part."""
    pss: defaultdict[str, float] = defaultdict(float)
    for (part, _), mib in _by_process(root, lambda process: process.memory_full_info().pss / MIB).items():
        pss[part] += mib
    return dict(pss)


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _by_process(root: psutil.Process, figure: Callable[[psutil.Process], float]) -> dict[tuple[str, int], float]:
    found = {("front", root.pid): figure(root)}
    for process in root.children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            command = " ".join(process.cmdline())
            part = next((part for sign, part in PARTS.items() if sign in command), "other")
            found[part, process.pid] = figure(process)
    return found
