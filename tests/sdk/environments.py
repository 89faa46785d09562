"""Environments of client versions: created once from committed locks, separate from the service's own.

Python: `requirements/<name>.txt`, installed with its hashes. Node: `node/<name>/package-lock.json`. An environment is
created again when its lock has changed, and not otherwise. Its directory has its lock's digest in its name: uv keeps
what it learnt about an interpreter by path, and once took a new environment for the system at the path of an old one.
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

STAMP = "complete"

# Raises `PackageNotFoundError` if the environment's own interpreter does not find the client.
FIND = "import importlib.metadata, sys; importlib.metadata.distribution(sys.argv[1])"


def python_environment(name: str) -> Path:
    """Return the directory of the Python environment, created if necessary."""
    lock = HERE / "requirements" / f"{name}.txt"
    with _alone(name):
        home = _home(name, lock)
        if (home / STAMP).exists():
            return home
        _clear(name)
        uv = [sys.executable, "-m", "uv"]
        _run(*uv, "venv", "--quiet", "--python", sys.executable, str(home))
        install = ("pip", "install", "--quiet", "--require-hashes", "--no-deps", "--compile-bytecode")
        _run(*uv, *install, "--python", str(home / "bin" / "python"), "-r", str(lock))
        _run(str(home / "bin" / "python"), "-c", FIND, name.rpartition("-")[0])
        (home / STAMP).touch()
        return home


def node_environment(name: str) -> Path:
    """Return the directory with `node_modules`, created if necessary. Skips the test without Node."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    lock = HERE / "node" / name / "package-lock.json"
    with _alone(name):
        home = _home(name, lock)
        if (home / STAMP).exists():
            return home
        _clear(name)
        shutil.copytree(lock.parent, home)
        _run("npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error", cwd=home)
        (home / STAMP).touch()
        return home


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


def _home(name: str, lock: Path) -> Path:
    digest = hashlib.blake2b(lock.read_bytes() + sys.version.encode(), digest_size=8).hexdigest()
    return CACHE / f"{name}-{digest}"


def _clear(name: str) -> None:
    """Remove the environments of earlier locks, and one whose creation was cut."""
    for old in CACHE.glob(f"{name}-*"):
        shutil.rmtree(old)


def _run(*command: str, cwd: Path | None = None) -> None:
    # An old aiohttp without a wheel for a new Python is built without a compiler.
    subprocess.run(command, cwd=cwd, check=True, env=os.environ | {"AIOHTTP_NO_EXTENSIONS": "1"})
