"""`python -m benchmarks.gpu`: see `first.py`."""

from __future__ import annotations

import sys

from benchmarks.gpu.first import main

if __name__ == "__main__":
    sys.exit(main())
