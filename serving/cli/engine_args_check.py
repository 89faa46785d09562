"""Check of `engine_args` before an engine starts, by vLLM in a separate process: its import takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serving.config import Settings

_TIMEOUT_S = 300
_REFUSED = 2


def engine_args_problem(settings: Settings) -> str | None:
    """Return what vLLM finds wrong in `engine_args`; None if nothing, or if vLLM is not installed here."""
    if not settings.engine_args or settings.engine == "fake":
        return None
    own = {name: value for name, value in os.environ.items() if not name.startswith("CAPTIONER_")}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "serving.engine.vllm.engine_args"],
            input=json.dumps(settings.engine_args, default=str),
            env=own | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line for line in done.stdout.splitlines() if line.startswith("engine_args: ")]
    return lines[-1] if done.returncode == _REFUSED and lines else None
