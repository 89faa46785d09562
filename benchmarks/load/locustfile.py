"""Locust file: one user class, one shape. Options and figures: `users.py`.

    locust --headless -f benchmarks/load/locustfile.py --host http://127.0.0.1:8000 --arrivals poisson --load 4 …

Start it from the repository's root; elsewhere set PYTHONPATH to the root.
"""

from __future__ import annotations

from benchmarks.load.shapes import Shape
from benchmarks.load.users import Caller

__all__ = ["Caller", "Shape"]
