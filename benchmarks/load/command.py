"""Command line of a Locust run with this package's user."""

from __future__ import annotations

import sys
from pathlib import Path

LOCUSTFILE = Path(__file__).with_name("locustfile.py")


def locust_command(host: str, journal: Path, *options: str) -> list[str]:
    """Return the command; its environment needs `program.module_environment()`."""
    locust = [sys.executable, "-m", "locust", "--headless", "--only-summary", "-f", str(LOCUSTFILE)]
    return [*locust, f"--host={host}", f"--journal={journal}", *options]
