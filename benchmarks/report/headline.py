"""README's table of speed: the range over every kept run, so that no run is chosen.

    python -m benchmarks.report.headline

Prints Markdown. A cell is the least and the greatest of the runs' medians of ratios, each ratio taken within one round;
a run is one file `benchmarks/results/comparison*.json`. `tests/benchmarks/test_headline.py` holds README to it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.report.markdown import ENGINE_CPU, SERVICE_CPU, ratios, table

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

RESULTS = Path(__file__).parents[1] / "results"

FIGURES = {
    "requests/s": "requests/s",
    "TTFT p50, s": "TTFT p50",
    "TTFT p95, s": "TTFT p95",
    SERVICE_CPU: "CPU of everything but the engine",
    ENGINE_CPU: "CPU of the engine",
}

PAIRS = (
    ("captioner", "vllm serve"),
    ("captioner", "vllm serve, allocator"),
    ("captioner, no CPU kernels", "vllm serve"),
    ("captioner, no CPU kernels", "vllm serve, allocator"),
    ("captioner cluster", "ray.serve.llm"),
)

_WORKLOADS = {
    "30 s MP3, 48 kHz stereo, 16 requests at a time": "16 at a time",
    "30 s MP3, 48 kHz stereo, 64 requests at a time": "64 at a time",
    "1 s to 10 min, six kinds of file, 16 requests at a time": "mixed lengths, 16 at a time",
}

_COMPILED = "--no-enforce-eager"


def kept() -> list[Mapping[str, Any]]:
    """Return every kept run of the comparison, in the order of the files' names."""
    return [run for path in sorted(RESULTS.glob("comparison*.json")) for run in json.loads(path.read_text())]


def headline(runs: Iterable[Mapping[str, Any]]) -> str:
    """Return the table: a row for each pair, workload and compiler setting that a run has."""
    medians: dict[tuple[int, str, bool], list[Mapping[str, float]]] = defaultdict(list)
    for run in runs:
        compiled = any(_COMPILED in command for command in run["conditions"]["commands"].values())
        for workload in run["workloads"]:
            rounds = workload["rounds"]
            for number, (above, below) in enumerate(PAIRS):
                if above in rounds and below in rounds:
                    found = ratios(rounds[above], rounds[below])
                    key = number, _WORKLOADS[workload["name"]], compiled
                    medians[key].append({figure: median(values) for figure, values in found.items()})
    workloads = [*_WORKLOADS.values()]
    order = sorted(medians, key=lambda key: (key[0], workloads.index(key[1]), key[2]))
    rows = []
    for key in order:
        (above, below), workload, compiled = PAIRS[key[0]], key[1], key[2]
        name = f"{above} ÷ `{below}`, {workload}{', compiled' if compiled else ''}"
        rows.append([name, str(len(medians[key])), *(_range(medians[key], figure) for figure in FIGURES)])
    return table(["", "runs", *FIGURES.values()], rows)


def _range(runs: Iterable[Mapping[str, float]], figure: str) -> str:
    values = [run[figure] for run in runs]
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


if __name__ == "__main__":
    print(headline(kept()))
