"""One self-contained HTML page of results (JSON): charts, tables, and the conditions of the runs.

    python -m benchmarks.report.page FILE.json … --out page.html [--title TITLE]

A file is a list of runs, as `benchmarks.compare` writes it, or one run with a `kind`, as `benchmarks.suite`,
`benchmarks.cluster.scaling` and `benchmarks.report.panels` write it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean, median
from typing import TYPE_CHECKING, Any

import jinja2

from benchmarks.processes import ENGINE
from benchmarks.program import option_parser
from benchmarks.report.charts import Point, Ratio, bars, forest, lines, over_time, shown
from benchmarks.report.markdown import ENGINE_CPU, PAIRS, SERVICE_CPU, figures, interval, plain, ratios

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from markupsafe import Markup

    Run = Mapping[str, Any]

AIMS: dict[tuple[str, str], dict[str, float]] = {
    ("captioner", "vllm serve"): {"requests/s": 1.5, "TTFT p95, s": 0.6, SERVICE_CPU: 0.5},
    ("captioner", "offline engine"): {"requests/s": 0.9},
    ("captioner cluster", "captioner"): {"requests/s": 0.9, SERVICE_CPU: 1.3},
    ("captioner cluster", "ray.serve.llm"): {"requests/s": 2.0},
    ("captioner", "ray.serve.llm"): {"requests/s": 2.0},
}
"""Aims by pair of systems and figure."""

RATIOS = (
    "Ratios: geometric mean over the rounds, with its 95 % interval by Student's t. A bar across a row is the aim: "
    "green: met; red: not met; yellow: the interval contains the aim."
)
PERCENTILES = ("p50", "p90", "p95", "p99")
HOUR_S = 3600


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart with title and caption."""

    title: str
    svg: Markup
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table that its title opens."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    open: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """Charts and tables under one heading."""

    title: str
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()


@dataclass(slots=True)
class Section:
    """One run on the page."""

    title: str
    conditions: list[tuple[str, str]]
    commands: list[tuple[str, str]]
    main: list[tuple[str, str]] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def page(runs: Iterable[Run], title: str) -> str:
    """Return the page."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True).get_template("page.html.j2")
    makers = {"suite": _suite, "scaling": _scaling, "panels": _panels}
    return template.render(title=title, sections=[makers.get(run.get("kind", ""), _comparison)(run) for run in runs])


def _section(run: Run) -> Section:
    conditions = dict(run["conditions"])
    commands = conditions.pop("commands", {})
    return Section(run["title"], [(name, plain(value)) for name, value in conditions.items()], list(commands.items()))


# ---- several systems on the same clips


def _comparison(run: Run) -> Section:
    section = _section(run)
    if left_out := run["conditions"].get("left out"):
        section.warnings.append(f"Left out: {plain(left_out)}")
    for workload in run["workloads"]:
        rounds = {name: of for name, of in workload["rounds"].items() if of}
        if not rounds:
            section.missing.append(workload["name"])
            continue
        charts = [*_forests(rounds), *_costs(rounds)]
        tables = [_figures_table(rounds)]
        load = workload.get("machine load", "not noted")
        count = max(len(of) for of in rounds.values())
        note = f"{count} rounds of {next(iter(rounds.values()))[0]['requests']} requests; load of the machine: {load}."
        section.parts.append(Part(workload["name"], charts, tables, [note, RATIOS] if len(rounds) > 1 else [note]))
    return section


def _forests(rounds: Mapping[str, Sequence[Run]]) -> list[Chart]:
    rows: dict[str, list[Ratio]] = {}
    for above, below in PAIRS:
        if above not in rounds or below not in rounds:
            continue
        found = ratios(rounds[above], rounds[below])
        for key in ("requests/s", "TTFT p50, s", "TTFT p95, s", "E2E p95, s", SERVICE_CPU, ENGINE_CPU, "memory, MiB"):
            if key not in found:
                continue
            low, high = interval(found[key])
            aim = AIMS.get((above, below), {}).get(key)
            row = Ratio(_short(key), geometric_mean(found[key]), low, high, aim, key == "requests/s")
            rows.setdefault(f"{above} ÷ {below}", []).append(row)
    return [Chart(pair, forest(f"Ratios of {pair}", of)) for pair, of in rows.items()]


def _short(key: str) -> str:
    return {SERVICE_CPU: "CPU of all but the engine", ENGINE_CPU: "CPU of the engine"}.get(key, key.partition(",")[0])


def _costs(rounds: Mapping[str, Sequence[Run]]) -> list[Chart]:
    cpu: dict[str, dict[str, float]] = {}
    memory: dict[str, dict[str, float]] = {}
    for name, of in rounds.items():
        parts = sorted({part for one in of for part in one["memory_mib"]}, key=lambda part: (part not in ENGINE, part))
        cpu[name] = {
            part: median(one["cpu_s"].get(part, 0.0) / one["audio_s"] * HOUR_S for one in of) for part in parts
        }
        memory[name] = {part: median(one["memory_mib"].get(part, 0.0) for one in of) for part in parts}
    return [
        Chart(
            "CPU per hour of audio, by process",
            bars("CPU-seconds per hour of audio, by process", "CPU-seconds per hour of audio", cpu),
        ),
        Chart(
            "Memory, by process",
            bars("Memory by process", "MiB (shared pages divided among the processes that map them)", memory),
        ),
    ]


