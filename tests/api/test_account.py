"""`/v1/usage` and `/v1/limits`: a tenant reads its own account, exactly, and nobody else's."""

from __future__ import annotations

import asyncio
import csv
import datetime as dt
import io
import threading
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import sqlalchemy as sa

from serving.api.app import create_app
from serving.config import Settings
from serving.tenancy import schema
from serving.tenancy.admin.service import Administration
from serving.tenancy.billing import reports
from serving.tenancy.database import connect, migrate
from serving.tenancy.key_hashing import Pepper
from tests.support.wire import COMPATIBLE, compatible_body, data_url, wav
from tests.tenancy.test_reports import DAY_MS, DECEMBER_MS, record

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("in_process")

RANGE = {"since": "2026-12-01", "until": "2026-12-02"}


@dataclass
class Account:
    """The application with two tenants, of which one has two keys, and a client."""

    client: httpx.AsyncClient
    keys: dict[str, tuple[str, str]]
    """Id and secret of each key, by its name."""
    database: sa.Engine

    async def get(self, path: str, key: str = "laptop", accept: str = "", **query: str) -> httpx.Response:
        """Return the answer for a key."""
        headers = {"authorization": f"Bearer {self.keys[key][1]}"} | ({"accept": accept} if accept else {})
        return await self.client.get(path, params=query, headers=headers)

    def add(self, *rows: dict[str, Any]) -> None:
        """Add records to the ledger."""
        with self.database.begin() as connection:
            connection.execute(schema.usage_records.insert(), [*rows])


@asynccontextmanager
async def running(directory: Path, limits: dict[str, Any] | None = None, **changes: object) -> AsyncIterator[Account]:
    """Run the application."""
    given = {"engine": "fake", "audio_workers": 1, "stream_flush_interval_s": 0, **changes}
    settings = Settings(data_dir=directory, uploads_dir=directory / "uploads", **given)  # type: ignore[arg-type]
    database = connect(f"sqlite:///{directory / 'captioner.db'}")
    migrate(database)
    admin = Administration(database, Pepper.of(settings), "test")
    admin.create_tenant("acme", plan="unlimited", limits=limits or {})
    admin.create_tenant("umbrella", plan="unlimited")
    made = {
        "laptop": admin.create_key("acme", name="laptop"),
        "formula": admin.create_key("acme", name="=1+1", limits={"tokens_per_minute": 5000}),
        "other": admin.create_key("umbrella", name="other"),
    }
    keys = {name: (key["id"], secret) for name, (key, secret) in made.items()}
    app = create_app(settings)
    async with app.router.lifespan_context(app):
        await app.state.components.engine.start()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://captioner") as client:
            yield Account(client, keys, database)
    database.dispose()


def fill(account: Account) -> None:
    """Add four records of acme on two days, and one of umbrella."""
    laptop, formula, other = (account.keys[name][0] for name in ("laptop", "formula", "other"))
    account.add(
        record(1, DECEMBER_MS, key=laptop),
        record(2, DECEMBER_MS + DAY_MS - 1, key=formula, audio_ms=1500),
        record(3, DECEMBER_MS + DAY_MS, key=laptop, free_tokens=45, amount_nanos=0),
        record(4, DECEMBER_MS + DAY_MS, key=laptop, currency="USD", amount_nanos=1),
        record(5, DECEMBER_MS, tenant="umbrella", key=other),
        record(6, DECEMBER_MS + 2 * DAY_MS, key=laptop),
    )


