"""Keys, limits and ledger around real requests: what callers are told, what is recorded, what is logged."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import sqlalchemy as sa

from serving.tenancy import database as store
from serving.tenancy import schema
from serving.tenancy.usage_session import Admissions
from serving.types import FinishReason
from tests.support.service import RunningService
from tests.support.wire import (
    COMPATIBLE,
    NATIVE,
    ask_compatible,
    ask_native,
    compatible_body,
    data_url,
    native_body,
    wav,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KEY = {"authorization": "Bearer sk-of-the-settings"}
CLIP = data_url(wav(1))
TENANT = {
    "id": "default",
    "name": "Default",
    "region": "beijing",
    "state": "active",
    "plan": "unlimited",
    "limits": {},
    "free_tokens": 0,
    "free_days": 0,
    "free_only": False,
    "log_content": False,
    "created_at": 0,
    "activated_at": 0,
}
"""The tenant of the settings' keys, whom a row of this name may limit."""


@contextmanager
def serving(*flags: str, **tenant: Any) -> Iterator[tuple[RunningService, Callable[[], list[Any]]]]:
    """A service whose one caller is such a tenant, and a function that reads its ledger once nothing is open."""
    service = RunningService("--engine=fake", "--audio-workers=1", "--api-keys=sk-of-the-settings", *flags)
    database = store.connect(f"sqlite:///{service.data}/captioner.db")
    store.migrate(database)
    with database.begin() as connection:
        connection.execute(schema.tenants.insert(), TENANT | tenant)

    def ledger() -> list[Any]:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if not service.metric("captioner_ledger_pending"):
                with database.connect() as connection:
                    rows = connection.execute(sa.select(schema.usage_records).order_by(sa.text("opened_at"))).all()
                if all(row.ending for row in rows):
                    return list(rows)
            time.sleep(0.05)
        raise TimeoutError

    try:
        with service:
            yield service, ledger
    finally:
        database.dispose()


def test_answers_tell_limits_and_the_ledger_tells_answers() -> None:
    """Whole, streamed and refused answers of both dialects carry the limits; each admitted request is one record."""
    with serving(limits={"requests_per_minute": 5, "tokens_per_minute": 10_000}) as (service, ledger):
        whole = [ask_native(service.url, CLIP, headers=KEY), ask_compatible(service.url, CLIP, headers=KEY)]
        streams = [
            httpx.post(service.url + NATIVE, json=native_body(CLIP), headers=KEY | {"x-dashscope-sse": "enable"}),
            httpx.post(service.url + COMPATIBLE, json=compatible_body(CLIP, stream=True), headers=KEY),
        ]
        rejected = httpx.post(service.url + NATIVE, json=native_body("data:;base64,AAAA"), headers=KEY)
        native = httpx.post(service.url + NATIVE, json=native_body(CLIP), headers=KEY)
        compatible = httpx.post(service.url + COMPATIBLE, json=compatible_body(CLIP), headers=KEY)
        records = ledger()
    admitted: list[Any] = [*whole, *streams, rejected]
    for left, answer in zip((4, 3, 2, 1, 0, 0, 0), (*admitted, native, compatible), strict=True):
        assert answer.headers["x-ratelimit-limit-requests"] == "5"
        assert answer.headers["x-ratelimit-remaining-requests"] == str(left)
        assert int(answer.headers["x-ratelimit-remaining-tokens"]) < 10_000
    assert (native.status_code, compatible.status_code, rejected.status_code) == (429, 429, 400)
    assert native.json()["code"] == "Throttling.RateQuota"
    assert 1 <= int(native.headers["retry-after"]) <= 61
    assert [record.ending for record in records] == ["finished"] * 4 + ["rejected"]
    assert {record.request_id for record in records} == {answer.headers["x-request-id"] for answer in admitted}
    for record in records[:4]:
        assert (record.tenant_id, record.region, record.audio_ms, record.finish_reason) == (
            "default",
            "beijing",
            1000,
            "stop",
        )
        assert (record.input_tokens, record.output_tokens, record.billed) == (13 + 8, 24, True)
        assert record.amount_nanos == 21 * 15_800 + 24 * 12_700
        assert (record.currency, record.input_price, record.output_price) == ("CNY", "0.0158", "0.0127")
        times = record.opened_at, record.prepared_at, record.first_token_at, record.closed_at
        assert list(times) == sorted(times)
        assert record.engine_input_tokens >= 13
        assert record.engine_output_tokens >= 24
    assert (records[4].billed, records[4].amount_nanos, records[4].input_tokens) == (False, 0, 0)
    assert [record.dialect for record in records[:2]] == ["dashscope", "openai"]
    assert [record.stream for record in records[:4]] == [False, False, True, True]