def _figures_table(rounds: Mapping[str, Sequence[Run]]) -> Table:
    by_system = {name: [figures(one) for one in of] for name, of in rounds.items()}
    keys = list(dict.fromkeys(key for of in by_system.values() for key in of[0]))
    rows = [[key, *(_spread([one[key] for one in of if key in one]) for of in by_system.values())] for key in keys]
    return Table("All figures: median (least to greatest)", ["", *by_system], rows, open=True)


def _spread(values: Sequence[float]) -> str:
    return f"{shown(median(values))} ({shown(min(values))} to {shown(max(values))})" if values else "-"


# ---- one service at several loads


def _suite(run: Run) -> Section:
    section = _section(run)
    section.warnings += run.get("warnings", [])
    if saturation := run.get("saturation"):
        highest = saturation["highest_load"]
        name = f"highest load with p95 of TTFT ≤ {shown(run['slo_ttft_s'])} s"
        section.main.append((name, "none" if highest is None else shown(highest)))
    else:
        section.missing.append("the highest load that meets the SLO")
    points = [point for point in run.get("sweep", []) if point["right"]]
    if points:
        section.main.append(("audio-seconds per second at most", shown(max(of["audio_s_per_s"] for of in points))))
        section.main.append(("requests per second at most", shown(max(of["requests_per_s"] for of in points))))
        section.parts.append(_load_part(run, points))
    else:
        section.missing.append("figures at several loads")
    if generator := run.get("ceiling"):
        section.main.append(("the load generator's ceiling ÷ what it applied", f"{shown(generator['times'])} times"))
    else:
        section.missing.append("the load generator's own ceiling")
    return section


def _load_part(run: Run, points: Sequence[Run]) -> Part:
    unit = run["load_unit"]

    def over(figure: str, at: str = "") -> list[Point]:
        found = []
        for point in points:
            rounds = [one for one in point.get("rounds", [point]) if one["right"]]
            values = [one[figure][at] if at else one[figure] for one in rounds]
            own = point[figure][at] if at else point[figure]
            found.append(Point(point["load"], own, min(values), max(values)))
        return found

    charts = [
        Chart(
            "Throughput",
            lines("Throughput against load", unit, "audio-seconds per second", {"all": over("audio_s_per_s")}),
        ),
        Chart("Requests", lines("Requests against load", unit, "requests per second", {"all": over("requests_per_s")})),
    ]
    for figure, name in (
        ("ttft_s", "Time to the first text"),
        ("itl_s", "Between tokens"),
        ("e2e_s", "Complete answer"),
    ):
        if all(figure in point for point in points):
            of = {at: over(figure, at) for at in PERCENTILES}
            limit = (f"SLO {shown(run['slo_ttft_s'])} s", run["slo_ttft_s"]) if figure == "ttft_s" else None
            charts.append(Chart(name, lines(f"{name} against load", unit, "seconds", of, limit)))
    charts.append(
        Chart(
            "Goodput",
            lines("Goodput against load", unit, "share of requests within the SLO", {"all": over("goodput")}),
        )
    )
    for figure, name, axis in (
        ("stages_s", "Where a request's time goes", "seconds per request"),
        ("cpu_s_per_audio_hour", "CPU, by process", "CPU-seconds per hour of audio"),
        ("memory_mib", "Memory, by process", "MiB (shared pages divided)"),
    ):
        if rows := {f"load {shown(point['load'])}": point[figure] for point in points if point.get(figure)}:
            charts.append(Chart(name, bars(name, axis, rows)))
    caption = "Lines: all rounds together; spread: the least and the greatest of one round."
    keys = ("requests", "right", "requests_per_s", "audio_s_per_s", "goodput")
    header = [unit, *keys, *(f"{of} {at}" for of in ("ttft_s", "itl_s", "e2e_s") for at in PERCENTILES)]
    rows_ = [
        [
            shown(point["load"]),
            *(shown(point[key]) for key in keys),
            *(
                shown(point[of][at]) if of in point else "-"
                for of in ("ttft_s", "itl_s", "e2e_s")
                for at in PERCENTILES
            ),
        ]
        for point in points
    ]
    return Part("Against load", charts, [Table("All figures", header, rows_)], [caption])


# ---- more of a kind of process


def _scaling(run: Run) -> Section:
    section = _section(run)
    for of in run["series"]:
        points = [
            Point(one["count"], median(one["requests_per_s"]), min(one["requests_per_s"]), max(one["requests_per_s"]))
            for one in of["points"]
        ]
        chart = lines(f"Requests per second by {of['name']}", of["name"], "requests per second", {"": points})
        section.parts.append(Part("", [Chart(f"More {of['name']}", chart, of.get("note", ""))]))
    return section


# ---- panels of dashboards


def _panels(run: Run) -> Section:
    section = _section(run)
    for board in run["boards"]:
        charts = []
        for panel in board["panels"]:
            if panel["kind"] == "stat":
                last = next(iter(panel["series"].values()))[-1][1]
                section.main.append((f"{panel['title']} {panel['unit']}".strip(), shown(last)))
            else:
                charts.append(Chart(panel["title"], over_time(panel["title"], panel["unit"], panel["series"])))
        if charts:
            section.parts.append(Part(board["title"], charts))
    return section


def main() -> None:
    """Write the page."""
    parser = option_parser(__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--title", default="Captioner: benchmark results")
    options = parser.parse_args()
    found = [json.loads(path.read_text()) for path in options.files]
    runs = [run for of in found for run in (of if isinstance(of, list) else [of])]
    if not all("title" in run and "conditions" in run for run in runs):
        parser.error("every file must be a result of benchmarks.compare, suite, cluster.scaling or report.panels")
    options.out.write_text(page(runs, options.title))


if __name__ == "__main__":
    main()
