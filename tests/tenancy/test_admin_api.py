"""The administration's HTTP API: its token, its verbs, and the effect of changes on a running service."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

import httpx
import pytest
from pydantic import ValidationError

from serving.api.admin import create_admin_app
from serving.config import Settings
from tests.support.service import RunningService

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    import sqlalchemy as sa

TOKEN = "an-administrators-token"  # noqa: S105
BEARER = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture
async def api(database: sa.Engine, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """The API, with a client that has the token."""
    app = create_admin_app(Settings(data_dir=tmp_path, admin_token=TOKEN), database)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://admin", headers=BEARER | {"x-actor": "ada"}
    ) as client:
        yield client


async def test_verbs(api: httpx.AsyncClient) -> None:
    """A tenant, a key, a rotation, a revocation, a plan, usage, an invoice and the audit log work over HTTP."""
    assert (await api.post("/v1/tenants", json={"id": "acme", "limits": {"requests_per_minute": 3}})).status_code == 201
    made = await api.post("/v1/tenants/acme/keys", json={"name": "ci"})
    assert made.status_code == 201
    assert made.json()["key"].startswith("sk-")
    rotated = (await api.post(f"/v1/keys/{made.json()['id']}/rotate", json={"overlap_s": 60})).json()
    assert rotated["name"] == "ci"
    assert (await api.post(f"/v1/keys/{rotated['id']}/revoke")).json()["state"] == "revoked"
    assert "key" not in (await api.get("/v1/tenants/acme/keys")).json()[0]
    assert (await api.patch("/v1/tenants/acme", json={"state": "suspended"})).json()["state"] == "suspended"
    assert (await api.patch("/v1/plans/gold", json={"weight": 3})).json()["weight"] == 3
    assert (await api.get("/v1/usage?by=day")).json() == []
    assert (await api.get("/v1/tenants/acme/invoice?month=2026-11")).json()["lines"] == []
    log = (await api.get("/v1/audit?subject=acme")).json()
    assert [entry["action"] for entry in log] == ["tenants.set", "keys.create", "tenants.create"]
    assert {entry["actor"] for entry in log} == {"api:ada"}


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v1/tenants/nobody", None, 404),
        ("POST", "/v1/tenants", {}, 400),
        ("POST", "/v1/tenants", {"id": "a", "colour": "red"}, 400),
        ("POST", "/v1/tenants", ["a"], 400),
        ("POST", "/v1/keys/key-0/revoke", None, 404),
        ("GET", "/v1/usage?by=week", None, 400),
        ("GET", "/v1/usage?since=yesterday", None, 400),
        ("GET", "/v1/audit?limit=many", None, 400),
        ("POST", "/v1/tenants", {"id": "a" * 70_000}, 400),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_bad_requests(api: httpx.AsyncClient, method: str, path: str, body: object, status: int) -> None:
    """Each is answered with its status and a message, as JSON."""
    answer = await api.request(method, path, json=body)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "body", "message"),
    [
        ("POST", "/v1/tenants", {"name": "Acme"}, "id is missing"),
        (
            "POST",
            "/v1/tenants",
            {"id": "a", "colour": "red"},
            "colour: unknown field; known are id, region, plan, name",
        ),
        ("POST", "/v1/tenants", {"id": 5}, "id: must be a text, not 5"),
        ("POST", "/v1/tenants", {"id": "a\0"}, "id: must be a text, not "),
        ("POST", "/v1/tenants", {"id": "a", "region": ["beijing"]}, "region: must be a text, not ['beijing']"),
        ("POST", "/v1/tenants", {"id": "a", "limits": 5}, "limits: must be limits by name, not 5"),
        ("POST", "/v1/tenants", {"id": "a", "free_only": "yes"}, "free_only: must be true or false, not 'yes'"),
        ("PATCH", "/v1/tenants/acme", {"id": "b"}, "id: unknown field; known are plan, state"),
        ("PATCH", "/v1/tenants/acme", {"plan": 7}, "plan: must be a text, not 7"),
        ("POST", "/v1/tenants/acme/keys", {"name": None}, "name: must be a text, not None"),
        ("POST", "/v1/tenants/acme/keys", {"limits": []}, "limits: must be limits by name, not []"),
        ("POST", "/v1/keys/key-0/rotate", {"overlap_s": "long"}, "overlap_s: must be a number of seconds, not 'long'"),
        ("POST", "/v1/keys/key-0/rotate", {"overlap_s": 1e300}, "overlap_s: from 0 to 31622400"),
        ("POST", "/v1/keys/key-0/revoke", {"why": "leak"}, "why: unknown field; there are no fields"),
        ("PATCH", "/v1/plans/gold", {"priority": True}, "priority: must be a whole number, not True"),
        ("PATCH", "/v1/plans/gold", {"weight": {}}, "weight: must be a number, not {}"),
        ("POST", "/v1/prices", {"region": "beijing"}, "currency is missing"),
        ("GET", "/v1/audit?limit=many", None, "limit: must be a whole number, not 'many'"),
        ("GET", "/v1/usage?by=day,day", None, "by: must be some of day, tenant, key, not 'day,day'"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_a_wrong_field_is_named(
    api: httpx.AsyncClient, method: str, path: str, body: object, message: str
) -> None:
    """An unknown, missing or wrong field is answered 400 with its name, and nothing changes."""
    await api.post("/v1/tenants", json={"id": "acme"})
    before = (await api.get("/v1/audit")).json()
    answer = await api.request(method, path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(message)
    assert (await api.get("/v1/audit")).json() == before


ODD_DAYS = (
    "yesterday",
    "0000-01-01",
    "9999-01-01",
    "9999-12-31",
    "2026-13-01",
    "2026-02-30",
    "2026-W01-1",
    "20261101",
    "",
)
ODD_MONTHS = ("2026-13", "0000-01", "9999-12", "2026-1", "2026", "november", "")
ODD_MOMENTS = (-1, 10**14 * 3, 2**63, 2**64 - 1, 1e30, 1.5, "2027-01-01", True)


@pytest.mark.parametrize(
    "query",
    [
        *(f"/v1/usage?{name}={day}" for name in ("since", "until") for day in ODD_DAYS),
        *(f"/v1/tenants/acme/invoice?month={month}" for month in ODD_MONTHS),
    ],
)
async def test_an_odd_date_in_a_query_is_named(api: httpx.AsyncClient, query: str) -> None:
    """A date that does not exist, or is past the calendar, is answered 400 with the parameter's name."""
    name = query.partition("?")[2].partition("=")[0]
    answer = await api.get(query)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(f"{name}: must be a ")


