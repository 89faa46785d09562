"""Agreement of two runs of one comparison."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from benchmarks.program import module_environment
from tests.benchmarks.test_page import a_round, comparison

if TYPE_CHECKING:
    from pathlib import Path

AGREE = [sys.executable, "-m", "benchmarks.report.agree"]


def agree(tmp_path: Path, slower: float, rounds: int = 2) -> subprocess.CompletedProcess[str]:
    """Compare a run with one in which the first system took `slower` times as long."""
    second = comparison()
    second["workloads"][0]["rounds"]["captioner"] = [a_round(of * slower, 0.5) for of in (2.0, 4.0)][:rounds]
    return agree_on(tmp_path, comparison(), second)


def agree_on(tmp_path: Path, first: dict[str, Any], second: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Compare two runs."""
    paths = []
    for name, run in (("first", first), ("second", second)):
        (tmp_path / name).write_text(json.dumps([run]))
        paths.append(str(tmp_path / name))
    environment = os.environ | module_environment()
    return subprocess.run([*AGREE, *paths], capture_output=True, text=True, check=False, env=environment)


def test_the_same_figures_agree(tmp_path: Path) -> None:
    """Every ratio of both runs is in the table, and agrees."""
    ended = agree(tmp_path, 1.0)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (
        "| 30 s clips: captioner ÷ vllm serve | requests/s | 3.00 (3.00 to 3.00) | 3.00 (3.00 to 3.00) | agree |"
        in (ended.stdout)
    )


def test_another_ranking_does_not_agree(tmp_path: Path) -> None:
    """A system that is four times as slow loses instead of wins: its rates disagree, CPU and memory agree."""
    ended = agree(tmp_path, 4.0)
    assert ended.returncode == 1
    apart = [line.split(" | ")[1] for line in ended.stdout.splitlines() if "disagree" in line]
    assert apart == ["requests/s", "audio-s/s"]


def test_what_one_run_lacks_does_not_agree(tmp_path: Path) -> None:
    """A system that was left out of the second run is reported as a disagreement."""
    second = comparison()
    del second["workloads"][0]["rounds"]["vllm serve"]
    ended = agree_on(tmp_path, comparison(), second)
    assert ended.returncode == 1
    assert "| requests/s | there | not measured | **disagree** |" in ended.stdout
