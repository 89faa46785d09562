"""deploy/security.md and the tests that it names."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent


def test_every_test_that_is_named_exists() -> None:
    """Every test that deploy/security.md names exists: each promise has its test."""
    text = (ROOT / "deploy" / "security.md").read_text()
    found = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`|`…::(\w+)`", text)
    assert len(found) > 20
    path = TESTS
    for file, name, further in found:
        if file:
            path = ROOT / file if file.startswith("benchmarks/") else TESTS / file
        assert path.is_file(), path
        assert (name or further) in path.read_text()