@pytest.mark.parametrize("moment", ODD_MOMENTS, ids=str)
async def test_an_odd_moment_in_a_body_is_named(api: httpx.AsyncClient, moment: object) -> None:
    """A moment that is no whole number, or past the calendar, is answered 400 with the field's name."""
    await api.post("/v1/tenants", json={"id": "acme"})
    price = {"region": "beijing", "currency": "CNY", "input_price": "1", "output_price": "1", "valid_from": moment}
    for path, body in (("/v1/tenants/acme/keys", {"expires_at": moment}), ("/v1/prices", price)):
        answer = await api.post(path, json=body)
        assert answer.status_code == 400
        (name,) = {"expires_at", "valid_from"} & set(body)
        assert answer.json()["error"]["message"].startswith(f"{name}: must be milliseconds since the epoch")


async def test_the_first_and_the_last_day_are_accepted(api: httpx.AsyncClient) -> None:
    """Every day from the year 1 to the year 9998 can be asked for, and a key may last that long."""
    await api.post("/v1/tenants", json={"id": "acme"})
    assert (await api.get("/v1/usage?since=0001-01-01&until=9998-12-31")).json() == []
    for month in ("0001-01", "9998-12"):
        assert (await api.get(f"/v1/tenants/acme/invoice?month={month}")).status_code == 200
    last_ms = 253_370_764_800_000 - 1
    made = await api.post("/v1/tenants/acme/keys", json={"expires_at": last_ms})
    assert made.status_code == 201
    assert (await api.post(f"/v1/keys/{made.json()['id']}/rotate")).json()["expires_at"] == last_ms


