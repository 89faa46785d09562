"""Charts as SVG text, for a page that is one file: lines with intervals, stacked bars, and ratios with the line at 1.

Written without a plotting library, so that the page's style sheet colours the charts for light and dark, and a chart is
a few kilobytes of text that a reader of the page can search and copy. Every text is escaped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

WIDTH = 640
COLOURS = 8
"""Series use the style sheet's colours c0 to c7 in rotation."""


_LINE = Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>')
_BOX = Markup('<rect class="part {}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>')


@dataclass(frozen=True, slots=True)
class Point:
    """A value with its least and greatest."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Ratio:
    """One figure of one system divided by another's, with its interval and the aim."""

    name: str
    middle: float
    low: float
    high: float
    aim: float | None = None
    more_is_better: bool = True

    @property
    def verdict(self) -> str:
        """`met`, `missed`, or `open` where the interval holds the aim; empty without an aim."""
        if self.aim is None:
            return ""
        if self.low <= self.aim <= self.high and self.low < self.high:
            return "open"
        better = self.middle - self.aim if self.more_is_better else self.aim - self.middle
        return "met" if better > -1e-9 else "missed"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers from below `low` to above `high`."""
    raw = max(high - low, 1e-12) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * of for of in (1, 2, 2.5, 5, 10) if power * of >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    return [round(step * (first + i), 12) for i in range(math.ceil(high / step - 1e-9) - first + 1)]


def shown(value: float) -> str:
    """Return a number with three significant digits, without an exponent."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "-"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def lines(
    title: str, x_name: str, y_name: str, series: Mapping[str, Sequence[Point]], limit: tuple[str, float] | None = None
) -> Markup:
    """Draw values over a load, from 0 up; several series are named at their ends; `limit` is a horizontal line."""
    left, top, bottom, height = 68, 14, 44, 320
    right = 110 if len(series) > 1 else 24
    points = [point for of in series.values() for point in of]
    xs = sorted({point.x for point in points})
    highest = max([point.high or point.y for point in points] + ([limit[1]] if limit else []))
    y_ticks = ticks(0, highest or 1)
    x_at = _even(xs, left + 12, WIDTH - right)

    def y_at(value: float) -> float:
        return height - bottom - (height - bottom - top) * value / y_ticks[-1]

    out = _y_axis(y_ticks, y_at, left, WIDTH - right + 8, y_name)
    out += [_text(x_at(x), height - bottom + 18, shown(x), "tick middle") for x in xs]
    out.append(_text((left + WIDTH - right) / 2, height - 6, x_name, "name middle"))
    if limit:
        y = y_at(limit[1])
        out.append(_line(left, y, WIDTH - right + 8, y, "limit"))
        out.append(_text(left + 6, y - 5, limit[0], "tick"))
    ends: list[tuple[float, str, str]] = []
    for number, (name, of) in enumerate(series.items()):
        colour = f"c{number % COLOURS}"
        path = " ".join(f"{x_at(point.x):.1f},{y_at(point.y):.1f}" for point in of)
        out.append(Markup('<polyline class="series {}" points="{}"/>').format(colour, path))
        for point in of:
            x, low, high = x_at(point.x), point.low, point.high
            if low is not None and high is not None:
                out.append(_line(x, y_at(low), x, y_at(high), f"spread {colour}"))
            tip = f"{name}: {shown(point.y)} at {shown(point.x)}"
            out.append(_mark(number, x, y_at(point.y), colour, tip))
        ends.append((y_at(of[-1].y), name, colour))
    for y, name, colour in _apart(ends, 14) if len(series) > 1 else []:
        out.append(_text(WIDTH - right + 12, y + 4, name, f"label {colour}"))
    return _svg(title, height, out)


