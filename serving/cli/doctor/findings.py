"""Findings of `captioner doctor`, and probes that have a deadline each."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


class Level(StrEnum):
    """Weight of a finding. With an error the service does not start, or does not do what is configured."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """One statement about the machine. `remedy` is empty for `ok`."""

    probe: str
    level: Level
    message: str
    remedy: str = ""


def ok(probe: str, message: str) -> Finding:
    """Return a finding that needs no action."""
    return Finding(probe, Level.OK, message)


def warning(probe: str, message: str, remedy: str) -> Finding:
    """Return a finding with which the service starts."""
    return Finding(probe, Level.WARNING, message, remedy)


def error(probe: str, message: str, remedy: str) -> Finding:
    """Return a finding that fails `captioner doctor`."""
    return Finding(probe, Level.ERROR, message, remedy)


@dataclass(frozen=True, slots=True)
class Probe:
    """A function that yields findings. It may block: it is given up after the deadline."""

    name: str
    run: Callable[[], Iterable[Finding]]


def run_all(probes: Sequence[Probe], deadline_s: float) -> list[Finding]:
    """Run all probes at the same time; return their findings in the order of the probes.

    A probe that has not returned after `deadline_s` is a finding itself; its thread does not hold up the exit.
    """
    results: list[queue.SimpleQueue[list[Finding]]] = []
    for probe in probes:
        result: queue.SimpleQueue[list[Finding]] = queue.SimpleQueue()
        threading.Thread(target=_run, args=(probe, result), name=f"doctor-{probe.name}", daemon=True).start()
        results.append(result)
    ends_s = time.monotonic() + deadline_s
    found: list[Finding] = []
    for probe, result in zip(probes, results, strict=True):
        try:
            found += result.get(timeout=max(0.0, ends_s - time.monotonic()))
        except queue.Empty:
            message = f"no answer within {deadline_s:g} s"
            found.append(error(probe.name, message, "look at the disk, the driver or the network that it uses"))
    return found


def _run(probe: Probe, result: queue.SimpleQueue[list[Finding]]) -> None:
    found: list[Finding] = []
    try:
        found.extend(probe.run())
    except Exception as failure:  # noqa: BLE001 - one probe must not hide the findings of the others
        # The message of an unexpected exception may have a secret; its type has none.
        found.append(warning(probe.name, f"the probe failed: {type(failure).__name__}", "report this as a bug"))
    result.put(found)
