"""Comparison of a run of the suite with a kept one (`python -m benchmarks.suite all --check KEPT.json`).

On the machine of the kept run, throughput and latencies are compared directly. On another machine only figures that do
not depend on its speed are compared: the growth of throughput and latencies from the least load on, and the CPU of all
but the engine in relation to the engine's.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from benchmarks.processes import ENGINE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Point = Mapping[str, Any]

FIGURES: dict[str, Callable[[Point], float | None]] = {
    "seconds for a second of audio": lambda of: 1 / of["audio_s_per_s"],
    "p95 of TTFT": lambda of: of["ttft_s"]["p95"] if "ttft_s" in of else None,
    "p95 of E2E": lambda of: of["e2e_s"]["p95"],
}
"""Compared figures; for each, less is better."""


SETTINGS = ("machine", "software", "seconds of each run", "options of the load", "commands")


def differences(found: Mapping[str, Any], kept: Mapping[str, Any]) -> list[str]:
    """Return the differences of conditions, in words: a reader must know them before trusting the comparison."""
    pairs = {name: [_portable(run["conditions"].get(name)) for run in (kept, found)] for name in SETTINGS}
    pairs["the SLO's TTFT, s"] = [_portable(run.get("slo_ttft_s")) for run in (kept, found)]
    return [f"not as in the kept run: {name} was {was}, is {now}" for name, (was, now) in pairs.items() if was != now]


def _portable(value: object) -> str:
    """Return the value without ports and directories, which differ in every run."""
    return re.sub(r"--port=\d+|\$TMPDIR/[\w-]+", "…", str(value))


def breaches(found: Mapping[str, Any], kept: Mapping[str, Any], tolerance: float) -> list[str]:
    """Return what is worse than in the kept run by more than `tolerance` (0.25 is a quarter), in words.

    A figure is worse only if the best of its rounds is worse than the worst kept round: variations of the machine's
    speed with the same code are within the rounds. A missing load of the kept run is a breach, and so is an SLO that
    was met and is not any more. Raises `ValueError` if the runs have no load in common.
    """
    before = {one["load"]: one for one in kept["sweep"]}
    now = {one["load"]: one for one in found["sweep"]}
    if not before.keys() & now.keys():
        raise ValueError(f"the baseline has none of these loads: {sorted(now)}")
    same_machine = kept["conditions"]["machine"] == found["conditions"]["machine"]
    answered = {load for load in before.keys() & now.keys() if before[load]["right"] and now[load]["right"]}
    least = min(answered, default=0.0)
    broken = [] if same_machine or len(answered) > 1 else ["one load of another machine proves nothing"]
    for load, base in before.items():
        if load not in now:
            broken.append(f"load {load:g}: was not measured")
        elif base["right"] and not now[load]["right"]:
            broken.append(f"load {load:g}: no right answer any more")
        elif base["right"]:
            if same_machine and base["meets_slo"] and not now[load]["meets_slo"]:
                broken.append(f"load {load:g}: the SLO is not met any more")
            new, old = (_figures(of[load], None if same_machine else of[least]) for of in (now, before))
            broken += [
                f"load {load:g}: {name} is {ratio:.2f} times what it was"
                for name in old
                if (ratio := _worse(new.get(name), old[name])) > 1 + tolerance
            ]
    return broken


def _figures(point: Point, least: Point | None) -> dict[str, list[float]]:
    """Return each figure of every round; in units of the least load's figure, if that is given."""
    rounds = [one for one in point.get("rounds", [point]) if one["right"]]
    found: dict[str, list[float]] = {}
    for name, figure in FIGURES.items():
        values = [value for one in rounds if (value := figure(one)) is not None]
        if values and least is None:
            found[name] = values
        elif values and least is not None and point is not least and (unit := figure(least)):
            found[f"{name} ÷ the least load's"] = [value / unit for value in values]
    shares = [share for one in rounds if (share := _service_share(one)) is not None]
    return found | ({"CPU of all but the engine ÷ the engine's": shares} if shares else {})


def _service_share(point: Point) -> float | None:
    cpu = point.get("cpu_s_per_audio_hour")
    engine = sum(cpu.get(part, 0.0) for part in ENGINE) if cpu else 0.0
    return (sum(cpu.values()) - engine) / engine if cpu and engine else None


def _worse(now: Sequence[float] | None, before: Sequence[float]) -> float:
    """Return the ratio of the medians; 1 if the rounds of both overlap."""
    if not now or min(now) <= max(before):
        return 1.0 if now else float("inf")
    return sorted(now)[len(now) // 2] / sorted(before)[len(before) // 2]
