"""What is kept of a run: nothing that names the machine, and not the time of every single call."""

from __future__ import annotations

from typing import Any


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Leave out its host name."""
    machine_info.pop("node", None)


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Leave out the times of which the statistics are made: millions of numbers."""
    for one in output_json["benchmarks"]:
        one["stats"].pop("data", None)
