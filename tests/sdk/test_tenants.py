"""Tenants, keys and limits as each client's users see them: class, status, code and message."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from serving.tenancy.admin.service import Administration
from serving.tenancy.database import connect
from serving.tenancy.key_hashing import Pepper
from serving.tenancy.ledger.usage_record import now_ms
from tests.sdk.clients import Client, every_client, every_way
from tests.sdk.test_failures import CLIP, Failure, assert_failed
from tests.support.service import RunningService

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.sdk.tap import Tap

NO_KEY = Failure(
    (401, "InvalidApiKey", "Invalid API-key provided."), (401, "invalid_api_key", "Incorrect API key provided.")
)


def same(status: int, code: str, message: str) -> Failure:
    """Return a failure with one message in both dialects."""
    return Failure((status, code, message), (status, code, message))


def limited(native: str, compatible: str, message: str) -> Failure:
    """Return the failure of a reached limit."""
    return Failure((429, native, message), (429, compatible, message))


QUOTA = "Allocated quota exceeded, please increase your quota limit."
REFUSED: dict[str, Failure] = {
    "unknown": NO_KEY,
    "expired": NO_KEY,
    "revoked": NO_KEY,
    "rotated": NO_KEY,
    "other-region": NO_KEY,
    "suspended": Failure((403, "AccessDenied", "Access denied."), (403, "access_denied", "Access denied.")),
    "arrears": same(400, "Arrearage", "Access denied, please make sure your account is in good standing."),
    "free-tier-ended": same(
        403, "AllocationQuota.FreeTierOnly", "The free tier of the model has been exhausted. If you wish to continue"
    ),
    "requests": limited(
        "Throttling.RateQuota", "limit_requests", "Requests rate limit exceeded, please try again later."
    ),
    "tokens": limited("Throttling.AllocationQuota", "insufficient_quota", QUOTA),
    "audio": limited("Throttling", "limit_requests", "Requests throttling triggered."),
    "concurrency": limited("Throttling", "limit_requests", "Too many requests in route. Please try again later."),
    "budget": limited("Throttling.AllocationQuota", "insufficient_quota", QUOTA),
}

LIMITS: dict[str, dict[str, Any]] = {
    "requests": {"requests_per_minute": 0},
    "tokens": {"tokens_per_minute": 20},
    "audio": {"audio_seconds_per_minute": 0},
    "concurrency": {"concurrent_requests": 0},
    "budget": {"money_per_month": 0},
}


@dataclass(frozen=True)
class Tenants:
    """A service, and a key for each kind of refusal; `good` is served."""

    service: RunningService
    keys: dict[str, str]


@pytest.fixture(scope="module")
def tenants() -> Iterator[Tenants]:
    """Real tenants and keys in the service's database, created while it runs."""
    with RunningService("--engine=fake", "--audio-workers=1", "--auth") as service:
        database = connect(f"sqlite:///{service.data / 'captioner.db'}")
        admin = Administration(database, Pepper((service.data / "pepper").read_bytes().strip()), "test")
        keys = {"unknown": "sk-" + "x" * 43}
        for name in ("good", "expired", "revoked", "rotated", *LIMITS):
            admin.create_tenant(name, plan="unlimited", limits=LIMITS.get(name, {}))
        admin.create_tenant("other-region", plan="unlimited", region="singapore")
        for state in ("suspended", "arrears"):
            admin.create_tenant(state, plan="unlimited", state=state)
        admin.create_tenant("free-tier-ended", plan="unlimited", free_tokens=0, free_days=90, free_only=True)
        for tenant in admin.tenants():
            expires_at = now_ms() + 1500 if tenant["id"] == "expired" else None
            key, keys[tenant["id"]] = admin.create_key(tenant["id"], expires_at=expires_at)
            if tenant["id"] == "revoked":
                admin.revoke_key(key["id"])
            if tenant["id"] == "rotated":
                admin.rotate_key(key["id"], overlap_s=0)
        until = time.monotonic() + 30
        while httpx.get(f"{service.url}/v1/models", headers=bearer(keys["good"])).status_code != 200:
            assert time.monotonic() < until, "the service has not seen the new keys"
            time.sleep(0.1)
        time.sleep(2)  # until the key has expired
        yield Tenants(service, keys)
        database.dispose()


def bearer(key: str) -> dict[str, str]:
    """Return the header with a key."""
    return {"authorization": f"Bearer {key}"}


@every_client
@pytest.mark.parametrize("name", REFUSED)
def test_refused(client: Client, name: str, tap: Tap, tenants: Tenants) -> None:
    """Each state of key and tenant, the other region, the end of the free tier, and each limit is refused."""
    outcome = tap.perform(client, tenants.service, audio=CLIP, api_key=tenants.keys[name])
    assert_failed(outcome, client, REFUSED[name])


@every_client
@every_way
def test_served(client: Client, stream: str, tap: Tap, tenants: Tenants) -> None:
    """A good key is served by the same service."""
    outcome = tap.perform(client, tenants.service, audio=CLIP, api_key=tenants.keys["good"], stream=stream)
    assert outcome.error is None
    assert outcome.finish_reason == "stop"
