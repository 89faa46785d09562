"""The contract of `serving/tenancy/BILLS.md`: each row of its tables, through the HTTP API, on every store."""

from __future__ import annotations

import re
import signal
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import redis
import sqlalchemy as sa

from serving.tenancy import database as databases
from serving.tenancy import schema
from serving.tenancy.billing import prices
from serving.tenancy.billing.prices import Price
from serving.types import Region
from tests.support.wire import COMPATIBLE, compatible_body
from tests.tenancy.billed_service import ALL_LIMITS, CLIP, NEW_YEAR_MS, NOON_MS, BilledService, billed_service
from tests.tenancy.running import Command
from tests.tenancy.scenarios import SCENARIOS
from tests.tenancy.test_usage_session import KEY, TENANT

if TYPE_CHECKING:
    from collections.abc import Mapping

PAGE = Path(__file__).parents[2] / "serving/tenancy/BILLS.md"


def table(name: str) -> dict[str, dict[str, str]]:
    """Return the page's table of that name: cells by the first column and the heading."""
    [text] = re.findall(rf"<!-- {name}:.*?-->\n(.*?)<!-- /{name} -->", PAGE.read_text(), re.DOTALL)
    heads, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines()]
    return {row[0]: dict(zip(heads[1:], row[1:], strict=True)) for row in rows}


ENDINGS = table("endings")
TENANTS = {name: f"row-{number}" for number, name in enumerate(ENDINGS)}


def tenants() -> Mapping[str, Mapping[str, Any]]:
    """Return a tenant for each row, with all limits, and two that hold the engine and its queue."""
    chosen: dict[str, Mapping[str, Any]] = {"blocker": {}, "waiter": {}}
    for name, tenant in TENANTS.items():
        limits = dict(SCENARIOS[name][1])
        quota = {"free_tokens": limits.pop("free_tokens"), "free_days": 90} if "free_tokens" in limits else {}
        chosen[tenant] = {"limits": {**ALL_LIMITS, **limits}, **quota}
    return chosen


def with_prices(database_url: str) -> sa.Engine:
    """Return the database, with tables, the manual's price, and another one from the new year on."""
    database = databases.connect(database_url)
    databases.migrate(database)
    with database.begin() as connection:
        connection.execute(schema.prices.delete())
        for valid_from, of_input, of_output in ((0, "0.0158", "0.0127"), (NEW_YEAR_MS, "0.02", "0.03")):
            price = Price.of("CNY", Decimal(of_input), Decimal(of_output))
            connection.execute(schema.prices.insert(), prices.row(Region.BEIJING, valid_from, price))
    return database


def empty_redis(request: pytest.FixtureRequest) -> str:
    """Return the address of a Redis without counters of other tests, whose tenants have the same names."""
    url: str = request.getfixturevalue("redis_server").url
    with redis.Redis.from_url(url) as client:
        client.flushall()
    return url


async def found(service: BilledService, name: str) -> dict[str, str]:
    """Run a row's scenario and return the cells that describe what it left."""
    tenant = TENANTS[name]
    service.engine.write()
    service.stores.now_ms = NOON_MS
    cells = {"Answer": await SCENARIOS[name][0](service, tenant)}
    service.engine.write()
    await service.settled()
    metrics = await service.metrics(tenant)
    metrics["requests rejected"] = metrics.get("requests rejected", 0) - service.probes[tenant]
    used, records = await service.used(tenant), service.records(tenant)
    assert used["concurrent-requests"] == used["concurrent-audio-seconds"] == 0
    cells["Minute"] = f"{used['requests']:.0f} / {used['tokens']:.0f} / {used['audio-seconds']:.0f}"
    cells["Budgets"] = f"{used['tokens-day']:.0f}"
    assert used["tokens-month"] == used["tokens-day"]
    outcomes = [
        f"`{series.split()[1]}`" for series, value in metrics.items() if series.startswith("requests ") and value
    ]
    cells["Metric"] = ", ".join(outcomes) or "none"
    names = ("Tokens", "Billed", "Free", "Amount, CNY")
    if not records:
        return cells | {"Record": "none", **dict.fromkeys(names, "")}
    [record] = records
    cells["Record"] = ", ".join(f"`{word}`" for word in (record.ending, record.finish_reason) if word)
    cells["Tokens"] = f"{record.input_tokens} + {record.output_tokens}"
    cells["Billed"], cells["Free"] = "yes" if record.billed else "no", str(record.free_tokens)
    cells["Amount, CNY"] = prices.money(record.amount_nanos)
    amount = record.amount_nanos / 10**9
    assert used["money-day"] == pytest.approx(amount, abs=1e-12)
    assert used["money-month"] == pytest.approx(amount, abs=1e-12)
    assert metrics.get("cost CNY", 0) == pytest.approx(amount, abs=1e-12)
    counted = [metrics.get(f"tokens {kind}", 0) for kind in ("audio", "text", "output")]
    assert counted == ([record.input_tokens - 8, 8, record.output_tokens] if record.billed else [0, 0, 0])
    if "free-tokens" in used:
        assert used["free-tokens"] == record.free_tokens
    return cells


