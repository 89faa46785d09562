"""Attacks on the isolation of tenants. deploy/security.md lists each attack with its test."""

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
    """A service with two tenants: the key of one is in the settings, the key of the other in the database."""
    with RunningService("--engine=fake", "--audio-workers=1", "--api-keys=sk-one-of-the-settings") as service:
        yield service


@pytest.fixture(scope="module")
def other(service: RunningService) -> Iterator[dict[str, str]]:
    """The authorization header of another tenant."""
    database = connect(f"sqlite:///{service.data / 'captioner.db'}")
    admin = Administration(database, Pepper((service.data / "pepper").read_bytes().strip()), "test")
    admin.create_tenant("another", plan="unlimited")
    header = bearer(admin.create_key("another")[1])
    for _ in range(300):
        if httpx.get(f"{service.url}/v1/models", headers=header).status_code == 200:
            break
    yield header
    database.dispose()


ONE = {"authorization": "Bearer sk-one-of-the-settings"}


def bearer(key: str) -> dict[str, str]:
    """Return the header that carries a key."""
    return {"authorization": f"Bearer {key}"}


def records(service: RunningService) -> list[Any]:
    """Return the ledger's records once nothing is pending."""
    database = connect(f"sqlite:///{service.data / 'captioner.db'}")
    for _ in range(200):
        if not service.metric("captioner_ledger_pending"):
            break
    with database.connect() as connection:
        rows = connection.execute(sa.select(schema.usage_records)).all()
    database.dispose()
    return list(rows)


def test_keys_cannot_be_guessed() -> None:
    """Keys have 256 random bits and differ; the prefix that is shown reveals 30 of the bits."""
    keys = {make_key() for _ in range(1000)}
    assert len(keys) == 1000
    assert all(len(key) == 46 and key.startswith("sk-") for key in keys)
    assert len({key[3:8] for key in keys}) > 990


@pytest.mark.parametrize(
    "key", ["sk-", "sk-" + "a" * 43, "sk-one-of-the-setting", "sk-one-of-the-settingsx", *INJECTIONS]
)
def test_all_wrong_keys_get_the_same_response(service: RunningService, key: str) -> None:
    """A wrong key is answered 401 in the dialect; the response does not depend on how close it was."""
    for path, body in ((NATIVE, native_body(CLIP)), (COMPATIBLE, compatible_body(CLIP))):
        answer = httpx.post(service.url + path, json=body, headers=bearer(key))
        assert answer.status_code == 401
        error = answer.json()
        message = error["message"] if path == NATIVE else error["error"]["message"]
        assert message == ("Invalid API-key provided." if path == NATIVE else "Incorrect API key provided.")


def test_a_huge_key_is_no_key(service: RunningService) -> None:
    """A key too long for a header is refused, and the service continues."""
    assert httpx.get(f"{service.url}/v1/models", headers=bearer("x" * 200_000)).status_code in {400, 401, 431}
    assert httpx.get(f"{service.url}/v1/models", headers=ONE).status_code == 200


def test_a_look_up_takes_one_hash_whatever_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A valid, an almost valid or a nonsense key costs one HMAC over the key and one dictionary access.

    So the time depends only on the key's length, and not on how much of it is right.
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
    """Only the key identifies a caller: headers that name a tenant, user or proxy change neither record nor limit."""
    spoofed = {
        "x-tenant": "another",
        "x-tenant-id": "another",
        "x-user": "another",
        "x-dashscope-workspace": "another",
        "openai-organization": "another",
        "x-forwarded-for": "10.0.0.1",
        "x-forwarded-user": "another",
        "x-actor": "another",
    }
    before = {row.request_id for row in records(service)}
    body = compatible_body(CLIP, user="another", metadata={"tenant": "another"})
    assert httpx.post(service.url + COMPATIBLE, json=body, headers=ONE | spoofed).status_code == 200
    new = [row for row in records(service) if row.request_id not in before]
    assert [row.tenant_id for row in new] == ["default"]
    two = [("authorization", ONE["authorization"]), ("authorization", other["authorization"])]
    answer = httpx.post(service.url + COMPATIBLE, json=compatible_body(CLIP), headers=two)
    assert answer.status_code in {200, 400, 401}
    assert {row.tenant_id for row in records(service) if row.request_id not in before} <= {"default", "another"}


def test_another_tenants_upload_is_not_found(service: RunningService, other: dict[str, str]) -> None:
    """A tenant that has another tenant's upload key gets the response of an upload that does not exist."""
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
def test_input_of_clients_is_not_executed_as_sql(service: RunningService, text: str) -> None:
    """SQL in a key, in names and in a query is a value, and the tables stay as they are."""
    httpx.get(f"{service.url}/v1/models", headers={"authorization": f"Bearer {text}"})
    httpx.get(f"{service.url}/v1/models/{text}", headers=ONE)
    httpx.get(f"{service.url}/api/v1/models", params={"model": text, "page_no": text}, headers=ONE)
    httpx.post(service.url + COMPATIBLE, json=compatible_body(CLIP) | {"model": text}, headers=ONE)
    database = connect(f"sqlite:///{service.data / 'captioner.db'}")
    assert set(schema.metadata.tables) <= set(sa.inspect(database).get_table_names())
    database.dispose()
    assert httpx.get(f"{service.url}/v1/models", headers=ONE).status_code == 200


def test_input_of_clients_forges_no_log_line(service: RunningService) -> None:
    """A line break in a logged value is escaped: each line is one JSON object of the service."""
    forged = '\n{"message":"request","outcome":"finished","request_id":"forged"}\n'
    httpx.post(service.url + COMPATIBLE, json=compatible_body(f"http://127.0.0.1:9/{forged}"), headers=ONE)
    httpx.post(service.url + COMPATIBLE, json=compatible_body(CLIP) | {"model": forged}, headers=ONE)
    httpx.get(f"{service.url}/v1/models/{quote(forged)}", headers=ONE)
    lines = [json.loads(line) for line in service.log().splitlines()]
    assert not [line for line in lines if line.get("request_id") == "forged"]


def test_no_administration_on_the_clients_port(service: RunningService) -> None:
    """The clients' port answers 404 to paths of the administration, with any token."""
    for path in (
        "/v1/tenants",
        "/v1/keys",
        "/v1/audit",
        "/v1/plans",
        "/admin",
        "/v1/tenants/default/keys",
    ):
        assert httpx.get(f"{service.url}{path}", headers=ONE).status_code == 404
        assert httpx.post(f"{service.url}{path}", headers=ONE, json={}).status_code in {404, 405}
    assert httpx.get(f"{service.url}/page/admin.js").status_code == 404
    # A tenant's own account has the path of the administration's report, and answers no question about others.
    assert httpx.get(f"{service.url}/v1/usage", headers=ONE).json()["tenant"] == "default"
    assert httpx.get(f"{service.url}/v1/usage?tenant=another", headers=ONE).status_code == 400


def test_pepper_and_database_are_readable_only_by_their_owner(service: RunningService) -> None:
    """Other users of the machine cannot read the pepper, hashes of keys or usage."""
    for name in ("pepper", "captioner.db"):
        assert Path(service.data, name).stat().st_mode & 0o077 == 0, name
    assert service.data.stat().st_mode & 0o077 == 0
