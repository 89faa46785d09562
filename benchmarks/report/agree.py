"""Agreement of two runs of the same comparison: the same ranking, and ratios within each other's intervals.

    python -m benchmarks.report.agree FIRST.json SECOND.json

Prints a table of every ratio; the exit status is 1 if a ratio disagrees. A ratio agrees if the intervals of both runs
overlap, and neither run is sure of the opposite of the other. A ratio that only one run has disagrees.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

from benchmarks.report.markdown import PAIRS, interval, ratios

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    Runs = Sequence[Mapping[str, Any]]


def compared(first: Runs, second: Runs) -> Iterator[tuple[str, str, str, str, bool]]:
    """Yield workload and pair, figure, each run's ratio as text, and whether the two agree."""
    by_workload = [
        {workload["name"]: workload["rounds"] for run in runs for workload in run["workloads"]}
        for runs in (first, second)
    ]
    for name in by_workload[0] | by_workload[1]:
        for above, below in PAIRS:
            rounds = [of.get(name, {}) for of in by_workload]
            found = [ratios(of[above], of[below]) if of.get(above) and of.get(below) else {} for of in rounds]
            for figure in found[0] | found[1]:
                if not all(figure in of for of in found):
                    in_first, in_second = ("there" if figure in of else "not measured" for of in found)
                    yield f"{name}: {above} ÷ {below}", figure, in_first, in_second, False
                    continue
                spans = [interval(of[figure]) for of in found]
                first_text, second_text = (
                    f"{geometric_mean(of[figure]):.2f} ({low:.2f} to {high:.2f})"
                    for of, (low, high) in zip(found, spans, strict=True)
                )
                overlap = max(low for low, _ in spans) <= min(high for _, high in spans)
                opposite = any(spans[i][0] > 1 > spans[1 - i][1] for i in (0, 1))
                yield f"{name}: {above} ÷ {below}", figure, first_text, second_text, overlap and not opposite


def main() -> None:
    """Print the table."""
    runs = [json.loads(Path(path).read_text()) for path in sys.argv[1:3]]
    if len(runs) < 2 or not all(isinstance(of, list) and all("workloads" in run for run in of) for of in runs):
        sys.exit("two files of `python -m benchmarks.compare` are required: FIRST.json SECOND.json")
    rows = list(compared(*runs))
    if not rows:
        sys.exit("the two files have no ratios: no workload has a pair of compared systems")
    print("| | | first | second | |\n| --- | --- | --- | --- | --- |")
    for pair, figure, first, second, agree in rows:
        print(f"| {pair} | {figure} | {first} | {second} | {'agree' if agree else '**disagree**'} |")
    apart = sum(not agree for *_, agree in rows)
    print(f"\n{len(rows) - apart} of {len(rows)} agree.")
    sys.exit(apart > 0)


if __name__ == "__main__":
    main()
