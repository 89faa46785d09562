"""The runbook's changes of a release are ones that the chart takes."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.chart.rendering import CHART, ROOT

if TYPE_CHECKING:
    from pathlib import Path

TEXT = (ROOT / "deploy" / "runbook.md").read_text().replace("\\\n", " ")
CHANGES = [found.strip() for found in re.findall(r"^helm upgrade captioner (.*--set.*)$", TEXT, re.MULTILINE)]


def test_there_are_changes() -> None:
    """To scale, to read secrets anew (in two places), for more room, and for another model."""
    assert len(CHANGES) == 5


@pytest.mark.parametrize("change", CHANGES)
def test_the_chart_takes_it(helm: Path, change: str) -> None:
    """With values that look like numbers, too: a time, and a commit of digits alone."""
    change = change.replace("--reuse-values", f"-f {CHART}/profiles/2xa100-80g.yaml").replace("COMMIT", "1234567")
    command = f"'{helm}' template captioner {change}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "kind: RayService" in done.stdout
