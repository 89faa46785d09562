"""How the load changes over time, as one Locust `LoadTestShape`: `--curve` names the curve.

Load is callers at a time in a closed loop, and requests per second in an open one. There every user is a source of
`--user-rate` requests per second that does not wait for answers, so the number of users is the rate, also when Locust
spreads them over worker processes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from locust import LoadTestShape

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

SPIKE = 4
"""How much higher than before and after it."""


def _steps(at: float, options: argparse.Namespace) -> float:
    levels = [float(level) for level in options.levels.split(",")]
    return levels[min(int(at * len(levels)), len(levels) - 1)]


CURVES: dict[str, Callable[[float, argparse.Namespace], float]] = {
    "constant": lambda _, options: float(options.load),
    "ramp": lambda at, options: options.load * at,
    "steps": _steps,
    "spike": lambda at, options: options.load * (SPIKE if 0.4 <= at < 0.6 else 1),
    # On and off every few seconds, twice the load and none
    "bursts": lambda at, options: 2.0 * options.load * (int(at * options.seconds / options.burst_s) % 2 == 0),
    # A day in the run's time, from night to night: a tenth of the load at its least
    "diurnal": lambda at, options: options.load * (0.55 - 0.45 * math.cos(2 * math.pi * at)),
}
"""Load by how much of the run's time is over, 0 to 1.

`--load` is the highest; of `bursts` it is the mean, and of `spike` what is before and after it.
"""


def level(at_s: float, options: argparse.Namespace) -> float | None:
    """Load so many seconds after the start; none after the end. The warm-up has the first load."""
    measured_s = at_s - options.warm_up
    if measured_s >= options.seconds:
        return None
    return CURVES[options.curve](max(0.0, measured_s) / options.seconds, options)


def users(load: float, options: argparse.Namespace) -> int:
    """Users that make this load."""
    return round(load if options.arrivals == "closed" else load / options.user_rate)


class Shape(LoadTestShape):  # type: ignore[misc]
    """Users at every moment, for Locust."""

    def tick(self) -> tuple[int, float] | None:
        """Users, and how many to start per second: all at once."""
        options: Any = self.runner.environment.parsed_options
        load = level(self.get_run_time(), options)
        return None if load is None else (users(load, options), 100)