def test_budget_ends_and_survives_a_restart(tmp_path: Any) -> None:
    """A budget in tokens refuses what would go beyond it; a process that starts anew knows what was spent."""
    data = f"--data-dir={tmp_path}"
    with serving(data, "--fake-tokens=10") as (service, _):
        pass
    database = store.connect(f"sqlite:///{tmp_path}/captioner.db")
    with database.begin() as connection:
        connection.execute(schema.tenants.insert(), TENANT | {"limits": {"tokens_per_day": 100}})
    body = compatible_body(CLIP, max_tokens=10)
    statuses = []
    for _ in range(2):
        with serving(data, "--fake-tokens=10") as (service, _):
            statuses += [httpx.post(service.url + COMPATIBLE, json=body, headers=KEY).status_code for _ in range(2)]
    with database.connect() as connection:
        rows = connection.execute(sa.select(schema.usage_records)).all()
    database.dispose()
    assert statuses == [200, 200, 200, 429]
    assert sum(row.input_tokens + row.output_tokens for row in rows if row.billed) == 93


def test_a_new_tenant_pays_nothing_while_its_free_quota_lasts() -> None:
    """Captions longer than expected (450 tokens) are free as well, and the one that uses the quota up in part."""
    now_ms = round(time.time() * 1000)
    quota = {"free_tokens": 2000, "free_days": 90, "activated_at": now_ms}
    with serving("--fake-tokens=900", "--fake-tpot-s=0", **quota) as (service, ledger):
        for _ in range(3):
            ask_native(service.url, CLIP, headers=KEY, max_tokens=900)
        records = ledger()
    assert [(record.free_tokens, record.amount_nanos) for record in records] == [
        (921, 0),
        (921, 0),
        # 21 x 15,800 + 900 x 12,700 = 11,761,800 for 921 tokens, of which 763 have to be paid, rounded up
        (158, 9_744_032),
    ]


def admissions() -> Admissions:
    """What learns how long captions are, without all the rest."""
    limiter: Any = None
    ledger: Any = None
    prices: Any = None
    return Admissions(limiter, ledger, prices)


def test_a_tenants_captions_change_only_its_own_reservation() -> None:
    """However long one tenant's captions are, for the others as much is reserved as before."""
    learning = admissions()
    first = learning.expected_tokens("other", 32_768)
    for _ in range(100):
        learning.learn("long", 32_768, FinishReason.STOP)
        learning.learn("short", 10, FinishReason.STOP)
    assert learning.expected_tokens("long", 32_768) > 30_000
    assert learning.expected_tokens("long", 100) == 100
    assert learning.expected_tokens("short", 32_768) < 20
    assert learning.expected_tokens("other", 32_768) == first


def test_captions_that_were_cut_short_teach_nothing() -> None:
    """Only one that ended by itself, or is longer than expected, tells how long captions are."""
    learning = admissions()
    first = learning.expected_tokens("a", 32_768)
    for _ in range(100):
        learning.learn("a", 1, FinishReason.LENGTH)
    assert learning.expected_tokens("a", 32_768) == first
    learning.learn("a", 2000, FinishReason.LENGTH)
    assert learning.expected_tokens("a", 32_768) > first


def test_tenants_not_seen_for_long_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded: beyond so many tenants, the one seen least recently is as new."""
    monkeypatch.setattr("serving.tenancy.usage_session._TENANTS", 2)
    learning = admissions()
    first = learning.expected_tokens("a", 32_768)
    for tenant in ("a", "b", "a", "c"):
        learning.learn(tenant, 10, FinishReason.STOP)
    assert learning.expected_tokens("b", 32_768) == first
    assert learning.expected_tokens("a", 32_768) < first
    assert len(learning._output_tokens) == 2


@pytest.mark.parametrize("log_content", [False, True])
def test_captions_are_logged_only_for_whom_it_is_switched_on(*, log_content: bool) -> None:
    """The log has no audio and no key of anyone, and captions only of a tenant that wants them there."""
    with serving("--fake-text=very private words", log_content=log_content) as (service, ledger):
        answer = ask_compatible(service.url, CLIP, headers=KEY)
        httpx.post(service.url + COMPATIBLE, json=compatible_body("data:;base64,AAAA"), headers=KEY)
        httpx.post(service.url + NATIVE, json=native_body(CLIP), headers={"authorization": "Bearer sk-wrong-secret"})
        ledger()
        log = service.log()
    lines = [json.loads(line) for line in log.splitlines()]
    [mine] = [line for line in lines if line.get("request_id") == answer.headers["x-request-id"]]
    assert ("private words" in log) is log_content
    assert mine.get("caption") == (answer.text if log_content else None)
    for secret in ("sk-of-the-settings", "sk-wrong-secret", CLIP[30:60]):
        assert secret not in log
