"""The ledger while processes are killed, clients leave and the database stops (300 requests).

`python -m benchmarks.tenancy.ledger_chaos` does the same with 10,000.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.tenancy.ledger_chaos import chaos

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.timeout(600)
async def test_every_request_is_in_the_ledger_once(tmp_path: Path) -> None:
    """Each admitted request has one record with the engine's tokens and the right bill; nothing is left open."""
    result = await chaos(tmp_path, requests=300, concurrency=24, kills=2, outages=1)
    assert result["wrong"] == {}
    assert result["requests"] == 300
    assert result["kills"] == 2
    assert result["database_outages"] == 1
    # Endings are random, and of 300 a rare one may be missing.
    assert result["endings"].keys() >= {"finished", "disconnected", "rejected", "failed_midstream", "lost"}
    assert sum(result["endings"].values()) == result["records"]
    assert result["output_tokens_of_all_but_lost"]["ledger"] > 1000
