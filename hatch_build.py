"""Build hook: wheels and sdists carry the commit that they were built from, for `captioner --version`."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_NAME = "serving/commit.txt"


class CommitHook(BuildHookInterface):
    """Adds `serving/commit.txt`, where the source is a Git checkout; an sdist has it already."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the file. An editable installation has none: it is the checkout, whose commit changes."""
        root = Path(self.root)
        if version == "editable" or (root / _NAME).exists() or not (root / ".git").exists():
            return
        try:
            done = subprocess.run(
                ["git", "-C", self.root, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return
        with tempfile.NamedTemporaryFile("w", prefix="captioner-commit-", delete=False) as file:
            file.write(done.stdout)
        self._file = Path(file.name)
        build_data["force_include"][file.name] = _NAME

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        """Remove the temporary file."""
        if file := getattr(self, "_file", None):
            file.unlink(missing_ok=True)
