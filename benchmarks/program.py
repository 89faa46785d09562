"""Paths, option parsers and result files that the programs of this package share."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).parents[1]
"""Root of the checkout."""
RESULTS = ROOT / "benchmarks" / "results"
CLIPS = ROOT / ".cache" / "benchmark-clips"
"""Cache of encoded clips."""
CHECKPOINT = ROOT / "serving" / "embedded" / "checkpoint"
BIN = Path(sys.executable).parent
"""Directory of `captioner`, `locust`, `ray` and `py-spy`."""
CAPTIONER = BIN / "captioner"


def option_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser that shows the main module's docstring as it is written."""
    spec = sys.modules["__main__"].__spec__
    program = f"python -m {spec.name.removesuffix('.__main__')}" if spec else None
    return argparse.ArgumentParser(program, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result, and create its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, default=str) + "\n")


def module_environment(*paths: str | Path) -> dict[str, str]:
    """Return the variable by which a child process finds this package: `paths`, the root, and what is set already."""
    before = os.environ.get("PYTHONPATH", "")
    return {"PYTHONPATH": os.pathsep.join([*map(str, paths), str(ROOT), *([before] if before else [])])}
