"""The administration's HTTP API: its token, its verbs, and that what it changes reaches a running service."""

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
    """The API, asked by someone who has the token."""
    app = create_admin_app(Settings(data_dir=tmp_path, admin_token=TOKEN), database)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://admin", headers=BEARER | {"x-actor": "ada"}
    ) as client:
        yield client


async def test_verbs(api: httpx.AsyncClient) -> None:
    """A tenant, its key, a rotation, a revocation, a plan, a price, usage, an invoice, and the log of it all."""
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
    """Each is told what is wrong, as JSON."""
    answer = await api.request(method, path, json=body)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", TOKEN])
async def test_nobody_gets_in_without_the_token(api: httpx.AsyncClient, header: str | None) -> None:
    """401 on every path but the health check, before the request is read."""
    del api.headers["authorization"]
    headers = {"authorization": header} if header else {}
    for path in ("/v1/tenants", "/v1/keys", "/nowhere"):
        assert (await api.get(path, headers=headers)).status_code == 401
    assert (await api.get("/healthz")).status_code == 200


def test_there_is_no_administration_without_a_token() -> None:
    """Nor on the port that clients reach."""
    with pytest.raises(ValidationError, match="admin_port needs admin_token"):
        Settings(admin_port=8100)
    with pytest.raises(ValidationError, match="must be another one than port"):
        Settings(admin_port=8000, admin_token=TOKEN)


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    """A service that asks for keys, with the administration beside it."""
    flags = ("--engine=fake", "--audio-workers=1", "--admin-port=0", f"--admin-token={TOKEN}", "--auth")
    with RunningService(*flags) as service:
        yield service


def test_a_key_works_as_soon_as_it_is_made_and_not_when_revoked(service: RunningService) -> None:
    """Within seconds, on a service that runs; the clients' port knows no administration."""
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
