"""A Markdown table of the microbenchmarks, each with the ratio of its median to that of its reference.

pytest benchmarks/micro --benchmark-json benchmarks/results/micro.json
python -m benchmarks.micro.ratios benchmarks/results/micro.json > benchmarks/results/micro.md
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

REFERENCES = {
    "test_decode.py::test_service": "test_decode.py::test_library",
    "test_features.py::test_service": "test_features.py::test_extractor",
    "test_wire.py::test_read_service": "test_wire.py::test_read_library",
    "test_wire.py::test_write_service": "test_wire.py::test_write_library",
    "test_admission.py::test_limits": "test_admission.py::test_limits_reference",
    "test_admission.py::test_key": "test_admission.py::test_key_reference",
    "test_admission.py::test_queue": "test_admission.py::test_queue_reference",
    "test_admission.py::test_line": "test_admission.py::test_line_reference",  # as the kept results name it
    "test_ledger.py::test_append": "test_ledger.py::test_append_reference",
    "test_ledger.py::test_append_and_sync": "",
    "test_ledger.py::test_write": "test_ledger.py::test_write_reference",
}
"""Reference of each microbenchmark; empty without a reference."""


def table(found: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the table."""
    times = {one["fullname"].removeprefix("benchmarks/micro/"): one["stats"] for one in found}
    lines = ["| | median, µs | reference, µs | ratio |", "| --- | ---: | ---: | ---: |"]
    for name, stats in times.items():
        test, _, case = name.partition("[")
        if test not in REFERENCES:
            continue
        of = {other: times[other] for other in times if re.split(r"\[", other)[0] == REFERENCES[test]}
        # A reference without cases, of the same case, or of several variants of the same case.
        fitting = [other for other in of if "[" not in other or set(_cases(case)) <= set(_cases(other))]
        own = stats["median"] * 1e6
        for other in fitting or [""]:
            if not other:
                lines.append(f"| {name} | {own:.1f} | | |")
                continue
            theirs = of[other]["median"] * 1e6
            lines.append(f"| {name} | {own:.1f} | {theirs:.1f} ({other.partition('::')[2]}) | {own / theirs:.2f} |")
    return lines


def conditions(results: dict[str, Any]) -> str:
    """Return a sentence with date, commit and machine, as pytest-benchmark recorded them."""
    commit, machine = results["commit_info"], results["machine_info"]
    changed = " with local changes" if commit.get("dirty") else ""
    cpu = machine["cpu"]
    return (
        f"Measured {results['datetime'][:16]} UTC at commit {commit['id'][:10]}{changed}, "
        f"{cpu.get('count', '?')} cores of {cpu.get('brand_raw', 'an unknown CPU')}, "
        f"Python {machine['python_version']}, pytest-benchmark {results['version']}."
    )


def page(results: dict[str, Any]) -> str:
    """Return the page."""
    lines = [
        "# Microbenchmarks",
        "",
        conditions(results),
        "Medians of many rounds of one call; with a ratio above 1 the service takes longer than its reference.",
        "The spread of the rounds, and all other figures, are in `micro.json`.",
        "",
        *table(results["benchmarks"]),
    ]
    return "\n".join(lines)


def _cases(name: str) -> list[str]:
    return [part for part in name.rpartition("[")[2].removesuffix("]").split("-") if part]


if __name__ == "__main__":
    print(page(json.loads(Path(sys.argv[1]).read_text())))
