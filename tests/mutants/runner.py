"""Runs the tests of a module for each of its faults: a process for each fault, in copies of the tree."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from tests.mutants.operators import Mutant

ROOT = Path(__file__).parents[2]
_COPIED = ("serving", "tests", "benchmarks", "deploy", "helm", "pyproject.toml")
_SHARED = (".venv", ".cache")
_PRELOADED = (
    *("pytest", "hypothesis", "httpx", "numpy", "sqlalchemy", "pydantic", "pydantic_settings"),
    *("starlette.applications", "uvicorn", "redis", "alembic", "prometheus_client", "soundfile", "orjson", "aiohttp"),
)
"""Libraries that are imported once. Nothing of the project is: each process imports it with its fault."""

_OUTPUT = "output-of-tests"
_LEAST_LIMIT_S, _LIMIT_TIMES = 60.0, 10
"""A fault that lets the tests run for this time, or this multiple of their time without it, is noticed: they hang."""


@dataclass(slots=True)
class _Run:
    mutant: Mutant
    copy: Path
    latest_s: float


class Runner:
    """Runs tests in `jobs` copies of the tree, made in a directory, that this context deletes at its end."""

    def __init__(self, directory: Path, jobs: int) -> None:
        self._directory = directory
        self._jobs = jobs

    def __enter__(self) -> Self:
        sys.dont_write_bytecode = True
        for name in _PRELOADED:
            importlib.import_module(name)
        self._copies = [_copy(self._directory / f"tree-{number}") for number in range(self._jobs)]
        return self

    def __exit__(self, *exc_info: object) -> None:
        shutil.rmtree(self._directory)

    def survivors(self, module: str, tests: Sequence[str], found: Iterable[Mutant]) -> Iterator[Mutant]:
        """Yield the faults with which the tests pass. Raises `RuntimeError` if they fail without a fault."""
        limit_s = self._limit_s(module, tests)
        text = (ROOT / module).read_text()
        free, running, pending = [*self._copies], dict[int, _Run](), iter(found)
        while True:
            while free and (mutant := next(pending, None)):
                copy = free.pop()
                (copy / module).write_text(mutant.source)
                running[_start(copy, tests)] = _Run(mutant, copy, time.monotonic() + limit_s)
            if not running:
                return
            for process, run in [*running.items()]:
                if (status := _status(process, run.latest_s)) is not None:
                    del running[process]
                    (run.copy / module).write_text(text)
                    free.append(run.copy)
                    if status == 0:
                        yield run.mutant
            time.sleep(0.02)

    def _limit_s(self, module: str, tests: Sequence[str]) -> float:
        """Run the tests without a fault in each copy, which also compiles it, and return the limit of their time."""
        began_s = time.monotonic()
        for copy in self._copies:
            process = _start(copy, tests, write_bytecode=True)
            while (status := _status(process, began_s + 600)) is None:
                time.sleep(0.02)
            if status:
                raise RuntimeError(f"the tests of {module} fail without a fault:\n{(copy / _OUTPUT).read_text()}")
            for cached in (copy / module).parent.glob(f"__pycache__/{Path(module).stem}.*"):
                cached.unlink()
        return max(_LEAST_LIMIT_S, _LIMIT_TIMES * (time.monotonic() - began_s) / self._jobs)


def _copy(tree: Path) -> Path:
    tree.mkdir(parents=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".hypothesis")
    for name in _COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=ignored, symlinks=True)
        else:
            shutil.copy(ROOT / name, tree / name)
    for name in _SHARED:
        if (ROOT / name).exists():
            (tree / name).symlink_to(ROOT / name)
    return tree


def _start(copy: Path, tests: Sequence[str], *, write_bytecode: bool = False) -> int:
    """Run the tests in a forked process and return its id. Its exit status is 0 if all have passed."""
    if process := os.fork():
        return process
    status = 1
    try:
        os.setsid()
        os.chdir(copy)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        output = os.open(_OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        sys.dont_write_bytecode = not write_bytecode
        os.environ["PYTHONPATH"] = str(copy)
        os.environ["PYTHONDONTWRITEBYTECODE"] = "" if write_bytecode else "1"
        sys.path[:] = [str(copy), *(each for each in sys.path if each not in {"", str(ROOT)})]
        for name in [name for name in sys.modules if name.partition(".")[0] in {"serving", "tests", "benchmarks"}]:
            del sys.modules[name]
        sys.argv = ["pytest"]
        arguments = ["-x", "-q", "-n0", "-p", "no:cacheprovider", "-p", "no:benchmark"]
        arguments += ["-W", "ignore::pytest.PytestAssertRewriteWarning", *tests]
        status = int(importlib.import_module("pytest").main(arguments))
    except BaseException:  # noqa: BLE001 - no exception may reach the runner's code in this process
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _status(process: int, latest_s: float) -> int | None:
    """Return the exit status, -1 if the process is late, and `None` while it runs."""
    ended, status = os.waitpid(process, os.WNOHANG)
    if not ended and time.monotonic() < latest_s:
        return None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)  # and what the tests have started and not stopped
    if not ended:
        os.waitpid(process, 0)
        return -1
    return os.waitstatus_to_exitcode(status)