def over_time(title: str, y_name: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> Markup:
    """Draw values over seconds, from 0 up, without marks; the names of several series are below the chart."""
    left, right, top, height, per_line = 68, 16, 14, 290, 3
    names = list(series) if len(series) > 1 else []
    rows = math.ceil(len(names) / per_line)
    bottom = 44
    last = max((at for of in series.values() for at, _ in of), default=1) or 1
    y_ticks = ticks(0, max((value for of in series.values() for _, value in of), default=1) or 1)

    def x_at(seconds: float) -> float:
        return left + (WIDTH - right - left) * seconds / last

    def y_at(value: float) -> float:
        return height - bottom - (height - bottom - top) * value / y_ticks[-1]

    out = _y_axis(y_ticks, y_at, left, WIDTH - right, y_name)
    out += [_text(x_at(at), height - bottom + 18, shown(at), "tick middle") for at in ticks(0, last) if at <= last]
    out.append(_text((left + WIDTH - right) / 2, height - 6, "seconds", "name middle"))
    for number, of in enumerate(series.values()):
        path = " ".join(f"{x_at(at):.1f},{y_at(value):.1f}" for at, value in of)
        out.append(Markup('<polyline class="series c{}" points="{}"/>').format(number % COLOURS, path))
    for number, name in enumerate(names):
        x, y = 10 + number % per_line * (WIDTH - 20) / per_line, height + 6 + 20 * (number // per_line)
        out.append(_box(x, y, (12, 12), f"c{number % COLOURS}", name))
        out.append(_text(x + 17, y + 11, name, "tick"))
    return _svg(title, height + 24 * rows, out)


def bars(title: str, x_name: str, rows: Mapping[str, Mapping[str, float]]) -> Markup:
    """Draw a bar for each row, of the same parts in the same order, with the sum at its end."""
    left, right, row_height, legend = 150, 60, 30, 24
    parts = list(dict.fromkeys(part for row in rows.values() for part, value in row.items() if value))
    highest = max((sum(row.values()) for row in rows.values()), default=1) or 1
    marks = ticks(0, highest)
    per_line = 4
    top = 10 + legend * math.ceil(len(parts) / per_line)
    height = top + row_height * len(rows) + 44
    scale = (WIDTH - left - right) / marks[-1]
    out = []
    for number, part in enumerate(parts):
        x, y = 10 + number % per_line * (WIDTH - 20) / per_line, 8 + legend * (number // per_line)
        out.append(_box(x, y, (12, 12), f"c{number % COLOURS}", part))
        out.append(_text(x + 17, y + 11, part, "tick"))
    for value in marks:
        x = left + value * scale
        out.append(_line(x, top, x, height - 40, "grid"))
        out.append(_text(x, height - 24, shown(value), "tick middle"))
    out.append(_text((left + WIDTH - right) / 2, height - 6, x_name, "name middle"))
    for index, (name, row) in enumerate(rows.items()):
        y, x = top + index * row_height + 5, float(left)
        out.append(_text(left - 8, y + 14, name, "tick end"))
        for number, part in enumerate(parts):
            if value := row.get(part, 0.0):
                out.append(
                    _box(x, y, (value * scale, row_height - 10), f"c{number % COLOURS}", f"{part}: {shown(value)}")
                )
                x += value * scale
        out.append(_text(x + 6, y + 14, shown(sum(row.values())), "tick"))
    return _svg(title, height, out)


def forest(title: str, rows: Sequence[Ratio]) -> Markup:
    """Draw ratios on a logarithmic scale with their intervals, the line at 1, and a mark at each aim."""
    left, right, row_height, top = 230, 150, 26, 10
    values = [value for row in rows for value in (row.low, row.high, row.aim or 1.0, 1.0)]
    marks = _log_ticks(min(values), max(values))
    low, high = math.log(min(marks[0], *values)), math.log(max(marks[-1], *values))
    height = top + row_height * len(rows) + 40

    def x_at(value: float) -> float:
        return left + (WIDTH - left - right) * (math.log(value) - low) / (high - low)

    out = []
    for value in marks:
        out.append(_line(x_at(value), top, x_at(value), height - 36, "one" if value == 1 else "grid"))
        out.append(_text(x_at(value), height - 20, shown(value), "tick middle"))
    out.append(_text((left + WIDTH - right) / 2, height - 4, "ratio (logarithmic)", "name middle"))
    for index, row in enumerate(rows):
        y = top + index * row_height + 13
        out.append(_text(left - 10, y + 4, row.name, "tick end"))
        aim = f"; aim {shown(row.aim)}: {row.verdict}" if row.aim is not None else ""
        if row.aim is not None:
            out.append(_line(x_at(row.aim), y - 9, x_at(row.aim), y + 9, "aim"))
        out.append(_line(x_at(row.low), y, x_at(row.high), y, f"range {row.verdict}"))
        out.append(_mark(0, x_at(row.middle), y, f"of-ratio {row.verdict}", f"{row.name}: {shown(row.middle)}{aim}"))
        figures = f"{row.middle:.2f} ({row.low:.2f} to {row.high:.2f})"
        out.append(_text(WIDTH - right + 8, y + 4, figures, f"tick {row.verdict}"))
    return _svg(title, height, out)


def _log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers about a factor of 2 apart that enclose both."""
    rounds = [of * 10.0**power for power in range(-4, 5) for of in (1, 2, 5)]
    below = max((of for of in rounds if of <= low * 1.001), default=rounds[0])
    above = min((of for of in rounds if of >= high * 0.999), default=rounds[-1])
    return [of for of in rounds if below <= of <= above] if below < above else [below / 2, below, below * 2]


def _even(xs: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    """Return positions at even distances, since loads are mostly powers of 2."""
    step = (end - start) / max(len(xs) - 1, 1)
    return lambda x: start + step * xs.index(x)


def _apart(ends: Sequence[tuple[float, str, str]], least: float) -> list[tuple[float, str, str]]:
    """Return labels moved down until none covers another."""
    placed: list[tuple[float, str, str]] = []
    for y, name, colour in sorted(ends):
        placed.append((max(y, placed[-1][0] + least) if placed else y, name, colour))
    return placed


def _y_axis(marks: Sequence[float], y_at: Callable[[float], float], left: float, end: float, name: str) -> list[Markup]:
    out = []
    for value in marks:
        out.append(_line(left, y_at(value), end, y_at(value), "grid"))
        out.append(_text(left - 8, y_at(value) + 4, shown(value), "tick end"))
    middle = (y_at(marks[0]) + y_at(marks[-1])) / 2
    turned = Markup('<text class="name middle" transform="rotate(-90 14 {:.1f})" x="14" y="{:.1f}">{}</text>')
    return [*out, turned.format(middle, middle + 4, name)]


def _mark(number: int, x: float, y: float, kind: str, tip: str) -> Markup:
    """Draw a circle, square, rhombus or triangle, so that series differ without colour, too."""
    shapes = (
        f"M{x - 4:.1f},{y:.1f}a4,4 0 1,0 8,0a4,4 0 1,0 -8,0",
        f"M{x - 4:.1f},{y - 4:.1f}h8v8h-8z",
        f"M{x:.1f},{y - 5:.1f}l5,5l-5,5l-5,-5z",
        f"M{x:.1f},{y - 5:.1f}l5,9h-10z",
    )
    return Markup('<path class="mark {}" d="{}"><title>{}</title></path>').format(kind, shapes[number % 4], tip)


def _text(x: float, y: float, text: str, kind: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(kind, x, y, text)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return _LINE.format(kind, x1, y1, x2, y2)


def _box(x: float, y: float, size: tuple[float, float], kind: str, tip: str) -> Markup:
    return _BOX.format(kind, x, y, *size, tip)


def _svg(title: str, height: float, parts: Sequence[Markup]) -> Markup:
    opening = Markup('<svg viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">').format(WIDTH, height, title)
    return Markup("\n").join([opening, *parts, Markup("</svg>")])
