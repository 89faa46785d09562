"""Attacks on what keeps tenants apart. deploy/security.md tells which test answers which."""

from __future__ import annotations

import hmac
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx
import pytest
import sqlalchemy as sa

from serving.config import Settings
from serving.errors import InvalidApiKey
from serving.tenancy import schema
from serving.tenancy.admin.service import Administration
from serving.tenancy.database import connect
from serving.tenancy.key_hashing import Pepper, make_key
from serving.tenancy.keys import Keyring
from tests.support.service import RunningService
from tests.support.wire import COMPATIBLE, NATIVE, compatible_body, data_url, native_body, upload_fields, wav

if TYPE_CHECKING:
    from collections.abc import Iterator

CLIP = data_url(wav(1))
INJECTIONS = ["' OR '1'='1", "x'; DROP TABLE keys; --", '" OR ""="', "%", "\\", "${jndi:ldap://x}", "../../etc/passwd"]


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    """A service that knows two tenants, by a key each from the settings and from its database."""
    with RunningService("--engine=fake", "--audio-workers=1", "--api-keys=sk-one-of-the-settings") as service:
        yield service


@pytest.fixture(scope="module")
def other(service: RunningService) -> Iterator[dict[str, str]]:
    """The header of another tenant."""
    database = connect(f"sqlite:///{service.data / 'captioner.db'}")
    admin = Administration(database, Pepper((service.data / "pepper").read_bytes().strip()), "test")
    admin.create_tenant("other", plan="unlimited")
    header = bearer(admin.create_key("other")[1])
    for _ in range(300):
        if httpx.get(f"{service.url}/v1/models", headers=header).status_code == 200:
            break
    yield header
    database.dispose()


ONE = {"authorization": "Bearer sk-one-of-the-settings"}


def bearer(key: str) -> dict[str, str]:
    """The header that carries a key."""
    return {"authorization": f"Bearer {key}"}


def records(service: RunningService) -> list[Any]:
    """The ledger, once nothing is pending."""
    database = connect(f"sqlite:///{service.data / 'captioner.db'}")
    for _ in range(200):
        if not service.metric("captioner_ledger_pending"):
            break
    with database.connect() as connection:
        rows = connection.execute(sa.select(schema.usage_records)).all()
    database.dispose()
    return list(rows)


def test_keys_cannot_be_guessed() -> None:
    """256 random bits, never the same; of these the prefix that people see tells 30."""
    keys = {make_key() for _ in range(1000)}
    assert len(keys) == 1000
    assert all(len(key) == 46 and key.startswith("sk-") for key in keys)
    assert len({key[3:8] for key in keys}) > 990


@pytest.mark.parametrize(
    "key", ["sk-", "sk-" + "a" * 43, "sk-one-of-the-setting", "sk-one-of-the-settingsx", *INJECTIONS]
)
def test_what_is_no_key_is_told_the_same(service: RunningService, key: str) -> None:
    """401 in the dialect, whatever was tried; nothing tells whether it was close."""
    for path, body in ((NATIVE, native_body(CLIP)), (COMPATIBLE, compatible_body(CLIP))):
        answer = httpx.post(service.url + path, json=body, headers=bearer(key))
        assert answer.status_code == 401
        told = answer.json()
        message = told["message"] if path == NATIVE else told["error"]["message"]
        assert message == ("Invalid API-key provided." if path == NATIVE else "Incorrect API key provided.")


def test_a_huge_key_is_no_key(service: RunningService) -> None:
    """It is refused, as soon as it is too long for a header; nothing breaks."""
    assert httpx.get(f"{service.url}/v1/models", headers=bearer("x" * 200_000)).status_code in {400, 401, 431}
    assert httpx.get(f"{service.url}/v1/models", headers=ONE).status_code == 200


def test_a_look_up_takes_one_hash_whatever_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Right, almost right or nonsense: one HMAC over the whole key, and one dictionary access under its result.

    So the time depends on the length of what was sent alone, and not on how much of it is right.
    """
    settings = Settings(data_dir=tmp_path, api_keys="sk-right-key")
    database = connect(f"sqlite:///{tmp_path / 'db'}")
    keyring = Keyring(settings, database)
    hashed: list[bytes] = []
    digest = hmac.digest

    def counted(secret: bytes, message: bytes, kind: str) -> bytes:
        hashed.append(message)
        return digest(secret, message, kind)

    monkeypatch.setattr(hmac, "digest", counted)
    for key in ("sk-right-kez", "sk-wrong-key", "nonsense-key"):
        with pytest.raises(InvalidApiKey):
            keyring.authenticate(bearer(key))
    assert hashed == [b"sk-right-kez", b"sk-wrong-key", b"nonsense-key"]
    database.dispose()


def test_headers_do_not_say_who_calls(service: RunningService, other: dict[str, str]) -> None:
    """Only the key does: what looks like a tenant, a user or a proxy's word changes neither record nor limit."""
    spoofed = {
        "x-tenant": "other",
        "x-tenant-id": "other",
        "x-user": "other",
        "x-dashscope-workspace": "other",
        "openai-organization": "other",
        "x-forwarded-for": "10.0.0.1",
        "x-forwarded-user": "other",
        "x-actor": "other",
    }
    before = {row.request_id for row in records(service)}
    body = compatible_body(CLIP, user="other", metadata={"tenant": "other"})
    assert httpx.post(service.url + COMPATIBLE, json=body, headers=ONE | spoofed).status_code == 200
    new = [row for row in records(service) if row.request_id not in before]
    assert [row.tenant_id for row in new] == ["default"]
    two = [("authorization", ONE["authorization"]), ("authorization", other["authorization"])]
    answer = httpx.post(service.url + COMPATIBLE, json=compatible_body(CLIP), headers=two)
    assert answer.status_code in {200, 400, 401}
    assert {row.tenant_id for row in records(service) if row.request_id not in before} <= {"default", "other"}


