"""Bills of random requests: ledger, usage reports, invoices, metrics and budgets agree to the nano-unit.

`python -m tests.tenancy.bill_checks` does the same with 100,000 requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from serving.tenancy import database as databases
from serving.tenancy.limits.memory import MemoryStore
from serving.tenancy.limits.redis import RedisStore
from tests.tenancy.bill_checks import compare
from tests.tenancy.test_endings import empty_redis

if TYPE_CHECKING:
    from pathlib import Path

    import sqlalchemy as sa

ENDINGS = {"cancelled", "disconnected", "failed", "failed_midstream", "finished", "partial", "rejected"}


@pytest.mark.parametrize(("seed", "named"), [(1, 100), (2, 3)])
async def test_random_requests_in_memory(tmp_path: Path, seed: int, named: int) -> None:
    """Every sum of 600 requests over two months is right, also where most tenants share the label `other`."""
    database = databases.connect(f"sqlite:///{tmp_path}/bills.db")
    databases.migrate(database)
    found = await compare(tmp_path, database, MemoryStore(), 600, seed=seed, named=named)
    database.dispose()
    assert found["endings"].keys() == ENDINGS
    assert found["free_in_part"] > 0
    assert (found["usage_reports"], found["invoices"], found["budgets"]) == (64, 50, 24)


async def test_random_requests_in_redis(tmp_path: Path, database: sa.Engine, request: pytest.FixtureRequest) -> None:
    """The same holds with counters in Redis, and with a ledger in PostgreSQL."""
    found = await compare(tmp_path, database, RedisStore(empty_redis(request)), 300, seed=3)
    assert found["endings"].keys() == ENDINGS
