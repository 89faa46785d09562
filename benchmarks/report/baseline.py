"""Whether a run of the suite is worse than a kept one.

On the machine of the kept run, throughput and latencies are compared as they are. On another machine only what does not
depend on its speed: how throughput and latencies grow from the least load on, and what all but the engine costs in CPU
beside the engine.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from processes import ENGINE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Point = Mapping[str, Any]

FIGURES: dict[str, Callable[[Point], float | None]] = {
    "seconds for a second of audio": lambda of: 1 / of["audio_s_per_s"],
    "p95 of TTFT": lambda of: of["ttft_s"]["p95"] if "ttft_s" in of else None,
    "p95 of E2E": lambda of: of["e2e_s"]["p95"],
}
"""Of all of them less is better."""


SETTINGS = ("machine", "software", "seconds of each run", "options of the load", "commands")


def differences(found: Mapping[str, Any], kept: Mapping[str, Any]) -> list[str]:
    """What was otherwise in the kept run, in words: a reader must know before trusting a comparison."""
    pairs = {name: [_settled(run["conditions"].get(name)) for run in (kept, found)] for name in SETTINGS}
    pairs["the SLO's TTFT, s"] = [_settled(run.get("slo_ttft_s")) for run in (kept, found)]
    return [f"not as in the kept run: {name} was {was}, is {now}" for name, (was, now) in pairs.items() if was != now]


def _settled(value: object) -> str:
    """The value without ports and directories, which are others in every run."""
    return re.sub(r"--port=\d+|\$TMPDIR/[\w-]+", "…", str(value))


def breaches(found: Mapping[str, Any], kept: Mapping[str, Any], tolerance: float) -> list[str]:
    """What is worse than in the kept run by more than `tolerance` (0.25 is a quarter), in words.

    A figure counts as worse only if also the best of its rounds is worse than the worst one kept: what the machine's
    moods make of one and the same code lies within the rounds. A load of the kept run that is missing is a breach, and
    so is an SLO that was met and is not any more. Raises `ValueError` if the runs are of different loads altogether.
    """
    before = {one["load"]: one for one in kept["sweep"]}
    now = {one["load"]: one for one in found["sweep"]}
    if not before.keys() & now.keys():
        raise ValueError("the baseline has none of these loads")
    same_machine = kept["conditions"]["machine"] == found["conditions"]["machine"]
    answered = {load for load in before.keys() & now.keys() if before[load]["right"] and now[load]["right"]}
    least = min(answered, default=0.0)
    told = [] if same_machine or len(answered) > 1 else ["one load of another machine tells nothing"]
    for load, base in before.items():
        if load not in now:
            told.append(f"load {load:g}: was not measured")
        elif base["right"] and not now[load]["right"]:
            told.append(f"load {load:g}: no right answer any more")
        elif base["right"]:
            if same_machine and base["meets_slo"] and not now[load]["meets_slo"]:
                told.append(f"load {load:g}: the SLO is not met any more")
            ours, theirs = (_figures(of[load], None if same_machine else of[least]) for of in (now, before))
            told += [
                f"load {load:g}: {name} is {ratio:.2f} times what it was"
                for name in theirs
                if (ratio := _worse(ours.get(name), theirs[name])) > 1 + tolerance
            ]
    return told


def _figures(point: Point, least: Point | None) -> dict[str, list[float]]:
    """Each figure of every round; in units of the least load's, if that is given."""
    rounds = [one for one in point.get("rounds", [point]) if one["right"]]
    found: dict[str, list[float]] = {}
    for name, figure in FIGURES.items():
        values = [value for one in rounds if (value := figure(one)) is not None]
        if values and least is None:
            found[name] = values
        elif values and least is not None and point is not least and (unit := figure(least)):
            found[f"{name} beside the least load's"] = [value / unit for value in values]
    shares = [share for one in rounds if (share := _service_share(one)) is not None]
    return found | ({"CPU of all but the engine beside the engine's": shares} if shares else {})


def _service_share(point: Point) -> float | None:
    cpu = point.get("cpu_s_per_audio_hour")
    engine = sum(cpu.get(part, 0.0) for part in ENGINE) if cpu else 0.0
    return (sum(cpu.values()) - engine) / engine if cpu and engine else None


def _worse(now: Sequence[float] | None, before: Sequence[float]) -> float:
    """How many times worse, by the medians; 1 while the rounds of both overlap."""
    if not now or min(now) <= max(before):
        return 1.0 if now else float("inf")
    return sorted(now)[len(now) // 2] / sorted(before)[len(before) // 2]