@pytest.mark.parametrize("failure", [TypeError, KeyError, ValueError, AttributeError])
async def test_an_error_of_ours_is_500_and_logged(
    api: httpx.AsyncClient,
    failure: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An error inside a verb is answered without its text; the traceback is in the log."""

    def broken(*_: object, **__: object) -> None:
        raise failure("a detail")

    monkeypatch.setattr("serving.tenancy.admin.service.tenant_changes", broken)
    answer = await api.post("/v1/tenants", json={"id": "acme"})
    assert answer.status_code == 500
    assert answer.json() == {"error": {"code": "internal", "message": "Internal error; the cause is in the log."}}
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.getMessage() == "administration verb failed"
    assert record.exc_info
    assert record.exc_info[0] is failure


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", TOKEN])
async def test_a_request_without_the_token_is_refused(api: httpx.AsyncClient, header: str | None) -> None:
    """The answer is 401 on every path but the health check, before the request is read."""
    del api.headers["authorization"]
    headers = {"authorization": header} if header else {}
    for path in ("/v1/tenants", "/v1/keys", "/nowhere"):
        assert (await api.get(path, headers=headers)).status_code == 401
    assert (await api.get("/healthz")).status_code == 200


def test_the_api_needs_a_token_and_a_port_of_its_own() -> None:
    """A port without token, and the port that clients reach, are refused with the setting's name."""
    with pytest.raises(ValidationError, match="admin_token: required with admin_port"):
        Settings(admin_port=8100)
    with pytest.raises(ValidationError, match="admin_port: 8000 is also port"):
        Settings(admin_port=8000, admin_token=TOKEN)


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    """A service with authentication and the administration's API."""
    flags = ("--engine=fake", "--audio-workers=1", "--admin-port=0", f"--admin-token={TOKEN}", "--auth")
    with RunningService(*flags) as service:
        yield service


def test_a_key_works_as_soon_as_it_is_made_and_not_when_revoked(service: RunningService) -> None:
    """Changes reach a running service within seconds; the clients' port has no administration."""
    found = re.search(r"administration on (http://[^\s\"]+)", service.log())
    assert found
    with httpx.Client(base_url=found[1], headers=BEARER) as admin:
        _a_key_comes_and_goes(admin, service)


def _a_key_comes_and_goes(admin: httpx.Client, service: RunningService) -> None:
    admin.post("/v1/tenants", json={"id": "acme"}).raise_for_status()
    key = admin.post("/v1/tenants/acme/keys").json()
    headers = {"authorization": f"Bearer {key['key']}"}

    def becomes(status: int) -> bool:
        until = time.monotonic() + 15
        while time.monotonic() < until:
            if httpx.get(f"{service.url}/v1/models", headers=headers).status_code == status:
                return True
            time.sleep(0.2)
        return False

    assert becomes(200)
    admin.patch("/v1/tenants/acme", json={"state": "suspended"}).raise_for_status()
    assert becomes(403)
    admin.patch("/v1/tenants/acme", json={"state": "arrears"}).raise_for_status()
    assert becomes(400)
    admin.patch("/v1/tenants/acme", json={"state": "active"}).raise_for_status()
    assert becomes(200)
    admin.post(f"/v1/keys/{key['id']}/revoke").raise_for_status()
    assert becomes(401)
    assert httpx.get(f"{service.url}/v1/tenants", headers=BEARER).status_code == 404
    assert key["key"] not in service.log()
