"""Runs of a target over many inputs: which inputs break a promise, take too long, or let memory grow."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import psutil

from tests.audio.isolation import isolated
from tests.hardening.mutation import mutated
from tests.hardening.targets import TARGETS

if TYPE_CHECKING:
    from collections.abc import Iterator

CORPUS = Path(__file__).parent / "corpus"
"""Inputs that once broke a promise, by target: each is tried in every test run."""

HANG_S = 2.0
"""CPU time above which an input counts as a hang."""

MAX_GROWTH_BYTES = 64 * 1024 * 1024
"""Memory that a run may gain after its first fifth, which fills caches."""

_BATCH = 500


@dataclass(slots=True)
class Result:
    """Result of a run: the broken promises by the number of their input."""

    inputs: int
    faults: dict[int, str] = field(default_factory=dict)
    slowest_s: float = 0.0
    grown_bytes: int = 0


def made(target: str, number: int, seeds: list[bytes]) -> bytes:
    """Return the input with that number."""
    random = Random(f"{target}-{number}")
    return mutated(seeds[number % len(seeds)], random)


def run(target: str, numbers: range) -> Result:
    """Try the inputs with these numbers in this process, or in others if they may end it."""
    result = Result(len(numbers))
    process, before = psutil.Process(), 0
    for batch in _batches(numbers):
        part = _isolated_part(target, batch) if TARGETS[target].isolated else _part(target, batch)
        result.faults |= part.faults
        result.slowest_s = max(result.slowest_s, part.slowest_s)
        if not before and batch.start - numbers.start >= len(numbers) // 5:
            before = process.memory_info().rss
    result.grown_bytes = process.memory_info().rss - (before or process.memory_info().rss)
    return result


def _batches(numbers: range) -> Iterator[range]:
    for start in range(0, len(numbers), _BATCH):
        yield numbers[start : start + _BATCH]


def _isolated_part(target: str, numbers: range) -> Result:
    """Try the inputs in another process. If that dies, the inputs are tried by halves."""
    try:
        part: Result = isolated(_part, target, numbers)
    except ProcessLookupError as death:
        if len(numbers) == 1:
            return Result(1, {numbers[0]: str(death)})
        middle = len(numbers) // 2
        one, two = (_isolated_part(target, half) for half in (numbers[:middle], numbers[middle:]))
        return Result(len(numbers), one.faults | two.faults, max(one.slowest_s, two.slowest_s))
    return part


def _part(target: str, numbers: range) -> Result:
    result, seeds = Result(len(numbers)), TARGETS[target].seeds()
    for number in numbers:
        began = time.thread_time()
        problem = fault(target, made(target, number, seeds))
        took_s = time.thread_time() - began
        result.slowest_s = max(result.slowest_s, took_s)
        if problem or took_s > HANG_S:
            result.faults[number] = problem or f"took {took_s:.1f} s"
    return result


def fault(target: str, data: bytes) -> str:
    """Return the broken promise, or an empty string."""
    try:
        TARGETS[target].check(data)
    except Exception as problem:  # noqa: BLE001 - this is what must not be
        return repr(problem)
    return ""
