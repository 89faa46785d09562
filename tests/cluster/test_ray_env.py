"""Environment of Ray's processes."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from serving.cluster.ray_env import RAY_ENVIRONMENT

RAY_ENV = Path(__file__).parents[2] / "deploy" / "serve" / "ray.env"


def test_the_module_does_not_import_ray() -> None:
    """Ray reads its environment when it is imported, so the module with that environment must come first."""
    program = "import sys, serving.cluster.ray_env; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_file_for_clusters_has_the_same_variables() -> None:
    """`deploy/serve/ray.env` and `captioner cluster` give Ray the same environment."""
    assert dict(each.split("=", 1) for each in shlex.split(RAY_ENV.read_text(), comments=True)) == RAY_ENVIRONMENT
