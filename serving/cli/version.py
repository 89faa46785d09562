"""Version of the package, with the commit where it is known."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_COMMIT = _PACKAGE / "commit.txt"
"""Commit of a built package; `hatch_build.py` writes it."""

_SHOWN = 12
"""Digits of a commit that are shown."""


def version() -> str:
    """Return the version of the installed package."""
    return importlib.metadata.version("captioner")


def described() -> str:
    """Return the version, and the commit where it is known: `0.2.0 (commit 3f2a…)`."""
    found = commit()
    return f"{version()} (commit {found[:_SHOWN]}{found[40:]})" if found else version()


def commit() -> str:
    """Return the commit: of a built package, of an installation from Git, or of the checkout; empty if unknown.

    ` with changes` follows where files of the checkout differ from the commit.
    """
    try:
        recorded = _COMMIT.read_text().strip()
    except OSError:
        recorded = ""
    return next((found for found in (recorded, _of_installation(), _of_checkout()) if _is_commit(found[:40])), "")


def _of_installation() -> str:
    """Return the commit that an installer recorded (PEP 610)."""
    try:
        text = importlib.metadata.distribution("captioner").read_text("direct_url.json") or "{}"
        return str(json.loads(text).get("vcs_info", {}).get("commit_id", ""))
    except (importlib.metadata.PackageNotFoundError, ValueError, AttributeError):
        return ""


def _of_checkout() -> str:
    """Return the commit of the Git checkout that this file is in."""
    if not (_PACKAGE.parent / ".git").exists():
        return ""
    try:
        head, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return ""
    return head + (" with changes" if changes else "")


def _git(*words: str) -> str:
    command = ["git", "-C", str(_PACKAGE.parent), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)  # noqa: S603 - no input
    return done.stdout.strip()


def _is_commit(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{40}", text) is not None
