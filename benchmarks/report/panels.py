"""The dashboards' panels as Prometheus knows them: JSON, of which `page.py` makes a page, for where no Grafana is.

    python benchmarks/panels.py http://127.0.0.1:9090 --minutes 5 --boards captioner-overview --out panels

Writes panels.json and panels.html.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from conditions import conditions
from page import page

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "deploy/grafana"))
BOARDS: Any = importlib.import_module("boards").BOARDS

STEPS = 120
"""Values over the time that is shown."""

UNITS = {"s": "seconds", "reqps": "per second", "percentunit": "share", "none": "", "bytes": "bytes", "short": ""}


def panels(url: str, board_ids: list[str], seconds: float) -> dict[str, Any]:
    """What the panels of these dashboards show of the last seconds."""
    end = time.time()
    boards = [
        {
            "title": f"{board.title}: {row}",
            "panels": [shown for panel in of if (shown := _panel(url, panel, end - seconds, end))["series"]],
        }
        for board in BOARDS
        if board.uid in board_ids
        for row, of in board.rows.items()
    ]
    return {
        "kind": "panels",
        "title": "What the dashboards show",
        "conditions": conditions(ROOT) | {"shown": f"the last {seconds:.0f} s"},
        "boards": [board for board in boards if board["panels"]],
    }


def _panel(url: str, panel: Any, start: float, end: float) -> dict[str, Any]:
    series: dict[str, list[tuple[float, float]]] = {}
    for legend, expr in panel.exprs.items():
        asked = {"query": expr.replace("$__rate_interval", "20s"), "start": start, "end": end}
        query = urllib.parse.urlencode(asked | {"step": (end - start) / STEPS})
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
    """Ask, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of Prometheus")
    parser.add_argument("--boards", nargs="+", choices=[board.uid for board in BOARDS], default=[BOARDS[0].uid])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    options = parser.parse_args()
    found = panels(options.url, options.boards, options.minutes * 60)
    options.out.with_suffix(".json").write_text(json.dumps(found) + "\n")
    options.out.with_suffix(".html").write_text(page([found], found["title"]))


if __name__ == "__main__":
    main()
