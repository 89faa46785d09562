"""Run one task: `python -m tests.cuda.probe TASK ARGUMENTS RESULT`, arguments and result in JSON."""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from pathlib import Path


def main() -> None:
    """Import the build, put the made-up GPU in place, run the task, write its result."""
    task, arguments, result = sys.argv[1:]
    warnings.simplefilter("ignore")
    module, _, function = task.partition(":")
    run = getattr(importlib.import_module(f"tests.cuda.probe.{module}"), function or "run")
    Path(result).write_text(json.dumps(run(**json.loads(arguments))))


if __name__ == "__main__":
    main()
