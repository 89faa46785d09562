"""Two frontends and two engines while processes, stores, disks and clocks fail (100 requests).

`python -m benchmarks.tenancy.cluster_chaos` does the same with 100,000.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.tenancy.cluster_chaos import chaos

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.timeout(600)
async def test_nothing_that_fails_costs_a_record_or_an_answer(tmp_path: Path) -> None:
    """Each admitted request has one record, the right text and the right bill; no reservation stays open."""
    result = await chaos(tmp_path, requests=100, concurrency=16, disturbances=2)
    assert result["wrong"] == {}
    assert result["requests"] == 100
    assert sum(result["disturbances"].values()) == 4
    assert result["endings"].keys() >= {"finished", "disconnected", "rejected"}
    assert sum(result["endings"].values()) == result["records"]
    assert result["billed_tokens"] > 1000
