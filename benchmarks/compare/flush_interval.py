"""What the hand-over interval costs and saves: `python benchmarks/handover.py [--intervals 0 0.05 0.2] [--out FILE]`.

One service for each interval, all loaded, each with the real engine; they work in turn, on the same clips within a
round and on new ones in each. Told is the median of the rounds, with least and greatest.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from clips import alike, make
from compare import CLIPS, ROOT, WARM_UP
from conditions import conditions
from report import spread, table
from systems import Captioner, Round, Setup

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Paced(Captioner):
    """This service with a hand-over interval."""

    def __init__(self, setup: Setup, interval_s: float) -> None:
        super().__init__(setup)
        self._interval_s = interval_s

    @property
    def command(self) -> list[str]:
        return [*super().command, f"--stream-flush-interval-s={self._interval_s}"]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--intervals", type=float, nargs="+", default=[0, 0.05, 0.2], help="seconds")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--requests", type=int, default=48, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where to write JSON")
    options = parser.parse_args()
    clips = alike(CLIPS / "30s", options.requests * options.rounds, 30)
    warm_up = alike(CLIPS / "warm-up", WARM_UP, 20)
    make([*clips, *warm_up])
    setup = Setup(ROOT / "serving/embedded/checkpoint", 256, 64)
    found: dict[float, list[dict[str, float]]] = {interval_s: [] for interval_s in options.intervals}
    with ExitStack() as stack:
        services = {interval_s: stack.enter_context(Paced(setup, interval_s)) for interval_s in options.intervals}
        for service in services.values():
            service.measure(warm_up, WARM_UP)
        for number in range(options.rounds):
            of_round = clips[number * options.requests : (number + 1) * options.requests]
            turns = options.intervals[number % len(found) :] + options.intervals[: number % len(found)]
            for interval_s in turns:
                found[interval_s].append(figures(services[interval_s].measure(of_round, options.concurrency)))
                print(interval_s, found[interval_s][-1], flush=True)
    print(told(found))
    if options.out:
        results = {"conditions": conditions(ROOT), "options": vars(options), "found": found}
        options.out.write_text(json.dumps(results, indent=1, default=str) + "\n")


def figures(one: Round) -> dict[str, float]:
    """What is compared."""
    return {
        "requests/s": one.requests / one.wall_s,
        "frontend, CPU ms a request": 1000 * one.use.cpu_s["frontend"] / one.requests,
        "engine, CPU ms a request": 1000 * one.use.cpu_s["engine core"] / one.requests,
        "TTFT p50, ms": 1000 * median(answer.ttft_s for answer in one.answers if answer.ttft_s is not None),
        "E2E p50, s": median(answer.e2e_s for answer in one.answers),
    }


def told(found: Mapping[float, Sequence[Mapping[str, float]]]) -> str:
    """The table: a column for each interval."""
    names = next(iter(found.values()))[0]
    rows = [[name, *(spread([one[name] for one in rounds], 2) for rounds in found.values())] for name in names]
    return table(["", *(f"{1000 * interval_s:g} ms" for interval_s in found)], rows)


if __name__ == "__main__":
    main()
