"""A full response that is generated twice stays within its reservation, and is billed once."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from serving.tenancy import database as databases
from serving.tenancy.schema import store_state, tenants, usage_records
from tests.engine.test_lost_engine import DIALECTS, LOSSES, TOKENS, Service, cluster, meet
from tests.engine.test_remote import until
from tests.support.wire import COMPATIBLE
from tests.tenancy.test_usage_session import TENANT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.engine.test_remote import Replica

KEY = "sk-second-second-second-second-second"
INPUT_TOKENS = 21
"""Billed input of a clip of a second: 13 tokens of audio, 8 of text."""


async def set_budget(running: Service, directory: Path, tokens: int) -> None:
    """Give the tenant of the settings' key a budget of tokens a day."""
    database = databases.connect(f"sqlite:///{directory}/captioner.db")
    with database.begin() as connection:
        connection.execute(tenants.insert(), TENANT | {"limits": {"tokens_per_day": tokens}})
        connection.execute(store_state.update().values(revision=store_state.c.revision + 1))
    database.dispose()
    async with asyncio.timeout(30):
        answer = await running.client.post(COMPATIBLE, content=b"{")
        while "x-ratelimit-limit-tokens-day" not in answer.headers:
            await asyncio.sleep(0.1)
            answer = await running.client.post(COMPATIBLE, content=b"{")


async def records(running: Service, directory: Path) -> list[Any]:
    """Return the ledger's records, once nothing is open or pending."""
    ledger = running.app.state.components.usage_sessions.ledger
    await until(lambda: not (ledger.open_records or ledger.pending))
    database = databases.connect(f"sqlite:///{directory}/captioner.db")
    with database.connect() as connection:
        found = list(connection.execute(sa.select(usage_records)).all())
    database.dispose()
    return found


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("lose", LOSSES[:1] + LOSSES[-1:])
async def test_a_second_generation_is_within_the_reservation_of_the_first(
    tmp_path: Path, lose: Callable[[Replica], Any], dialect: str
) -> None:
    """With a budget for 12 output tokens the second engine may write 12, though the first one had written eight."""
    allowed = 12
    async with cluster(tmp_path, auth=True, api_keys=[KEY]) as (running, (first, second)):
        running.client.headers["authorization"] = f"Bearer {KEY}"
        await set_budget(running, tmp_path, INPUT_TOKENS + allowed)
        asked = asyncio.create_task(running.ask(dialect))
        await until(lambda: first.fake.steps > 8)
        await meet(running, [first, second])
        await lose(first)
        answer = await asked
        assert answer.status_code == 200, answer.text
        assert '"length"' in answer.text
        usage = answer.json()["usage"]
        assert usage["output_tokens" if dialect == "native" else "completion_tokens"] == allowed < TOKENS
        assert await running.metric("captioner_engine_retries_total") == 1
        (record,) = await records(running, tmp_path)
        assert (record.ending, record.billed) == ("finished", True)
        assert (record.input_tokens, record.output_tokens) == (INPUT_TOKENS, allowed)
        # All of the budget is used, no less and no more.
        assert (await running.ask(dialect)).status_code == 429


@pytest.mark.parametrize("lose", LOSSES[:1])
async def test_what_two_engines_lost_leaves_the_budget_as_it_was(
    tmp_path: Path, lose: Callable[[Replica], Any]
) -> None:
    """A caption that two engines lose is not billed, and its reservation is released: the next one has it all."""
    async with cluster(tmp_path, replicas=3, auth=True, api_keys=[KEY]) as (running, (first, second, third)):
        running.client.headers["authorization"] = f"Bearer {KEY}"
        await set_budget(running, tmp_path, INPUT_TOKENS + TOKENS)
        second.fake._tpot_s = 0.05
        asked = asyncio.create_task(running.ask("native"))
        await until(lambda: first.fake.steps > 3)
        await meet(running, [first, second])
        await lose(first)
        await until(lambda: second.fake.steps > 3)
        await lose(second)
        assert (await asked).status_code in {500, 503}
        (lost,) = await records(running, tmp_path)
        assert (lost.billed, lost.amount_nanos) == (False, 0)
        await meet(running, [third])
        answer = await running.ask("native")
        assert answer.json()["usage"]["output_tokens"] == TOKENS
        assert (await running.ask("native")).status_code == 429
