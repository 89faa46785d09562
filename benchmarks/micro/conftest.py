"""Filters for the results that are kept: no name of the machine, and no time of every single call."""

from __future__ import annotations

from typing import Any


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Remove the host name."""
    machine_info.pop("node", None)


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Remove the times behind the statistics: millions of numbers."""
    for one in output_json["benchmarks"]:
        one["stats"].pop("data", None)