async def test_usage_by_day_and_key(tmp_path: Path) -> None:
    """Rows by day and key, with names of keys, and totals by currency; amounts are exact."""
    async with running(tmp_path) as service:
        fill(service)
        answer = await service.get("/v1/usage", **RANGE)
        assert answer.status_code == 200, answer.text
        assert answer.headers["cache-control"] == "no-store"
        body = answer.json()
        laptop = service.keys["laptop"][0]
        of_laptop: dict[str, Any] = {"key": laptop, "key_name": "laptop"}
        one: dict[str, Any] = {
            "requests": 1,
            "billed_requests": 1,
            "open_requests": 0,
            "input_tokens": 21,
            "output_tokens": 24,
        }
        rows = sorted(body["data"], key=lambda row: (row["day"], row["key_name"], row["currency"]))
        assert rows == [
            {
                "day": "2026-12-01",
                "key": service.keys["formula"][0],
                "key_name": "=1+1",
                "currency": "CNY",
                **one,
                "free_tokens": 0,
                "audio_seconds": 1.5,
                "amount": "0.0006366",
            },
            {
                "day": "2026-12-01",
                "currency": "CNY",
                "free_tokens": 0,
                "audio_seconds": 1.0,
                "amount": "0.0006366",
                **(one | of_laptop),
            },
            {
                "day": "2026-12-02",
                "currency": "CNY",
                "free_tokens": 45,
                "audio_seconds": 1.0,
                "amount": "0.00",
                **(one | of_laptop),
            },
            {
                "day": "2026-12-02",
                "currency": "USD",
                "free_tokens": 0,
                "audio_seconds": 1.0,
                "amount": "0.000000001",
                **(one | of_laptop),
            },
        ]
        sums = {"billed_requests": 3, "open_requests": 0, "input_tokens": 63, "output_tokens": 72, "free_tokens": 45}
        assert body["totals"] == [
            {"currency": "CNY", "requests": 3, **sums, "audio_seconds": 3.5, "amount": "0.0012732"},
            {"currency": "USD", **one, "free_tokens": 0, "audio_seconds": 1.0, "amount": "0.000000001"},
        ]
        assert (body["tenant"], body["since"], body["until"], body["metered"]) == ("acme", *RANGE.values(), True)


async def test_usage_is_the_callers_own(tmp_path: Path) -> None:
    """No parameter shows another tenant's data, and the default range is this month."""
    async with running(tmp_path) as service:
        fill(service)
        other = (await service.get("/v1/usage", "other", **RANGE)).json()
        assert [row["key_name"] for row in other["data"]] == ["other"]
        for name in ("tenant", "keys", "tenant_id"):
            refused = await service.get("/v1/usage", **{name: "umbrella"})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)
        today = dt.datetime.now(dt.UTC).date()
        body = (await service.get("/v1/usage", by="day")).json()
        assert (body["since"], body["until"]) == (today.replace(day=1).isoformat(), today.isoformat())
        assert "key" not in (body["data"] or [{}])[0]
        assert (await service.client.get("/v1/usage")).json()["error"]["code"] == "invalid_api_key"
        assert (await service.client.get("/v1/limits")).status_code == 401


async def test_csv(tmp_path: Path) -> None:
    """CSV comes for `format` and for `accept`, has one row for each of `data`, and no cell is a formula."""
    async with running(tmp_path) as service:
        fill(service)
        wanted = [
            await service.get("/v1/usage", **RANGE, format="csv"),
            await service.get("/v1/usage", **RANGE, accept="text/csv"),
        ]
        assert wanted[0].text == wanted[1].text
        assert wanted[0].headers["content-type"] == "text/csv; charset=utf-8"
        name = "usage-acme-2026-12-01-2026-12-02.csv"
        assert wanted[0].headers["content-disposition"] == f'attachment; filename="{name}"'
        rows = list(csv.DictReader(io.StringIO(wanted[0].text)))
        assert len(rows) == 4
        assert {row["key_name"] for row in rows} == {"laptop", "'=1+1"}
        assert [*rows[0]] == [
            *("day", "key", "key_name", "currency", "requests", "billed_requests", "open_requests", "input_tokens"),
            *("output_tokens", "free_tokens", "audio_seconds", "amount"),
        ]
        by_day = await service.get("/v1/usage", since="2026-11-01", until="2026-11-02", by="day", format="csv")
        assert by_day.text.startswith("day,currency,requests,")
        json_first = await service.get("/v1/usage", accept="application/json, text/csv", **RANGE)
        assert json_first.json()["object"] == "usage"
        limits = await service.get("/v1/limits", "formula", format="csv")
        assert limits.text == (
            "scope,limit,max,used,remaining,unit,resets_in_s,ends_at\r\nkey,tokens_per_minute,5000,0,5000,tokens,0,\r\n"
        )


