"""The caption that README shows: the same each time, by the command that README shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.support.service import RunningService

ROOT = Path(__file__).parents[2]


def test_the_first_caption_is_repeatable(embedded_service: RunningService) -> None:
    """Without a temperature in the request, captions of the stand-in are equal, and as README says."""
    captioner = Path(sys.executable).with_name("captioner")
    sample = ROOT / "serving" / "embedded" / "sample.mp3"
    command = [str(captioner), "caption", "--url", embedded_service.url, str(sample)]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout for _ in range(2)
    )
    assert first == second
    shown = re.search(r"^The audio clip lasts .*?\n```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert shown is not None
    assert first.split() == shown[0].removesuffix("```").split()
