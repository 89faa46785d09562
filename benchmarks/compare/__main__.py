"""`python -m benchmarks.compare`: see `comparison.py`."""

from __future__ import annotations

from benchmarks.compare.comparison import main

if __name__ == "__main__":
    main()
