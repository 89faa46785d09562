"""Requests that make no caption count, too: uploaded files, policies and lists of models, by the caller's limit."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from serving.tenancy.admin.service import Administration
from serving.tenancy.database import connect
from serving.tenancy.key_hashing import Pepper
from tests.support.service import RunningService
from tests.support.wire import MODEL, NATIVE, native_body, upload_fields, wav

if TYPE_CHECKING:
    from collections.abc import Iterator

OTHER = {"authorization": "Bearer sk-one-of-the-settings"}
PER_MINUTE = 8


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    """A service with keys."""
    with RunningService("--engine=fake", "--audio-workers=1", "--api-keys=sk-one-of-the-settings") as service:
        yield service


@pytest.fixture(scope="module")
def administration(service: RunningService) -> Iterator[Administration]:
    """The administration of the service's tenants."""
    database = connect(f"sqlite:///{service.data / 'captioner.db'}")
    yield Administration(database, Pepper((service.data / "pepper").read_bytes().strip()), "test")
    database.dispose()


def new_tenant(administration: Administration, service: RunningService, name: str) -> tuple[str, dict[str, str]]:
    """Return the key's id of a new tenant of 8 requests a minute, and its header, once the service knows them."""
    limits: dict[str, Any] = {"requests_per_minute": PER_MINUTE, "concurrent_requests": 0, "tokens_per_day": 0}
    administration.create_tenant(name, plan="unlimited", limits=limits)
    entry, key = administration.create_key(name)
    header = {"authorization": f"Bearer {key}"}
    deadline = time.monotonic() + 20
    while httpx.post(service.url + NATIVE, json={}, headers=header).status_code == 401:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return entry["id"], header


def policy(service: RunningService, header: dict[str, str]) -> dict[str, Any]:
    """Return a policy for uploads."""
    query = {"action": "getPolicy", "model": MODEL}
    response = httpx.get(f"{service.url}/api/v1/uploads", params=query, headers=header)
    assert response.status_code == 200, response.text
    data: dict[str, Any] = response.json()["data"]
    return data


def send(terms: dict[str, Any], name: str, data: bytes = b"abc") -> httpx.Response:
    """Upload a file."""
    fields = upload_fields(terms, f"{terms['upload_dir']}/{name}")
    return httpx.post(terms["upload_host"], data=fields, files={"file": (name, data)})


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/v1/models", None),
        (f"/compatible-mode/v1/models/{MODEL}", None),
        ("/compatible-mode/v1/models/none", None),
        ("/api/v1/models", "Throttling.RateQuota"),
        (f"/api/v1/models/{MODEL}", "Throttling.RateQuota"),
        ("/api/v1/uploads?action=getPolicy&model=" + MODEL, "Throttling.RateQuota"),
        ("/api/v1/uploads?action=drop", "Throttling.RateQuota"),
    ],
)
def test_lists_and_policies_count_as_requests(
    service: RunningService, administration: Administration, path: str, code: str | None
) -> None:
    """After the minute's requests such a request gets 429 in its dialect; no other limit of captions refuses it."""
    _, header = new_tenant(administration, service, f"reader-{abs(hash(path))}")
    statuses = [httpx.get(service.url + path, headers=header).status_code for _ in range(PER_MINUTE)]
    assert 429 not in statuses
    refused = httpx.get(service.url + path, headers=header)
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 61
    assert refused.headers["x-ratelimit-limit-requests"] == "8"
    body = refused.json()
    if code is None:
        assert body["error"]["code"] == "limit_requests"
    else:
        assert body["code"] == code
    assert httpx.get(f"{service.url}/v1/models", headers=OTHER).status_code == 200


def test_a_file_counts_as_a_request_of_its_owner(service: RunningService, administration: Administration) -> None:
    """The form has no key: the policy says whose requests it counts among. The refusal is the object store's XML."""
    _, header = new_tenant(administration, service, "writer")
    terms = policy(service, header)
    assert [send(terms, f"{number}.wav").status_code for number in range(PER_MINUTE - 1)] == [200] * (PER_MINUTE - 1)
    refused = send(terms, "more.wav")
    assert (refused.status_code, refused.headers["content-type"]) == (429, "application/xml")
    assert refused.text == (
        "<Error><Code>QpsLimitExceeded</Code>"
        "<Message>Requests rate limit exceeded, please try again later.</Message></Error>"
    )
    assert int(refused.headers["retry-after"]) >= 1
    assert httpx.get(f"{service.url}/v1/models", headers=header).status_code == 429
    assert send(policy(service, OTHER), "other.wav").status_code == 200


def test_an_empty_file_counts_and_is_refused(service: RunningService, administration: Administration) -> None:
    """Empty files are 400 until the minute's requests are used, and leave nothing on the disk."""
    _, header = new_tenant(administration, service, "empty")
    terms = policy(service, header)
    before = service.metric("captioner_uploads_bytes")
    answers = [send(terms, f"{number}.wav", b"") for number in range(PER_MINUTE)]
    assert [answer.status_code for answer in answers] == [400] * (PER_MINUTE - 1) + [429]
    assert "<Code>EntityTooSmall</Code>" in answers[0].text
    assert service.metric("captioner_uploads_bytes") == before


def test_a_policy_of_a_key_that_was_revoked_stores_nothing(
    service: RunningService, administration: Administration
) -> None:
    """A policy is worth no more than the key it was asked for with: revoked, or its tenant suspended, it is refused."""
    key_id, header = new_tenant(administration, service, "revoked")
    _, suspended = new_tenant(administration, service, "suspended")
    terms, others = policy(service, header), policy(service, suspended)
    assert send(terms, "before.wav").status_code == 200
    administration.revoke_key(key_id)
    administration.change_tenant("suspended", state="suspended")
    deadline = time.monotonic() + 20
    while (refused := send(terms, f"{time.monotonic()}.wav")).status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert refused.status_code == 401
    assert "<Code>AccessDenied</Code>" in refused.text
    late = send(others, "late.wav")
    assert (late.status_code, "<Message>Access denied.</Message>" in late.text) == (403, True)


def test_an_uploaded_file_is_captioned(service: RunningService) -> None:
    """The complete path works: policy, file, caption."""
    terms = policy(service, OTHER)
    assert send(terms, "clip.wav", wav(1)).status_code == 200
    headers = OTHER | {"x-dashscope-ossresourceresolve": "enable"}
    body = native_body(f"oss://{terms['upload_dir']}/clip.wav")
    assert httpx.post(service.url + NATIVE, json=body, headers=headers, timeout=60).status_code == 200
