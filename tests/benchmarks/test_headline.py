"""README's figures of speed are those of every kept run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.report.headline import headline, kept
from tests.benchmarks.test_page import a_round

README = Path(__file__).parents[2] / "README.md"


def a_run(slower: float, *, above: str = "captioner", compiled: bool = False) -> dict[str, Any]:
    """Return a run of one workload, two rounds, in which the first system took `slower` times as long as the second."""
    rounds = {
        above: [a_round(slower * of, 0.5) for of in (2.0, 4.0)],
        "vllm serve": [a_round(of, 1.0) for of in (2, 4)],
    }
    command = "captioner serve --no-enforce-eager" if compiled else "captioner serve --enforce-eager"
    return {
        "conditions": {"commands": {"captioner": command}},
        "workloads": [{"name": "30 s MP3, 48 kHz stereo, 64 requests at a time", "rounds": rounds}],
    }


def cells(table: str) -> list[list[str]]:
    """Return the cells of the rows below the heads."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_a_cell_is_the_range_over_all_runs() -> None:
    """Neither the best run nor the last one is chosen: a cell goes from the least to the greatest median."""
    [[name, runs, requests, *_]] = cells(headline([a_run(0.5), a_run(0.8), a_run(2.0)]))
    assert (name, runs) == ("captioner ÷ `vllm serve`, 64 at a time", "3")
    assert requests == "0.50 to 2.00"


def test_compiled_runs_and_other_systems_are_rows_of_their_own() -> None:
    """Runs with the compiler, and without our kernels, are not mixed with the others."""
    table = headline([a_run(0.5), a_run(1.0, compiled=True), a_run(0.8, above="captioner, no CPU kernels")])
    assert [(name, requests) for name, _, requests, *_ in cells(table)] == [
        ("captioner ÷ `vllm serve`, 64 at a time", "2.00"),
        ("captioner ÷ `vllm serve`, 64 at a time, compiled", "1.00"),
        ("captioner, no CPU kernels ÷ `vllm serve`, 64 at a time", "1.25"),
    ]


def test_readme_has_the_table() -> None:
    """README's table is what `python -m benchmarks.report.headline` prints."""
    _, mark, rest = README.read_text().partition("<!-- headline: printed by benchmarks.report.headline -->\n")
    section, end, _ = rest.partition("<!-- /headline -->")
    assert mark
    assert end
    assert section.strip() == headline(kept()).strip()
