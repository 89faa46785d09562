"""Curves of load over time, as one Locust `LoadTestShape`: `--curve` names the curve.

Load is callers at a time in a closed loop, and requests per second in an open one. In an open loop every user sends
`--user-rate` requests per second without waiting for answers, so the number of users sets the rate, also when Locust
spreads the users over worker processes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from locust import LoadTestShape

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

SPIKE = 4
"""Factor between the load during the spike and the load before and after it."""


def _steps(at: float, options: argparse.Namespace) -> float:
    levels = [float(level) for level in options.levels.split(",")]
    return levels[min(int(at * len(levels)), len(levels) - 1)]


CURVES: dict[str, Callable[[float, argparse.Namespace], float]] = {
    "constant": lambda _, options: float(options.load),
    "ramp": lambda at, options: options.load * at,
    "steps": _steps,
    "spike": lambda at, options: options.load * (SPIKE if 0.4 <= at < 0.6 else 1),
    # On and off every few seconds: twice the load, then none
    "bursts": lambda at, options: 2.0 * options.load * (int(at * options.seconds / options.burst_s) % 2 == 0),
    # A day, from night to night, in the time of the run: at least a tenth of the load
    "diurnal": lambda at, options: options.load * (0.55 - 0.45 * math.cos(2 * math.pi * at)),
}
"""Load by the elapsed share of the run, 0 to 1.

`--load` is the maximum; the mean of `bursts`; and the load before and after a `spike`.
"""


def level(at_s: float, options: argparse.Namespace) -> float | None:
    """Return the load `at_s` seconds after the start; None after the end. The warm-up has the first load."""
    measured_s = at_s - options.warm_up
    if measured_s >= options.seconds:
        return None
    return CURVES[options.curve](max(0.0, measured_s) / options.seconds, options)


def users(load: float, options: argparse.Namespace) -> int:
    """Return the number of users that make this load."""
    return round(load if options.arrivals == "closed" else load / options.user_rate)


class Shape(LoadTestShape):  # type: ignore[misc]
    """Number of users at every moment, for Locust."""

    def tick(self) -> tuple[int, float] | None:
        """Return the number of users, and the users to start per second: all at once."""
        options: Any = self.runner.environment.parsed_options
        load = level(self.get_run_time(), options)
        return None if load is None else (users(load, options), 100)
