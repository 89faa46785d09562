"""Figures at several loads, and the search for the highest that meets an SLO."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import suite
from baseline import breaches, differences


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


def a_point(load: float, *ttft_s: float, frontend_s: float = 10.0) -> dict[str, Any]:
    """Make a load with a round for each time to the first text."""
    cpu = {"frontend": frontend_s, "engine core": 40.0}
    rounds = [{"load": load, **suite.summary([line(of)] * 4, 2.0), "cpu_s_per_audio_hour": cpu} for of in ttft_s]
    told = [line(of) | {"run": number} for number, of in enumerate(ttft_s) for _ in range(4)]
    return {"load": load, **suite.summary(told, 2.0, spans=len(ttft_s)), "cpu_s_per_audio_hour": cpu, "rounds": rounds}


def a_run(*points: dict[str, Any], machine: str = "this one") -> dict[str, Any]:
    """Make a run of the suite."""
    return {"conditions": {"machine": machine}, "sweep": list(points)}


def test_rounds_are_put_together() -> None:
    """Time is what the rounds took, and not what lay between them."""
    told = [line(1.0) | {"run": 0}, line(3.0) | {"run": 1, "due": 500.0, "ended": 510.0}]
    assert suite.summary(told, 2.0, spans=2)["audio_s_per_s"] == 3.0
    with pytest.raises(ValueError, match="2 runs"):
        suite.summary(told, 2.0)


def test_a_run_that_is_worse_than_the_kept_one_is_a_breach() -> None:
    """Slower answers and an SLO that is missed are told; noise between the rounds, or within the tolerance, is not."""
    kept = a_run(a_point(4, 1.0, 1.4))
    assert breaches(kept, kept, 0.25) == []
    assert breaches(a_run(a_point(4, 1.2, 1.3)), kept, 0.25) == []
    assert breaches(a_run(a_point(4, 1.3, 1.9)), kept, 0.25) == [], "one round is as good as before"
    assert breaches(a_run(a_point(4, 1.8, 1.9)), kept, 0.25) == ["load 4: p95 of TTFT is 1.36 times what it was"]
    told = breaches(a_run(a_point(4, 3.0, 3.0, frontend_s=20.0)), kept, 0.25)
    assert [of.partition(" is ")[0] for of in told] == [
        "load 4: the SLO",
        "load 4: p95 of TTFT",
        "load 4: CPU of all but the engine beside the engine's",
    ]
    assert breaches(a_run(a_point(4, 1.0)), a_run(a_point(4, 1.0), a_point(8, 1.0)), 0.25) == [
        "load 8: was not measured"
    ]
    with pytest.raises(ValueError, match="none of these loads"):
        breaches(a_run(a_point(5, 1.0)), kept, 0.25)


def test_another_machine_is_compared_only_in_what_its_speed_does_not_matter_for() -> None:
    """All twice as slow is no breach; what grows faster with the load is, and a frontend that costs more."""
    kept = a_run(a_point(1, 0.5), a_point(4, 1.0), machine="another")
    assert breaches(a_run(a_point(1, 1.0), a_point(4, 2.0)), kept, 0.25) == []
    told = breaches(a_run(a_point(1, 0.5), a_point(4, 2.0)), kept, 0.25)
    assert told == ["load 4: p95 of TTFT beside the least load's is 2.00 times what it was"]
    assert len(breaches(a_run(a_point(1, 0.5, frontend_s=20), a_point(4, 1.0, frontend_s=20)), kept, 0.25)) == 2
    assert breaches(a_run(a_point(4, 9.0)), a_run(a_point(4, 1.0), machine="another"), 0.25)


def test_a_load_without_an_answer_is_a_breach_on_any_machine() -> None:
    """Also the least load, in whose units the others are told."""
    silent = {"load": 1, "requests": 4, "right": 0, "meets_slo": False}
    kept = a_run(a_point(1, 0.5), a_point(4, 1.0), machine="another")
    told = breaches(a_run(silent, a_point(4, 1.0)), kept, 0.25)
    assert "load 1: no right answer any more" in told


def test_what_differs_from_the_kept_run_is_told() -> None:
    """Another machine and other options; nothing where all is the same."""
    kept, found = a_run(machine="another"), a_run() | {"slo_ttft_s": 1.0}
    found["conditions"]["options of the load"] = "--tokens 64"
    told = differences(found, kept)
    assert "not as in the kept run: machine was another, is this one" in told
    assert "not as in the kept run: options of the load was None, is --tokens 64" in told
    assert len(told) == 3
    assert differences(found, found) == []


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
    more = [f"--clips-dir={tmp_path}", "--warm-up=0", "--mix=2", "--ways=dashscope", "--tokens=9"]
    found = suite.ceiling(argparse.Namespace(seconds=1, slo_ttft_s=2.0, more=more))
    assert found["right"] == found["requests"] > 20
