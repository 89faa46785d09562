"""Figures at several loads, and the search for the highest that meets an SLO."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import suite


def line(ttft_s: float, *, outcome: str = "right", warm_up: bool = False) -> dict[str, Any]:
    """Make a line of a journal: a request of ten seconds."""
    own = {"ttft_s": ttft_s, "e2e_s": 10.0} if outcome == "right" else {}
    return {"due": 100.0, "ended": 110.0, "audio_s": 30.0, "outcome": outcome, "warm_up": warm_up, **own}


def test_figures_are_of_right_answers_after_the_warm_up() -> None:
    """What was refused counts against goodput, and a load that made refusals does not meet the SLO."""
    told = [line(1.0), line(3.0), line(0.1, warm_up=True), line(0, outcome="refused"), line(1.0)]
    found = suite.summary(told, 2.0)
    assert (found["requests"], found["right"], found["audio_s_per_s"]) == (4, 3, 9.0)
    assert found["goodput"] == 0.5
    assert not found["meets_slo"]
    assert suite.summary([line(1.0)] * 4, 2.0)["meets_slo"]
    assert not suite.summary([line(3.0)] * 4, 2.0)["meets_slo"]


def test_a_sweep_that_is_worse_than_the_kept_one_is_a_breach() -> None:
    """Slower answers, less audio and an SLO that is missed are told; noise within the tolerance is not."""
    kept = {"load": 4.0, **suite.summary([line(1.0)] * 4, 2.0)}
    assert suite.breaches([kept], [kept], 0.25) == []
    assert suite.breaches([{"load": 4.0, **suite.summary([line(1.2)] * 4, 2.0)}], [kept], 0.25) == []
    assert suite.breaches([{"load": 4.0, **suite.summary([line(1.5)] * 4, 2.0)}], [kept], 0.25) == [
        "load 4.0: ttft_s p95 is 1.50 times worse"
    ]
    assert len(suite.breaches([{"load": 4.0, **suite.summary([line(3.0)] * 2, 2.0)}], [kept], 0.25)) == 3
    with pytest.raises(ValueError, match="none of these loads"):
        suite.breaches([kept | {"load": 5.0}], [kept], 0.25)


@pytest.mark.parametrize(("limit", "expected"), [(10.0, 10.0), (0.5, None), (1000.0, 64.0)])
def test_saturation_finds_the_highest_load(
    monkeypatch: pytest.MonkeyPatch, limit: float, expected: float | None
) -> None:
    """Within a tenth below the limit; none if not even the least load meets it, the highest if that does."""
    monkeypatch.setattr(suite, "run", lambda _, load: {"load": load, "meets_slo": load <= limit})
    found = suite.saturation(argparse.Namespace(low=1.0, high=64.0, within=0.1))["highest_load"]
    if expected in (None, 64.0):
        assert found == expected
    else:
        assert limit / 1.1 <= found <= limit


def test_the_ceiling_is_measured(tmp_path: Path) -> None:
    """An instant server's answers pass every check but the one of usage, which it cannot know."""
    more = [f"--clips-dir={tmp_path}", "--warm-up=0", "--mix=2"]
    found = suite.ceiling(argparse.Namespace(seconds=1, slo_ttft_s=2.0, more=more))
    assert found["right"] == found["requests"] > 20