def test_each_row_of_the_page_is_run() -> None:
    """The page and the scenarios have the same endings."""
    assert list(ENDINGS) == list(SCENARIOS)


@pytest.mark.parametrize("counters", ["memory", "redis"])
async def test_every_ending(
    counters: str, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Each ending leaves the answer, record, bill, counts and metrics that the page has."""
    with_prices(database_url).dispose()
    settings: dict[str, Any] = {"response_timeout_s": 2, "region": "beijing"}
    if counters == "redis":
        settings["redis_url"] = empty_redis(request)
    rows: dict[str, dict[str, str]] = {}
    async with billed_service(tmp_path, database_url, monkeypatch, tenants(), **settings) as service:
        for name, expected in ENDINGS.items():
            cells = await found(service, name)
            rows[name] = {heading: cells[heading] for heading in expected}
    assert rows == ENDINGS


PROCESSES = table("processes")


@pytest.mark.parametrize("counters", ["memory", "redis"])
@pytest.mark.parametrize("ending", PROCESSES)
def test_every_ending_of_a_process(
    ending: str, counters: str, database_url: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A caption whose process is stopped or killed is not billed, and counts in no budget of the next process."""
    database = with_prices(database_url)
    request.addfinalizer(database.dispose)
    stores = {"CAPTIONER_DATABASE_URL": database_url, "CAPTIONER_API_KEYS": "sk-of-the-settings"}
    if counters == "redis":
        stores["CAPTIONER_REDIS_URL"] = empty_redis(request)
    with database.begin() as connection:
        limits = {"tokens_per_day": 1000, "requests_per_minute": 100}
        connection.execute(schema.tenants.insert(), TENANT | {"limits": limits})
    slow = ("--fake-tpot-s=0.05", "--fake-tokens=10000", "--shutdown-grace-s=0.5")
    with Command(tmp_path, "serve", *slow, **stores) as service:
        service.wait(lambda: service.get("/readyz").status_code == 200)
        body = compatible_body(CLIP, stream=True)
        with httpx.stream("POST", service.url + COMPATIBLE, json=body, headers=KEY, timeout=60) as response:
            assert response.status_code == 200, response.read()
            events = response.iter_lines()
            for _ in range(5):
                next(events)
            service.process.send_signal(signal.SIGTERM if ending.startswith("stopped") else signal.SIGKILL)
            with suppress(httpx.TransportError):
                for _ in events:
                    pass
        service.process.wait(60)
    with Command(tmp_path, "serve", **stores) as service:
        service.wait(lambda: service.get("/readyz").status_code == 200)
        answer = httpx.post(service.url + COMPATIBLE, content=b"{", headers=KEY, timeout=60)

        def closed() -> Any:
            with database.connect() as connection:
                [record] = connection.execute(sa.select(schema.usage_records)).all()
            return record if record.ending else None

        record = service.wait(closed)
    budget = 1000 - int(answer.headers["x-ratelimit-remaining-tokens-day"])
    assert (record.billed, record.amount_nanos, record.free_tokens) == (False, 0, 0)
    cells = {"Record": f"`{record.ending}`", "Billed": "no", "Budgets": str(budget)}
    assert cells == PROCESSES[ending]