BAD_QUERIES: list[tuple[str, dict[str, str]]] = [
    ("since", {"since": "2026-13-01"}),
    ("since", {"since": "2026-12-02", "until": "2026-12-01"}),
    ("since", {"since": "2025-12-01", "until": "2026-12-02"}),
    ("until", {"until": "yesterday"}),
    ("until", {"until": "20261101"}),
    ("until", {"since": "0001-01-01", "until": "0001-01-02"}),
    ("until", {"until": "9999-12-31"}),
    ("by", {"by": "tenant"}),
    ("by", {"by": ""}),
    ("by", {"by": "day,day"}),
    ("format", {"format": "xml"}),
    ("page", {"page": "2"}),
]


async def test_bad_queries(tmp_path: Path) -> None:
    """A query that cannot be answered is 400 in the OpenAI dialect, with the parameter's name."""
    async with running(tmp_path) as service:
        for param, query in BAD_QUERIES:
            answer = await service.get("/v1/usage", **query)
            assert answer.status_code == 400, answer.text
            error = answer.json()["error"]
            kind = (error["type"], error["code"], error["param"])
            assert kind == ("invalid_request_error", "invalid_parameter_error", param)
        refused = await service.get("/v1/limits", by="day")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "by")
        year = await service.get("/v1/usage", since="2025-12-02", until="2026-12-02", format="json")
        assert year.status_code == 200


LIMITS = {
    "requests_per_minute": 60,
    "tokens_per_minute": 100_000,
    "audio_seconds_per_minute": 600,
    "concurrent_requests": 8,
    "tokens_per_month": 50_000,
    "money_per_day": "2.5",
}


async def test_limits_state_what_is_left(tmp_path: Path) -> None:
    """After a caption each limit states its use, from the counters or the ledger, and reading them counts only once."""
    async with running(tmp_path, LIMITS) as service:
        header = {"authorization": f"Bearer {service.keys['laptop'][1]}"}
        body = compatible_body(data_url(wav(2)))
        answer = await service.client.post(COMPATIBLE, json=body, headers=header)
        assert answer.status_code == 200, answer.text
        for _ in range(50):
            found = (await service.get("/v1/limits")).json()
            rows = {row["limit"]: row for row in found["data"]}
            if rows["tokens_per_month"]["used"]:
                break
            await asyncio.sleep(0.1)
        asked = int(rows["requests_per_minute"]["used"])
        assert rows["requests_per_minute"]["remaining"] == 60 - asked
        assert (await service.get("/v1/limits")).json()["data"][0]["used"] == asked + 1
        shown = {name: (row["max"], row["used"], row["remaining"]) for name, row in rows.items()}
        # 25 + 8 tokens of input and 24 of output, at 0.0158 and 0.0127 for 1,000.
        assert shown["tokens_per_minute"] == (100_000, 57, 99_943)
        assert shown["audio_seconds_per_minute"] == (600, 2.0, 598.0)
        assert shown["concurrent_requests"] == (8, 0, 8)
        assert shown["tokens_per_month"] == (50_000, 57, 49_943)
        assert shown["money_per_day"] == ("2.50", "0.0008262", "2.4991738")
        assert rows["money_per_day"]["unit"] == "CNY"
        assert {row["scope"] for row in rows.values()} == {"tenant"}
        assert 0 < rows["money_per_day"]["resets_in_s"] <= 86_400
        assert found["price"] == {"currency": "CNY", "per_tokens": 1000, "input": "0.0158", "output": "0.0127"}
        assert (found["tenant"], found["key"]) == ("acme", service.keys["laptop"][0])
        of_key = (await service.get("/v1/limits", "formula")).json()["data"]
        assert ("key", "tokens_per_minute", 5000) in [(row["scope"], row["limit"], row["max"]) for row in of_key]
        assert not (await service.get("/v1/limits", "other")).json()["data"]


