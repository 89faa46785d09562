"""Markdown reports of comparisons.

    python -m benchmarks.report.markdown FILE.json …

Prints one report of the runs of all files. A file is a list of runs; a run has `title`, `conditions` and `workloads`; a
workload has `name` and `rounds`, by system, in time order; a round has the fields that `compare/comparison.py` writes.
"""

from __future__ import annotations

import json
import sys
from itertools import chain
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import stdtrit

from benchmarks.processes import ENGINE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Rounds = Mapping[str, Sequence[Mapping[str, Any]]]
    """Rounds by system."""

SERVICE_CPU, ENGINE_CPU = "CPU ms per request, all but the engine", "CPU ms per request, engine"
DIGITS = {"requests/s": 2, "audio-s/s": 0, SERVICE_CPU: 0, ENGINE_CPU: 0, "memory, MiB": 0}

PAIRS = (
    ("captioner", "vllm serve"),
    ("captioner", "vllm serve, allocator"),
    ("captioner", "vllm serve, defaults"),
    ("captioner, no CPU kernels", "vllm serve"),
    ("captioner, no CPU kernels", "vllm serve, allocator"),
    ("captioner", "offline engine"),
    ("captioner cluster", "captioner"),
    ("captioner cluster", "vllm serve"),
    ("captioner cluster", "ray.serve.llm"),
    ("captioner cluster", "ray.serve.llm, HAProxy"),
    ("captioner", "ray.serve.llm"),
    ("captioner", "ray.serve.llm, HAProxy"),
)
"""Pairs of systems whose ratios are reported if a run has both."""


def figures(one: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of one round, by name; without latencies if nothing was streamed."""
    cpu_ms = {part: seconds * 1000 / one["requests"] for part, seconds in one["cpu_s"].items()}
    found = {"requests/s": one["requests"] / one["wall_s"], "audio-s/s": one["audio_s"] / one["wall_s"]}
    for name in ("ttft", "e2e"):
        if values := one[f"{name}_s"]:
            found |= {f"{name.upper()} p{at}, s": float(np.percentile(values, at)) for at in (50, 95)}
    found[SERVICE_CPU] = sum(ms for part, ms in cpu_ms.items() if part not in ENGINE)
    found[ENGINE_CPU] = sum(ms for part, ms in cpu_ms.items() if part in ENGINE)
    found["memory, MiB"] = sum(one["memory_mib"].values())
    return found


def ratios(above: Sequence[Mapping[str, Any]], below: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return each figure of one system divided by another's, round by round; only figures that both have."""
    pairs = [(figures(a), figures(b)) for a, b in zip(above, below, strict=True)]
    shared = [key for key in pairs[0][0] if key in pairs[0][1]]
    return {key: [a[key] / b[key] for a, b in pairs] for key in shared}


def to_markdown(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the report."""
    return "\n\n".join(chain.from_iterable(_run(run) for run in runs)) + "\n"


def _run(run: Mapping[str, Any]) -> list[str]:
    commands = run["conditions"]["commands"].items()
    parts = [
        f"## {run['title']}",
        "\n".join(f"- {name}: {plain(value)}" for name, value in run["conditions"].items() if name != "commands"),
        "```sh\n" + "\n".join(f"# {name}\n{command}" for name, command in commands) + "\n```",
    ]
    for workload in run["workloads"]:
        rounds = workload["rounds"]
        parts += [
            f"### {workload['name']}",
            "Median of the rounds (least to greatest):",
            _figures(rounds),
            "CPU, ms per request, by process (median of the rounds):",
            _by_part(rounds, lambda one, part: one["cpu_s"].get(part, 0) * 1000 / one["requests"]),
            "Memory at the end of a round, MiB (proportional set size):",
            _by_part(rounds, lambda one, part: one["memory_mib"].get(part, 0)),
            "Ratios, each taken within one round, median (least to greatest) [95 % interval by Student's t]:",
            _ratios(rounds),
            _noise(rounds),
        ]
    return parts


def plain(value: object) -> str:
    """Return a condition as text; a mapping as `name value; …`."""
    return "; ".join(f"{name} {of}" for name, of in value.items()) if isinstance(value, dict) else str(value)


def _figures(rounds: Rounds) -> str:
    by_system = {name: [figures(one) for one in of_system] for name, of_system in rounds.items()}
    keys = list(dict.fromkeys(key for each in by_system.values() for key in each[0]))
    rows = [
        [
            key,
            *(
                spread([of[key] for of in each], DIGITS.get(key, 2)) if key in each[0] else "-"
                for each in by_system.values()
            ),
        ]
        for key in keys
    ]
    return table(["", *by_system], rows)


def _by_part(rounds: Rounds, figure: Any) -> str:
    parts = list(
        dict.fromkeys(part for of_system in rounds.values() for one in of_system for part in one["memory_mib"])
    )
    rows = []
    for name, of_system in rounds.items():
        row = [median(figure(one, part) for one in of_system) for part in parts]
        rows.append([name, *(f"{value:.0f}" if value else "-" for value in row), f"{sum(row):.0f}"])
    return table(["", *parts, "all"], rows)


def _ratios(rounds: Rounds) -> str:
    found = {f"{a} ÷ {b}": ratios(rounds[a], rounds[b]) for a, b in PAIRS if a in rounds and b in rounds}
    keys = dict.fromkeys(key for by_key in found.values() for key in by_key)
    rows = [[key, *(_ratio(by_key[key]) if key in by_key else "-" for by_key in found.values())] for key in keys]
    return table(["", *found], rows)


def _ratio(values: Sequence[float]) -> str:
    low, high = interval(values)
    return f"{spread(values, 2)} [{low:.2f} to {high:.2f}]"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the geometric mean over rounds, by Student's t on the logarithms; one round as it is.

    A bootstrap of three rounds is far too narrow: by it, two runs of one comparison did not agree.
    """
    logs = np.log(np.maximum(values, 1e-12))
    if len(logs) < 2:
        return float(values[0]), float(values[0])
    half = float(stdtrit(len(logs) - 1, 0.975) * logs.std(ddof=1) / np.sqrt(len(logs)))
    return float(np.exp(logs.mean() - half)), float(np.exp(logs.mean() + half))


def _noise(rounds: Rounds) -> str:
    every = [one for of_system in rounds.values() for one in of_system]
    own = [one["load_generator_cpu_s"] / one["wall_s"] for one in every]
    others = [
        (one["machine_cpu_s"] - sum(one["cpu_s"].values()) - one["load_generator_cpu_s"]) / one["wall_s"]
        for one in every
    ]
    return (
        f"Cores that the load generator took: {spread(own, 2)}. Cores that everything else on the machine took "
        f"meanwhile, the waiting systems among it: {spread(others, 2)}."
    )


def spread(values: Sequence[float], digits: int) -> str:
    """Return the median, with least and greatest, as text."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(to_markdown([run for path in sys.argv[1:] for run in json.loads(Path(path).read_text())]))
