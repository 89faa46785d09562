"""Keys, limits and ledger around real requests: responses, records and logs."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import sqlalchemy as sa

from serving.tenancy import database as databases
from serving.tenancy import schema
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
"""The row of the tenant of the settings' keys, which may limit it."""


@contextmanager
def serving(*flags: str, **tenant: Any) -> Iterator[tuple[RunningService, Callable[[], list[Any]]]]:
    """Run a service whose only caller is such a tenant; yield it and a function that reads its settled ledger."""
    service = RunningService("--engine=fake", "--audio-workers=1", "--api-keys=sk-of-the-settings", *flags)
    database = databases.connect(f"sqlite:///{service.data}/captioner.db")
    databases.migrate(database)
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


def test_responses_state_limits_and_leave_records() -> None:
    """Full, streamed and refused responses of both dialects state the limits; each admitted request is one record."""
    with serving(limits={"requests_per_minute": 5, "tokens_per_minute": 10_000}) as (service, ledger):
        full = [ask_native(service.url, CLIP, headers=KEY), ask_compatible(service.url, CLIP, headers=KEY)]
        streams = [
            httpx.post(service.url + NATIVE, json=native_body(CLIP), headers=KEY | {"x-dashscope-sse": "enable"}),
            httpx.post(service.url + COMPATIBLE, json=compatible_body(CLIP, stream=True), headers=KEY),
        ]
        rejected = httpx.post(service.url + NATIVE, json=native_body("data:;base64,AAAA"), headers=KEY)
        native = httpx.post(service.url + NATIVE, json=native_body(CLIP), headers=KEY)
        compatible = httpx.post(service.url + COMPATIBLE, json=compatible_body(CLIP), headers=KEY)
        records = ledger()
    admitted: list[Any] = [*full, *streams, rejected]
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


def test_a_budget_survives_a_restart(tmp_path: Any) -> None:
    """A budget in tokens refuses requests beyond it, in a restarted process as well."""
    data = f"--data-dir={tmp_path}"
    with serving(data, "--fake-tokens=10") as (service, _):
        pass
    database = databases.connect(f"sqlite:///{tmp_path}/captioner.db")
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
    """Captions longer than expected (450 tokens) are free too; the one that uses the quota up is free in part."""
    now_ms = round(time.time() * 1000)
    quota = {"free_tokens": 2000, "free_days": 90, "activated_at": now_ms}
    with serving("--fake-tokens=900", "--fake-tpot-s=0", **quota) as (service, ledger):
        for _ in range(3):
            ask_native(service.url, CLIP, headers=KEY, max_tokens=900)
        records = ledger()
    assert [(record.free_tokens, record.amount_nanos) for record in records] == [
        (921, 0),
        (921, 0),
        # 21 x 15,800 + 900 x 12,700 = 11,761,800 for 921 tokens, of which 763 are billed, rounded up
        (158, 9_744_032),
    ]


@pytest.mark.parametrize("log_content", [False, True])
def test_captions_are_logged_only_if_switched_on(*, log_content: bool) -> None:
    """The log has no audio and no key, and captions only of a tenant that has switched that on."""
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
