"""CPU and latency by the flush interval of streams (`stream_flush_interval_s`), one service for each interval.

    python -m benchmarks.compare.flush_interval [--intervals 0 0.05 0.2] [--out FILE.json]

All services are loaded, each with the real engine; they work in turn, on the same clips within a round and on new clips
in each round. Prints a table: the median of the rounds, with least and greatest.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.compare.comparison import WARM_UP, warm_up_clips
from benchmarks.compare.systems import Captioner, Round, Setup
from benchmarks.conditions import conditions
from benchmarks.load.clips import alike, make
from benchmarks.program import CHECKPOINT, CLIPS, option_parser, write_json
from benchmarks.report.markdown import spread, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Flushing(Captioner):
    """This service with a flush interval."""

    def __init__(self, setup: Setup, interval_s: float) -> None:
        super().__init__(setup)
        self._interval_s = interval_s

    @property
    def command(self) -> Sequence[str]:
        return [*super().command, f"--stream-flush-interval-s={self._interval_s}"]


def main() -> None:
    """Measure, and print a table."""
    parser = option_parser(__doc__)
    parser.add_argument("--intervals", type=float, nargs="+", default=[0, 0.05, 0.2], help="seconds")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--requests", type=int, default=48, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="path of the JSON")
    options = parser.parse_args()
    clips = alike(CLIPS / "30s", options.requests * options.rounds, 30)
    make(clips)
    warm_up = warm_up_clips()
    setup = Setup(CHECKPOINT, 256, 64)
    found: dict[float, list[dict[str, float]]] = {interval_s: [] for interval_s in options.intervals}
    with ExitStack() as stack:
        services = {interval_s: stack.enter_context(Flushing(setup, interval_s)) for interval_s in options.intervals}
        for service in services.values():
            service.measure(warm_up, WARM_UP)
        for number in range(options.rounds):
            of_round = clips[number * options.requests : (number + 1) * options.requests]
            turns = options.intervals[number % len(found) :] + options.intervals[: number % len(found)]
            for interval_s in turns:
                found[interval_s].append(figures(services[interval_s].measure(of_round, options.concurrency)))
                print(interval_s, found[interval_s][-1], flush=True)
    print(to_table(found))
    if options.out:
        write_json(options.out, {"conditions": conditions(), "options": vars(options), "found": found})


def figures(one: Round) -> dict[str, float]:
    """Return the compared figures of one round."""
    return {
        "requests/s": one.requests / one.wall_s,
        "frontend, CPU ms a request": 1000 * one.use.cpu_s["frontend"] / one.requests,
        "engine, CPU ms a request": 1000 * one.use.cpu_s["engine core"] / one.requests,
        "TTFT p50, ms": 1000 * median(answer.ttft_s for answer in one.answers if answer.ttft_s is not None),
        "E2E p50, s": median(answer.e2e_s for answer in one.answers),
    }


def to_table(found: Mapping[float, Sequence[Mapping[str, float]]]) -> str:
    """Return a Markdown table with a column for each interval."""
    names = next(iter(found.values()))[0]
    rows = [[name, *(spread([one[name] for one in rounds], 2) for rounds in found.values())] for name in names]
    return table(["", *(f"{1000 * interval_s:g} ms" for interval_s in found)], rows)


if __name__ == "__main__":
    main()
