"""Tests that share an engine, a cluster or a file's fixtures run in one worker of `pytest -n`."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

TESTS = """
import pytest

@pytest.mark.parametrize("number", range(8))
def test(number, worker_id):
    with open("{log}", "a") as log:
        print("{name}", worker_id, file=log)
"""


def test_a_file_runs_in_one_worker(tmp_path: Path) -> None:
    """With this repository's conftest.py, xdist and pytest agree on where the group of a test is written."""
    log = tmp_path / "log"
    for name in ("one", "two"):
        (tmp_path / f"test_{name}.py").write_text(TESTS.format(name=name, log=log))
    (tmp_path / "conftest.py").write_text("from tests.conftest import pytest_collection_modifyitems\n")
    flags = ["-n2", "--dist=loadgroup", "-q", "-pno:cacheprovider", f"--rootdir={tmp_path}", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = log.read_text().splitlines()
    assert len(lines) == 16
    assert len(set(lines)) == 2
