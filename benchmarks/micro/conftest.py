"""What is kept of a run: nothing that names the machine."""

from __future__ import annotations

from typing import Any


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Leave out its host name."""
    machine_info.pop("node", None)
