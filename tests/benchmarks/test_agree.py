"""Whether two runs of one comparison agree."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.test_page import a_round, comparison

AGREE = Path(__file__).parents[2] / "benchmarks/agree.py"


def agree(tmp_path: Path, slower: float, rounds: int = 2) -> subprocess.CompletedProcess[str]:
    """Compare a run with one in which the first system took `slower` times as long."""
    first, second = comparison(), comparison()
    second["workloads"][0]["rounds"]["captioner"] = [a_round(of * slower, 0.5) for of in (2.0, 4.0)][:rounds]
    paths = []
    for name, run in (("first", first), ("second", second)):
        (tmp_path / name).write_text(json.dumps([run]))
        paths.append(str(tmp_path / name))
    return subprocess.run([sys.executable, str(AGREE), *paths], capture_output=True, text=True, check=False)


def test_the_same_figures_agree(tmp_path: Path) -> None:
    """Every ratio of both is told."""
    ended = agree(tmp_path, 1.0)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (
        "| 30 s clips: captioner ÷ vllm serve | requests/s | 3.00 (3.00 to 3.00) | 3.00 (3.00 to 3.00) | agree |"
        in (ended.stdout)
    )


def test_another_ranking_does_not_agree(tmp_path: Path) -> None:
    """Four times as slow turns the winner into the loser; CPU and memory are as before."""
    ended = agree(tmp_path, 4.0)
    assert ended.returncode == 1
    apart = [line.split(" | ")[1] for line in ended.stdout.splitlines() if "disagree" in line]
    assert apart == ["requests/s", "audio-s/s"]


def test_what_one_run_lacks_does_not_agree(tmp_path: Path) -> None:
    """A system that was left out of the second run is told, and is no agreement."""
    first, second = comparison(), comparison()
    del second["workloads"][0]["rounds"]["vllm serve"]
    for name, run in (("first", first), ("second", second)):
        (tmp_path / name).write_text(json.dumps([run]))
    command = [sys.executable, str(AGREE), str(tmp_path / "first"), str(tmp_path / "second")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "| requests/s | there | not measured | **disagree** |" in ended.stdout
