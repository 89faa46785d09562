"""Environments of client versions: created once from committed locks, separate from the service's own.

Python: `requirements/<name>.txt`, installed with its hashes. Node: `node/<name>/package-lock.json`. An environment is
created again when its lock has changed, and not otherwise.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CACHE = ROOT / ".cache" / "sdk"

STAMP = "lock.blake2b"


def python_environment(name: str) -> Path:
    """Return the directory of the Python environment, created if necessary."""
    lock = HERE / "requirements" / f"{name}.txt"
    home = CACHE / name
    with _alone(name):
        if _is_current(home, lock):
            return home
        shutil.rmtree(home, ignore_errors=True)
        uv = [sys.executable, "-m", "uv"]
        _run(*uv, "venv", "--quiet", "--python", sys.executable, str(home))
        install = ("pip", "install", "--quiet", "--require-hashes", "--no-deps", "--compile-bytecode")
        _run(*uv, *install, "--python", str(home / "bin" / "python"), "-r", str(lock))
        return _stamped(home, lock)


def node_environment(name: str) -> Path:
    """Return the directory with `node_modules`, created if necessary. Skips the test without Node."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    lock = HERE / "node" / name / "package-lock.json"
    home = CACHE / name
    with _alone(name):
        if _is_current(home, lock):
            return home
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(lock.parent, home)
        _run("npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error", cwd=home)
        return _stamped(home, lock)


def bare_variables(home: Path) -> dict[str, str]:
    """Return a client process's variables: none of those that configure clients, and `home` for their files."""
    return {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8"}


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """Create the environment in one test process only: the others wait, and find it complete."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _digest(lock: Path) -> str:
    return hashlib.blake2b(lock.read_bytes() + sys.version.encode()).hexdigest()


def _is_current(home: Path, lock: Path) -> bool:
    stamp = home / STAMP
    return stamp.is_file() and stamp.read_text() == _digest(lock)


def _stamped(home: Path, lock: Path) -> Path:
    (home / STAMP).write_text(_digest(lock))
    return home


def _run(*command: str, cwd: Path | None = None) -> None:
    # An old aiohttp without a wheel for a new Python is built without a compiler.
    subprocess.run(command, cwd=cwd, check=True, env=os.environ | {"AIOHTTP_NO_EXTENSIONS": "1"})
