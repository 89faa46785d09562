"""Figures at several loads, the search for the highest load that meets an SLO, and the check against a kept run."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks import suite
from benchmarks.program import ROOT
from benchmarks.report.baseline import breaches, differences

if TYPE_CHECKING:
    from pathlib import Path

KEPT = ROOT / "benchmarks" / "baselines" / "suite.json"


def entry(ttft_s: float, *, outcome: str = "right", warm_up: bool = False) -> dict[str, Any]:
    """Make a journal entry: a request of ten seconds."""
    own = {"ttft_s": ttft_s, "e2e_s": 10.0} if outcome == "right" else {}
    return {"due": 100.0, "ended": 110.0, "audio_s": 30.0, "outcome": outcome, "warm_up": warm_up, **own}


def test_figures_are_of_right_answers_after_the_warm_up() -> None:
    """A refused request counts against goodput, and a load with refusals does not meet the SLO."""
    entries = [entry(1.0), entry(3.0), entry(0.1, warm_up=True), entry(0, outcome="refused"), entry(1.0)]
    found = suite.summary(entries, 2.0)
    assert (found["requests"], found["right"], found["audio_s_per_s"]) == (4, 3, 9.0)
    assert found["goodput"] == 0.5
    assert not found["meets_slo"]
    assert suite.summary([entry(1.0)] * 4, 2.0)["meets_slo"]
    assert not suite.summary([entry(3.0)] * 4, 2.0)["meets_slo"]


def a_point(load: float, *ttft_s: float, frontend_s: float = 10.0) -> dict[str, Any]:
    """Make a load with a round for each time to the first text."""
    cpu = {"frontend": frontend_s, "engine core": 40.0}
    rounds = [{"load": load, **suite.summary([entry(of)] * 4, 2.0), "cpu_s_per_audio_hour": cpu} for of in ttft_s]
    entries = [entry(of) | {"run": number} for number, of in enumerate(ttft_s) for _ in range(4)]
    return {
        "load": load,
        **suite.summary(entries, 2.0, spans=len(ttft_s)),
        "cpu_s_per_audio_hour": cpu,
        "rounds": rounds,
    }


def a_run(*points: dict[str, Any], machine: str = "this one") -> dict[str, Any]:
    """Make a run of the suite."""
    return {"conditions": {"machine": machine}, "sweep": list(points)}


def test_rounds_are_summed() -> None:
    """The time of several rounds is the sum of theirs, without the time between them."""
    entries = [entry(1.0) | {"run": 0}, entry(3.0) | {"run": 1, "due": 500.0, "ended": 510.0}]
    assert suite.summary(entries, 2.0, spans=2)["audio_s_per_s"] == 3.0
    with pytest.raises(ValueError, match="2 runs"):
        suite.summary(entries, 2.0)


def test_a_run_that_is_worse_than_the_kept_one_is_a_breach() -> None:
    """Slower answers and a missed SLO are breaches; noise between rounds, or within the tolerance, is none."""
    kept = a_run(a_point(4, 1.0, 1.4))
    assert breaches(kept, kept, 0.25) == []
    assert breaches(a_run(a_point(4, 1.2, 1.3)), kept, 0.25) == []
    assert breaches(a_run(a_point(4, 1.3, 1.9)), kept, 0.25) == [], "one round is as good as before"
    assert breaches(a_run(a_point(4, 1.8, 1.9)), kept, 0.25) == ["load 4: p95 of TTFT is 1.36 times what it was"]
    broken = breaches(a_run(a_point(4, 3.0, 3.0, frontend_s=20.0)), kept, 0.25)
    assert [of.partition(" is ")[0] for of in broken] == [
        "load 4: the SLO",
        "load 4: p95 of TTFT",
        "load 4: CPU of all but the engine ÷ the engine's",
    ]
    assert breaches(a_run(a_point(4, 1.0)), a_run(a_point(4, 1.0), a_point(8, 1.0)), 0.25) == [
        "load 8: was not measured"
    ]
    with pytest.raises(ValueError, match="none of these loads"):
        breaches(a_run(a_point(5, 1.0)), kept, 0.25)


def test_another_machine_is_compared_only_by_figures_that_do_not_depend_on_its_speed() -> None:
    """A run that is twice as slow everywhere is no breach; faster growth with load is, and a costlier frontend."""
    kept = a_run(a_point(1, 0.5), a_point(4, 1.0), machine="another")
    assert breaches(a_run(a_point(1, 1.0), a_point(4, 2.0)), kept, 0.25) == []
    broken = breaches(a_run(a_point(1, 0.5), a_point(4, 2.0)), kept, 0.25)
    assert broken == ["load 4: p95 of TTFT ÷ the least load's is 2.00 times what it was"]
    assert len(breaches(a_run(a_point(1, 0.5, frontend_s=20), a_point(4, 1.0, frontend_s=20)), kept, 0.25)) == 2
    assert breaches(a_run(a_point(4, 9.0)), a_run(a_point(4, 1.0), machine="another"), 0.25)


def test_a_load_without_an_answer_is_a_breach_on_any_machine() -> None:
    """The least load, in whose units the others are compared, is no exception."""
    silent = {"load": 1, "requests": 4, "right": 0, "meets_slo": False}
    kept = a_run(a_point(1, 0.5), a_point(4, 1.0), machine="another")
    broken = breaches(a_run(silent, a_point(4, 1.0)), kept, 0.25)
    assert "load 1: no right answer any more" in broken


def test_differences_from_the_kept_run_are_reported() -> None:
    """Another machine and other options are reported; equal conditions give no line."""
    kept, found = a_run(machine="another"), a_run() | {"slo_ttft_s": 1.0}
    found["conditions"]["options of the load"] = "--tokens 64"
    found_differences = differences(found, kept)
    assert "not as in the kept run: machine was another, is this one" in found_differences
    assert "not as in the kept run: options of the load was None, is --tokens 64" in found_differences
    assert len(found_differences) == 3
    assert differences(found, found) == []


def test_the_kept_baseline_can_be_checked() -> None:
    """The baseline of the repository is no breach of its figures, and half the throughput breaks it."""
    kept = json.loads(KEPT.read_text())
    assert breaches(kept, kept, 0.25) == []
    slower = json.loads(KEPT.read_text())
    for one in (of for point in slower["sweep"] for of in (point, *point["rounds"])):
        one["audio_s_per_s"] /= 2
    loads = [point["load"] for point in kept["sweep"]]
    assert breaches(slower, kept, 0.25) == [
        f"load {load:g}: seconds for a second of audio is 2.00 times what it was" for load in loads
    ]


@pytest.mark.parametrize(("limit", "expected"), [(10.0, 10.0), (0.5, None), (1000.0, 64.0)])
def test_saturation_finds_the_highest_load(
    monkeypatch: pytest.MonkeyPatch, limit: float, expected: float | None
) -> None:
    """The search ends within a tenth of the limit; without a load below it with none, above it with the highest."""
    monkeypatch.setattr(suite, "run", lambda _, load: {"load": load, "meets_slo": load <= limit})
    found = suite.saturation(argparse.Namespace(low=1.0, high=64.0, within=0.1))["highest_load"]
    if expected in (None, 64.0):
        assert found == expected
    else:
        assert limit / 1.1 <= found <= limit


def test_the_ceiling_is_measured(tmp_path: Path) -> None:
    """The answers of the instant server pass every check but that of usage, which it cannot know."""
    more = [f"--clips-dir={tmp_path}", "--warm-up=0", "--mix=2", "--ways=dashscope", "--tokens=9"]
    found = suite.ceiling(argparse.Namespace(seconds=1, slo_ttft_s=2.0, more=more))
    assert found["right"] == found["requests"] > 20
