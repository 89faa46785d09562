"""The chart accepts the release changes of the runbook."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.chart.rendering import CHART, REQUIRED, ROOT

if TYPE_CHECKING:
    from pathlib import Path

TEXT = (ROOT / "deploy" / "runbook.md").read_text().replace("\\\n", " ")
CHANGES = [found.strip() for found in re.findall(r"^helm upgrade captioner (.*--set.*)$", TEXT, re.MULTILINE)]


def test_all_changes_are_found() -> None:
    """The runbook scales, reloads secrets (twice), enlarges the claim and changes the model."""
    assert len(CHANGES) == 5


@pytest.mark.parametrize("change", CHANGES)
def test_the_chart_accepts_a_change(helm: Path, change: str) -> None:
    """It renders, even with text that looks like a number: a time, and a commit that has only digits."""
    change = change.replace("--reuse-values", f"-f {CHART}/profiles/2xa100-80g.yaml -f {REQUIRED}").replace(
        "COMMIT", "1234567"
    )
    command = f"'{helm}' template captioner {change}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "kind: RayService" in done.stdout
