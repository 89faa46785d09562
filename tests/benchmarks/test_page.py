"""The page of results is complete in one file, has every figure, and is safe for any content of the results."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from benchmarks.report.charts import Ratio, shown, ticks
from benchmarks.report.page import page

HOSTILE = '<script>alert("x")</script>'


def a_round(wall_s: float, frontend_s: float) -> dict[str, Any]:
    """Make a round of ten requests."""
    return {
        "requests": 10,
        "audio_s": 360.0,
        "wall_s": wall_s,
        "cpu_s": {"frontend": frontend_s, "engine core": 2.0},
        "machine_cpu_s": 9.0,
        "load_generator_cpu_s": 0.1,
        "memory_mib": {"frontend": 700, "engine core": 2000},
        "ttft_s": [0.1] * 9 + [1.0],
        "e2e_s": [2.0] * 10,
    }


def comparison(**conditions: Any) -> dict[str, Any]:
    """Make a run of two systems, of which the first has three times the requests/s and half of the frontend's CPU."""
    rounds = {
        "captioner": [a_round(2.0, 0.5), a_round(4.0, 0.5)],
        "vllm serve": [a_round(6.0, 1.0), a_round(12.0, 1.0)],
    }
    commands = {"captioner": f"captioner serve {HOSTILE}"}
    return {
        "title": f"Side by side {HOSTILE}",
        "conditions": {"commit": "abc123", "commands": commands, **conditions},
        "workloads": [{"name": "30 s clips", "rounds": rounds, "machine load": "0.1 before, 1.9 after"}],
    }


def suite(*loads: float, **more: Any) -> dict[str, Any]:
    """Make a run at several loads."""
    percentiles = {f"p{at}": at / 100 for at in (50, 90, 95, 99)}
    points = [
        {
            "load": load,
            "requests": 40,
            "right": 40,
            "requests_per_s": load * 1.25,
            "audio_s_per_s": load * 37.5,
            "goodput": 0.975,
            "meets_slo": True,
            "ttft_s": percentiles,
            "e2e_s": percentiles,
            "stages_s": {"decode": 0.0625, "generate": 1.5},
            "cpu_s_per_audio_hour": {"frontend": 3.5, "engine core": 22.0},
            "memory_mib": {"frontend": 712.0},
        }
        for load in loads
    ]
    conditions = {"commit": "abc123", "machine": "two cores", "commands": {}}
    return {
        "kind": "suite",
        "title": "At several loads",
        "conditions": conditions,
        "load_unit": "callers at a time",
        "slo_ttft_s": 2.0,
        "warnings": [],
        "sweep": points,
        **more,
    }


class _Reader(HTMLParser):
    """Records open tags, and everything that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.charts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br", "hr", "img", "link"):
            self.open.append(tag)
        self.fetched += [f"{tag} {name}={value}" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag == "svg":
            self.charts.append(dict(attrs)["aria-label"] or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Ignore self-closing tags."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read(text: str) -> _Reader:
    """Parse a page; every tag is closed in its order."""
    reader = _Reader()
    reader.feed(text)
    assert reader.open == []
    return reader


def test_a_page_needs_nothing_else_and_runs_nothing() -> None:
    """The page has no script and fetches nothing, and strings of the results are text."""
    text = page([comparison(note=HOSTILE), suite(1, 4)], HOSTILE)
    assert read(text).fetched == []
    assert "url(" not in text
    assert "@import" not in text
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 4


def test_systems_are_compared_by_ratios_with_intervals_and_aims() -> None:
    """Three times the requests/s is above the aim of 1.5, and half the CPU is at its aim."""
    text = page([comparison()], "T")
    assert "captioner ÷ vllm serve" in text
    assert re.search(r'class="tick met"[^>]*>3.00 \(3.00 to 3.00\)', text)
    assert re.search(r'class="tick met"[^>]*>0.50 \(0.50 to 0.50\)', text)
    assert re.search(r'class="tick missed"[^>]*>1.00 \(1.00 to 1.00\)', text), "TTFT is equal; the aim is 0.6"
    assert "requests/s: 3; aim 1.5: met" in text, "the verdict is text, too, and not only a colour"
    assert "0.1 before, 1.9 after" in text
    assert "abc123" in text


def test_every_figure_of_a_sweep_is_shown() -> None:
    """Every figure is in a chart, and as a number."""
    text = page([suite(1, 4, ceiling={"times": 7.25}, saturation={"highest_load": 11.3, "tried": []})], "T")
    charts = read(text).charts
    for name in ("Throughput", "Requests", "Time to the first text", "Complete answer", "Goodput"):
        assert any(chart.startswith(name) for chart in charts), name
    for figure in ("150", "5", "0.975", "0.95", "7.25 times", "11.3", "0.0625", "22", "712"):
        assert f">{figure}<" in text or f": {figure}<" in text, figure
    assert "SLO 2 s" in text


def test_what_was_not_measured_is_listed() -> None:
    """A page names the parts that were not measured."""
    text = page([suite(), comparison() | {"workloads": [{"name": "mixed lengths", "rounds": {}}]}], "T")
    assert "figures at several loads; the load generator&#39;s own ceiling" in text.replace("&#34;", '"')
    assert "Not measured here: mixed lengths" in text


def test_scaling_is_a_line_over_the_count() -> None:
    """Each kind of process has one line."""
    points = [{"count": 1, "requests_per_s": [4.0, 4.2]}, {"count": 2, "requests_per_s": [8.0, 8.1]}]
    run = {
        "kind": "scaling",
        "title": "More",
        "conditions": {},
        "series": [{"name": "engine replicas", "points": points}],
    }
    assert read(page([run], "T")).charts == ["Requests per second by engine replicas"]


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (Ratio("r", 1.6, 1.55, 1.7, 1.5), "met"),
        (Ratio("r", 1.6, 1.4, 1.7, 1.5), "open"),
        (Ratio("r", 1.2, 1.1, 1.3, 1.5), "missed"),
        (Ratio("r", 0.4, 0.3, 0.45, 0.5, more_is_better=False), "met"),
        (Ratio("r", 0.4, 0.3, 0.6, 0.5, more_is_better=False), "open"),
        (Ratio("r", 0.4, 0.3, 0.6), ""),
    ],
)
def test_an_aim_is_met_only_by_the_complete_interval(ratio: Ratio, verdict: str) -> None:
    """An interval that contains the aim leaves it open."""
    assert ratio.verdict == verdict


def test_numbers_have_three_digits() -> None:
    """Numbers have no exponents, and axes have round numbers."""
    assert [shown(of) for of in (0, 1234.5, 12.345, 1.0, 0.04567)] == ["0", "1234", "12.3", "1", "0.0457"]
    assert ticks(0, 9.3) == [0, 2, 4, 6, 8, 10]
    assert ticks(0, 0.3)[-1] >= 0.3


def test_panels_are_lines_over_time_and_numbers() -> None:
    """A graph panel has its series named, and a panel of one number shows the last value."""
    graph = {
        "title": "Waits",
        "unit": "seconds",
        "kind": "stack",
        "series": {"a": [(0, 1.0), (9, 2.0)], "b": [(0, 3.0)]},
    }
    number = {"title": "Requests", "unit": "per second", "kind": "stat", "series": {"all": [(0, 1.0), (9, 4.25)]}}
    run = {"kind": "panels", "title": "P", "conditions": {}, "boards": [{"title": "Now", "panels": [graph, number]}]}
    text = page([run], "T")
    assert read(text).charts == ["Waits"]
    assert "<b>4.25</b>Requests per second" in text
    assert ">a</text>" in text
