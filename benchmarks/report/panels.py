"""Panels of the dashboards from a Prometheus, without Grafana.

    python -m benchmarks.report.panels http://127.0.0.1:9090 --minutes 5 --boards captioner-overview --out panels

Writes panels.json, a run for `page.py`, and panels.html. The dashboards are those of deploy/grafana/boards.py.
"""

from __future__ import annotations

import json
import re
import runpy
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.conditions import conditions
from benchmarks.program import ROOT, option_parser, write_json
from benchmarks.report.page import page

STEPS = 120
"""Values of a series over the time shown."""

UNITS = {"s": "seconds", "reqps": "per second", "percentunit": "share", "none": "", "bytes": "bytes", "short": ""}


def dashboards() -> list[Any]:
    """Return the dashboards of deploy/grafana, which is no package."""
    return list(runpy.run_path(str(ROOT / "deploy/grafana/boards.py"), run_name="boards")["BOARDS"])


def panels(url: str, boards: list[Any], seconds: float) -> dict[str, Any]:
    """Return what the panels of these dashboards show of the last seconds."""
    end = time.time()
    found = [
        {
            "title": f"{board.title}: {row}",
            "panels": [shown for panel in of if (shown := _panel(url, panel, end - seconds, end))["series"]],
        }
        for board in boards
        for row, of in board.rows.items()
    ]
    return {
        "kind": "panels",
        "title": "What the dashboards show",
        "conditions": conditions() | {"shown": f"the last {seconds:.0f} s"},
        "boards": [board for board in found if board["panels"]],
    }


def _panel(url: str, panel: Any, start: float, end: float) -> dict[str, Any]:
    series: dict[str, list[tuple[float, float]]] = {}
    for legend, expr in panel.exprs.items():
        parameters = {"query": expr.replace("$__rate_interval", "20s"), "start": start, "end": end}
        query = urllib.parse.urlencode(parameters | {"step": (end - start) / STEPS})
        with urllib.request.urlopen(f"{url}/api/v1/query_range?{query}", timeout=30) as answer:  # noqa: S310 - as given
            found = json.load(answer)["data"]["result"]
        for one in found:
            name = legend
            for label in re.findall(r"{{(\w+)}}", legend):
                name = name.replace(f"{{{{{label}}}}}", one["metric"].get(label, ""))
            values = [(round(at - start, 1), float(value)) for at, value in one["values"] if value != "NaN"]
            if any(value for _, value in values):
                series[name or panel.title] = values
    return {"title": panel.title, "unit": UNITS.get(panel.unit, panel.unit), "kind": panel.kind, "series": series}


def main() -> None:
    """Query Prometheus, and write the files."""
    known = {board.uid: board for board in dashboards()}
    parser = option_parser(__doc__)
    parser.add_argument("url", help="URL of Prometheus")
    parser.add_argument("--boards", nargs="+", choices=known, default=[next(iter(known))])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--out", type=Path, required=True, help="path without suffix")
    options = parser.parse_args()
    found = panels(options.url, [known[uid] for uid in options.boards], options.minutes * 60)
    write_json(options.out.with_suffix(".json"), found)
    options.out.with_suffix(".html").write_text(page([found], found["title"]))


if __name__ == "__main__":
    main()