def test_another_tenants_upload_is_not_found(service: RunningService, other: dict[str, str]) -> None:
    """By its key alone nobody hears what another tenant uploaded, and the refusal does not tell that it is there."""
    query = {"action": "getPolicy", "model": "qwen3-omni-30b-a3b-captioner"}
    policy = httpx.get(f"{service.url}/api/v1/uploads", params=query, headers=ONE).json()["data"]
    key = f"{policy['upload_dir']}/clip.wav"
    sent = httpx.post(policy["upload_host"], data=upload_fields(policy, key), files={"file": ("clip.wav", wav(1))})
    assert sent.status_code == 200
    resolve = {"x-dashscope-ossresourceresolve": "enable"}
    own = httpx.post(service.url + NATIVE, json=native_body(f"oss://{key}"), headers=ONE | resolve)
    theirs = httpx.post(service.url + NATIVE, json=native_body(f"oss://{key}"), headers=other | resolve)
    nothing = httpx.post(service.url + NATIVE, json=native_body("oss://no/such"), headers=other | resolve)
    assert (own.status_code, theirs.status_code) == (200, 400)
    assert (theirs.json()["code"], theirs.json()["message"]) == (nothing.json()["code"], nothing.json()["message"])


@pytest.mark.parametrize("text", INJECTIONS)
def test_what_clients_write_is_no_sql(service: RunningService, text: str) -> None:
    """In a key, in names, in a query: it is a value, and the tables are as they were."""
    httpx.get(f"{service.url}/v1/models", headers={"authorization": f"Bearer {text}"})
    httpx.get(f"{service.url}/v1/models/{text}", headers=ONE)
    httpx.get(f"{service.url}/api/v1/models", params={"model": text, "page_no": text}, headers=ONE)
    httpx.post(service.url + COMPATIBLE, json=compatible_body(CLIP) | {"model": text}, headers=ONE)
    database = connect(f"sqlite:///{service.data / 'captioner.db'}")
    assert set(schema.metadata.tables) <= set(sa.inspect(database).get_table_names())
    database.dispose()
    assert httpx.get(f"{service.url}/v1/models", headers=ONE).status_code == 200


def test_what_clients_write_forges_no_log_line(service: RunningService) -> None:
    """A line break in what is logged is escaped: each line is one JSON object, of ours."""
    forged = '\n{"message":"request","outcome":"finished","request_id":"forged"}\n'
    httpx.post(service.url + COMPATIBLE, json=compatible_body(f"http://127.0.0.1:9/{forged}"), headers=ONE)
    httpx.post(service.url + COMPATIBLE, json=compatible_body(CLIP) | {"model": forged}, headers=ONE)
    httpx.get(f"{service.url}/v1/models/{quote(forged)}", headers=ONE)
    lines = [json.loads(line) for line in service.log().splitlines()]
    assert not [line for line in lines if line.get("request_id") == "forged"]


def test_no_administration_where_clients_are(service: RunningService) -> None:
    """The clients' port knows none of its paths, with whatever token."""
    for path in (
        "/v1/tenants",
        "/v1/keys",
        "/v1/usage",
        "/v1/audit",
        "/v1/plans",
        "/admin",
        "/v1/tenants/default/keys",
    ):
        assert httpx.get(f"{service.url}{path}", headers=ONE).status_code == 404
        assert httpx.post(f"{service.url}{path}", headers=ONE, json={}).status_code in {404, 405}


def test_the_pepper_and_the_database_are_their_owners_alone(service: RunningService) -> None:
    """Nobody else on the machine reads keys' pepper, hashes or usage."""
    for name in ("pepper", "captioner.db"):
        assert Path(service.data, name).stat().st_mode & 0o077 == 0, name
    assert service.data.stat().st_mode & 0o077 == 0