async def test_the_free_quota(tmp_path: Path) -> None:
    """The free quota states its tokens, those used and its end."""
    async with running(tmp_path) as service:
        with service.database.begin() as connection:
            tenants = schema.tenants
            changes = {"free_tokens": 1000, "free_days": 90, "activated_at": DECEMBER_MS}
            connection.execute(tenants.update().where(tenants.c.id == "acme"), changes)
            revision = schema.store_state.c.revision
            connection.execute(schema.store_state.update().values(revision=revision + 1))
        service.add(record(1, DECEMBER_MS, key=service.keys["laptop"][0], free_tokens=45, amount_nanos=0))
        for _ in range(50):
            if rows := (await service.get("/v1/limits")).json()["data"]:
                break
            await asyncio.sleep(0.1)
        assert rows == [
            {
                "scope": "tenant",
                "limit": "free_tokens",
                "max": 1000,
                "used": 45,
                "remaining": 955,
                "unit": "tokens",
                "resets_in_s": None,
                "ends_at": "2027-03-01T00:00:00Z",
            }
        ]


@pytest.mark.parametrize("path", ["/v1/usage", "/v1/limits"])
async def test_reports_count_as_requests(tmp_path: Path, path: str) -> None:
    """Past the minute's requests a report is 429 with `retry-after`; a budget that is used up refuses none."""
    async with running(tmp_path, {"requests_per_minute": 3, "tokens_per_day": 0}) as service:
        statuses = [(await service.get(path)).status_code for _ in range(4)]
        assert statuses == [200, 200, 200, 429]
        refused = await service.get(path)
        assert refused.json()["error"]["code"] == "limit_requests"
        assert 1 <= int(refused.headers["retry-after"]) <= 61


async def test_without_authentication(tmp_path: Path) -> None:
    """Without authentication each key that is sent has its own account, without limits."""
    async with running(tmp_path, auth=False) as service:
        bodies = [(await service.get(path, key)).json() for path in ("/v1/usage", "/v1/limits") for key in service.keys]
        tenants = {body["tenant"] for body in bodies}
        assert len(tenants) == 3
        assert all(tenant.startswith("anonymous-") for tenant in tenants)
        assert (await service.client.get("/v1/usage")).json()["tenant"] == "anonymous"
        assert not any(body["data"] for body in bodies)


async def test_without_metering(tmp_path: Path) -> None:
    """Without metering the reports are empty and say why."""
    async with running(tmp_path, LIMITS, metering=False) as service:
        for path in ("/v1/usage", "/v1/limits"):
            body = (await service.get(path)).json()
            assert (body["metered"], body["data"]) == (False, [])


async def test_the_database_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report that cannot be read is 503 with `retry-after`, and shows nothing of the database."""

    def away(*_: Any, **__: Any) -> None:
        raise sa.exc.OperationalError("SELECT secret", {}, ConnectionError("away"))

    monkeypatch.setattr(reports, "usage", away)
    async with running(tmp_path) as service:
        answer = await service.get("/v1/usage")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "10")
        assert answer.json()["error"]["message"] == "The usage cannot be read now, please try again later."


async def test_a_tenant_has_half_of_the_reports_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports that the database does not finish hold 16 places of a tenant; another tenant's waits, none is refused."""
    held = threading.Event()

    def stuck(*_: Any, **__: Any) -> list[Any]:
        held.wait(60)
        return []

    monkeypatch.setattr(reports, "usage", stuck)
    async with running(tmp_path) as service:
        many = [asyncio.create_task(service.get("/v1/usage")) for _ in range(20)]
        done, waiting = await asyncio.wait(many, timeout=2)
        assert sorted(task.result().status_code for task in done) == [503] * 4
        assert len(waiting) == 16
        other = asyncio.create_task(service.get("/v1/usage", "other"))
        await asyncio.sleep(0.2)
        assert not other.done()
        held.set()
        assert (await other).status_code == 200
