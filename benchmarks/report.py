"""From rounds to a table that a person reads (Markdown) and to figures that a program reads (JSON)."""

from __future__ import annotations

from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from systems import Round

    Rounds = Mapping[str, Sequence[Round]]
    """System → its rounds, in time order."""
    Results = Mapping[int, Rounds]
    """Concurrency → the rounds at it."""

PERCENTILES = (50, 95, 99)


def figures(one: Round, clip_s: int) -> dict[str, float]:
    """The figures of one round, by name. Latencies are missing where there is no stream."""
    audio_h = one.requests * clip_s / 3600
    found = {
        "requests/s": one.requests / one.wall_s,
        "audio-s/s": one.requests * clip_s / one.wall_s,
    }
    for name, values in latencies([one]).items():
        found |= {f"{name} p{at}, s": float(np.percentile(values, at)) for at in PERCENTILES}
    for part, cpu_s in one.use.cpu_s.items():
        found[f"CPU-s per audio-hour, {part}"] = cpu_s / audio_h
    found["CPU-s per audio-hour, all"] = sum(one.use.cpu_s.values()) / audio_h
    found["memory, MiB"] = sum(one.memory_mib.values())
    return found


def latencies(rounds: Iterable[Round]) -> dict[str, list[float]]:
    """TTFT and E2E of every request."""
    answers = [answer for one in rounds for answer in one.answers]
    return {"TTFT": [a.ttft_s for a in answers], "E2E": [a.e2e_s for a in answers]} if answers else {}


def to_json(conditions: Mapping[str, Any], results: Results, clip_s: int) -> dict[str, Any]:
    """Everything that was measured."""
    return {
        "conditions": conditions,
        "results": [
            {
                "concurrency": concurrency,
                "ratios": ratios(rounds, clip_s),
                "systems": {name: [_round(one, clip_s) for one in of_system] for name, of_system in rounds.items()},
            }
            for concurrency, rounds in results.items()
        ],
    }


def _round(one: Round, clip_s: int) -> dict[str, Any]:
    seconds = {name: [round(value, 3) for value in values] for name, values in latencies([one]).items()}
    return {"figures": figures(one, clip_s), **asdict(one), "answers": seconds}


def to_markdown(conditions: Mapping[str, Any], results: Results, clip_s: int) -> str:
    """The report."""
    parts = ["# Comparison", *_conditions(conditions)]
    for concurrency, rounds in results.items():
        parts += [
            f"## {concurrency} requests at a time",
            "Median of the rounds (least to greatest). Percentiles are over the requests of all rounds.",
            _throughput(rounds, clip_s),
            _latency(rounds),
            "CPU-seconds per hour of audio, by process:",
            _by_part(rounds, lambda one, part: one.use.cpu_s.get(part, 0) * 3600 / (one.requests * clip_s)),
            "Memory at the end of a round, MiB (proportional set size):",
            _by_part(rounds, lambda one, part: one.memory_mib.get(part, 0)),
            f"{next(iter(rounds))} ÷ the others, each ratio taken within one round:",
            _ratios(rounds, clip_s),
            _noise(rounds),
        ]
    return "\n\n".join(parts) + "\n"


def ratios(rounds: Rounds, clip_s: int) -> dict[str, dict[str, list[float]]]:
    """System → figure → round by round, the first system's figure divided by this one's. Only figures of both."""
    first, *others = ([figures(one, clip_s) for one in of_system] for of_system in rounds.values())
    return {
        name: {key: [a[key] / b[key] for a, b in zip(first, other, strict=True)] for key in first[0] if key in other[0]}
        for name, other in zip(list(rounds)[1:], others, strict=True)
    }


def _conditions(conditions: Mapping[str, Any]) -> list[str]:
    commands = conditions["commands"].items()
    return [
        "\n".join(f"- {name}: {value}" for name, value in conditions.items() if name != "commands"),
        "```sh\n" + "\n".join(f"# {name}\n{command}" for name, command in commands) + "\n```",
    ]


def _throughput(rounds: Rounds, clip_s: int) -> str:
    rows = []
    for name, of_system in rounds.items():
        each = [figures(one, clip_s) for one in of_system]
        rows.append([name, *(_spread([of[key] for of in each], digits) for key, digits in RATES.items())])
    return _table(["", *RATES], rows)


RATES = {"requests/s": 2, "audio-s/s": 0}


def _latency(rounds: Rounds) -> str:
    columns = [f"{name} p{at}, s" for name in ("TTFT", "E2E") for at in PERCENTILES]
    rows = []
    for system, of_system in rounds.items():
        if found := latencies(of_system):
            row = [f"{np.percentile(found[name], at):.2f}" for name in ("TTFT", "E2E") for at in PERCENTILES]
            rows.append([system, *row])
    return _table(["", *columns], rows)


def _by_part(rounds: Rounds, figure: Callable[[Round, str], float]) -> str:
    parts = list(dict.fromkeys(part for of_system in rounds.values() for one in of_system for part in one.memory_mib))
    rows = []
    for name, of_system in rounds.items():
        row = [median(figure(one, part) for one in of_system) for part in parts]
        rows.append([name, *(f"{value:.0f}" if value else "-" for value in row), f"{sum(row):.0f}"])
    return _table(["", *parts, "all"], rows)


def _ratios(rounds: Rounds, clip_s: int) -> str:
    found = ratios(rounds, clip_s)
    keys = dict.fromkeys(key for by_key in found.values() for key in by_key)
    rows = [[key, *(_spread(by_key[key], 2) if key in by_key else "-" for by_key in found.values())] for key in keys]
    return _table(["", *found], rows)


def _noise(rounds: Rounds) -> str:
    every = [one for of_system in rounds.values() for one in of_system]
    own = [one.load_generator_cpu_s / one.wall_s for one in every]
    others = [
        (one.use.machine_cpu_s - sum(one.use.cpu_s.values()) - one.load_generator_cpu_s) / one.use.wall_s
        for one in every
    ]
    return (
        f"Cores that the load generator took: {_spread(own, 2)}. "
        f"Cores that everything else on the machine took meanwhile: {_spread(others, 2)}."
    )


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
