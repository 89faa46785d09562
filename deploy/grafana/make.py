"""Generator of the dashboards: `python deploy/grafana/make.py` writes `dashboards/*.json` from `boards.py`."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grafana_foundation_sdk.builders import dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.builders.common import (
    ReduceDataOptions,
    StackingConfig,
    VizLegendOptions,
    VizTooltipOptions,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, StackingMode, TooltipDisplayMode
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DashboardLinkType, DataSourceRef

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from boards import BOARDS  # noqa: E402 - in this directory

if TYPE_CHECKING:
    from boards import Board, Panel

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
WIDTH = 24


def make(board: Board) -> str:
    """Return the JSON of a dashboard."""
    made = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.about)
        .tags(["captioner"])
        .refresh("30s")
        .time("now-3h", "now")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .readonly()
        .link(_others())
        .with_variable(dashboard.DatasourceVariable("datasource").type("prometheus").label("Prometheus"))
    )
    ids = itertools.count(1)
    for title, panels in board.rows.items():
        made.with_row(dashboard.Row(title).id(next(ids)))
        stats = all(panel.kind == "stat" for panel in panels)
        across = len(panels) if stats else min(len(panels), 3 if len(panels) % 3 == 0 else 2)
        for panel in panels:
            made.with_panel(_panel(panel).id(next(ids)).span(WIDTH // across).height(4 if stats else 8))
    return json.dumps(made.build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def _others() -> dashboard.DashboardLink:
    """Return a link that is a menu of all dashboards."""
    link = dashboard.DashboardLink("Captioner").type(DashboardLinkType.DASHBOARDS).tags(["captioner"])
    return link.as_dropdown(as_dropdown=True).keep_time(keep_time=True)


def _panel(panel: Panel) -> Any:
    built = (stat if panel.kind == "stat" else timeseries).Panel()
    built.title(panel.title).unit(panel.unit).datasource(SOURCE)
    if panel.about:
        built.description(panel.about)
    for number, (legend, expr) in enumerate(panel.exprs.items()):
        query = prometheus.Dataquery().ref_id(chr(ord("A") + number)).expr(expr).legend_format(legend or panel.title)
        built.with_target(query.exemplar(panel.unit == "s" and "histogram_quantile" in expr))
    if panel.kind == "stat":
        return built.reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
    built.min(0).legend(VizLegendOptions().display_mode(LegendDisplayMode.LIST).show_legend(show_legend=True))
    built.tooltip(VizTooltipOptions().mode(TooltipDisplayMode.MULTI)).fill_opacity(10)
    if panel.kind == "stack":
        built.stacking(StackingConfig().mode(StackingMode.NORMAL)).fill_opacity(40)
    return built


def main() -> None:
    """Write all dashboards."""
    directory = HERE / "dashboards"
    directory.mkdir(exist_ok=True)
    for board in BOARDS:
        (directory / f"{board.uid}.json").write_text(make(board))


if __name__ == "__main__":
    main()
