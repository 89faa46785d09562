"""`Idempotency-Key`: a repeated request gets the same answer, byte for byte, and is billed once."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import sqlalchemy as sa

from serving.tenancy import idempotency, schema
from tests.batch.served import Served, served
from tests.support.service import RunningService
from tests.support.wire import COMPATIBLE, NATIVE, compatible_body, data_url, native_body, wav

if TYPE_CHECKING:
    from pathlib import Path

    from serving.engine.fake import FakeEngine

pytestmark = pytest.mark.usefixtures("in_process", "hurried")

CLIP, OTHER = data_url(wav(1)), data_url(wav(2))
KEY = {"idempotency-key": "stainless-python-retry-1"}


async def _billed(running: Served) -> list[Any]:
    """Return the billed records of tenant `one`, once the ledger has written what it has."""
    while running.components.usage_sessions.ledger.pending:  # noqa: ASYNC110 - there is no event for it
        await asyncio.sleep(0.02)
    usage = schema.usage_records
    with running.administration.database.connect() as connection:
        return [*connection.execute(sa.select(usage).where(usage.c.billed, usage.c.tenant_id == "one"))]


@pytest.mark.parametrize(("path", "body"), [(COMPATIBLE, compatible_body), (NATIVE, native_body)])
async def test_a_repeated_request_gets_the_same_bytes_unbilled(tmp_path: Path, path: str, body: Any) -> None:
    """The second answer is the first one, marked as replayed; only the first is billed."""
    async with served(tmp_path) as running:
        answers = [await running.one.post(path, json=body(CLIP), headers=KEY) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 200]
        assert {answer.content for answer in answers} == {answers[0].content}
        assert [answer.headers.get("idempotent-replayed") for answer in answers] == [None, "true", "true"]
        assert len({answer.headers["x-request-id"] for answer in answers}) == 3
        assert len(await _billed(running)) == 1
        await running.one.post(path, json=body(CLIP))
        assert len(await _billed(running)) == 2


async def test_a_repeated_form_is_the_same_request(tmp_path: Path) -> None:
    """A client that sends a form again writes another boundary: the answer and its type are the first one's."""
    async with served(tmp_path) as running:

        async def send(clip: bytes, **fields: str) -> httpx.Response:
            files = {"file": ("clip.wav", clip, "audio/wav")}
            return await running.one.post("/v1/audio/transcriptions", data=fields, files=files, headers=KEY)

        first, second = [await send(wav(1), response_format="vtt") for _ in range(2)]
        assert first.request.headers["content-type"] != second.request.headers["content-type"]
        assert (first.status_code, second.status_code, second.content) == (200, 200, first.content)
        assert second.headers["content-type"] == first.headers["content-type"] == "text/vtt; charset=utf-8"
        assert (await send(wav(2), response_format="vtt")).status_code == 409
        assert (await send(wav(1), response_format="srt")).status_code == 409
        assert len(await _billed(running)) == 1


async def test_a_key_is_of_one_request_of_one_tenant(tmp_path: Path) -> None:
    """Another body, or the other dialect, with the same key is 409; another tenant's key is another key."""
    async with served(tmp_path) as running:
        first = await running.one.post(COMPATIBLE, json=compatible_body(CLIP), headers=KEY)
        for conflicting in (
            await running.one.post(COMPATIBLE, json=compatible_body(OTHER), headers=KEY),
            await running.one.post(COMPATIBLE, json=compatible_body(CLIP, temperature=0.1), headers=KEY),
        ):
            assert (conflicting.status_code, conflicting.json()["error"]["code"]) == (409, "idempotency_conflict")
        assert (await running.one.post(NATIVE, json=native_body(CLIP), headers=KEY)).status_code == 409
        other = await running.two.post(COMPATIBLE, json=compatible_body(CLIP), headers=KEY)
        assert (other.status_code, "idempotent-replayed" in other.headers) == (200, False)
        assert other.content != first.content  # another id
        for wrong in ("", "x" * 256, "a\x01"):
            answer = await running.one.post(COMPATIBLE, json=compatible_body(CLIP), headers={"idempotency-key": wrong})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Idempotency-Key")
        assert len(await _billed(running)) == 1


async def test_requests_at_the_same_time_are_one(tmp_path: Path) -> None:
    """Requests that come while the first one runs wait for its answer."""
    async with served(tmp_path, fake_tpot_s=0.02) as running:
        requests = [running.one.post(COMPATIBLE, json=compatible_body(CLIP), headers=KEY) for _ in range(5)]
        answers = await asyncio.gather(*requests)
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.content for answer in answers}) == 1
        assert len(await _billed(running)) == 1


def test_a_client_that_left_gets_the_answer_later() -> None:
    """The caption of a client that gave up is finished; its retry gets it, and the tokens are billed once."""
    with RunningService("--engine=fake", "--fake-tpot-s=0.05", "--api-keys=sk-one") as service:
        headers = KEY | {"authorization": "Bearer sk-one"}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(service.url + COMPATIBLE, json=compatible_body(CLIP), headers=headers, timeout=0.4)
        again = httpx.post(service.url + COMPATIBLE, json=compatible_body(CLIP), headers=headers, timeout=30)
        assert (again.status_code, again.headers["idempotent-replayed"]) == (200, "true")
        assert service.metric("captioner_tokens_total", kind="output") == 24


async def test_errors_are_not_kept(tmp_path: Path) -> None:
    """A request that failed may be repeated with its key, and runs."""
    async with served(tmp_path) as running:
        engine: Any = running.components.engine
        fake: FakeEngine = engine.engine
        fake._ready = False
        failed = await running.one.post(COMPATIBLE, json=compatible_body(CLIP), headers=KEY)
        assert failed.status_code == 503
        fake._ready = True
        answer = await running.one.post(COMPATIBLE, json=compatible_body(CLIP), headers=KEY)
        assert (answer.status_code, "idempotent-replayed" in answer.headers) == (200, False)
        bad = {"idempotency-key": "bad"}
        for _ in range(2):
            refused = await running.one.post(COMPATIBLE, json=compatible_body(data_url(b"no audio")), headers=bad)
            assert refused.status_code == 400


async def test_streams_are_not_kept(tmp_path: Path) -> None:
    """A stream ignores the key: each one is captioned and billed."""
    async with served(tmp_path) as running:
        for _ in range(2):
            answer = await running.one.post(COMPATIBLE, json=compatible_body(CLIP, stream=True), headers=KEY)
            assert answer.text.endswith("data: [DONE]\n\n")
            assert "idempotent-replayed" not in answer.headers
        assert len(await _billed(running)) == 2


async def test_the_claim_of_a_killed_process_lapses(tmp_path: Path) -> None:
    """A row whose process was killed is taken over once its lease has lapsed; one that is renewed is waited for."""
    async with served(tmp_path, response_timeout_s=1.5) as running:
        await running.one.post(COMPATIBLE, json=compatible_body(CLIP), headers=KEY)
        table = schema.idempotent_answers
        now_ms = round(1000 * time.time())
        with running.administration.database.begin() as connection:
            connection.execute(table.update().values(body=None, lease_until=now_ms + 60_000))
        waited = await running.one.post(COMPATIBLE, json=compatible_body(CLIP), headers=KEY)
        assert (waited.status_code, waited.headers["retry-after"]) == (503, "5")
        with running.administration.database.begin() as connection:
            connection.execute(table.update().values(lease_until=now_ms - 1))
        answer = await running.one.post(COMPATIBLE, json=compatible_body(CLIP), headers=KEY)
        assert (answer.status_code, "idempotent-replayed" in answer.headers) == (200, False)


async def test_answers_are_kept_for_a_day_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer expires after 24 hours; of a tenant's answers the latest are kept, up to the bound."""
    monkeypatch.setattr(idempotency, "MOST_PER_TENANT", 2)
    async with served(tmp_path) as running:
        for number in range(4):
            await running.one.post(COMPATIBLE, json=compatible_body(CLIP), headers={"idempotency-key": str(number)})
            await asyncio.sleep(0.01)
        table = schema.idempotent_answers
        count = sa.select(sa.func.count()).select_from(table)
        with running.administration.database.begin() as connection:
            expires_at = connection.scalar(sa.select(sa.func.max(table.c.expires_at)))
            assert expires_at is not None
            assert abs(expires_at / 1000 - time.time() - 24 * 3600) < 60
        answers: Any = running.components.idempotency
        await answers.sweep()
        with running.administration.database.begin() as connection:
            assert connection.scalar(count) == 2
            connection.execute(table.update().values(expires_at=1))
        last: httpx.Response = await running.one.post(
            COMPATIBLE, json=compatible_body(CLIP), headers={"idempotency-key": "3"}
        )
        assert "idempotent-replayed" not in last.headers
        await answers.sweep()
        with running.administration.database.begin() as connection:
            assert connection.scalar(count) == 1


async def test_without_the_database_a_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the database is away a request with a key is 503, since it could be billed twice; others are served."""
    async with served(tmp_path) as running:

        def away(*_: Any) -> None:
            raise sa.exc.OperationalError("", {}, ConnectionError("away"))

        monkeypatch.setattr(idempotency.IdempotentAnswers, "_acquire", away)
        refused = await running.one.post(COMPATIBLE, json=compatible_body(CLIP), headers=KEY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "service_unavailable")
        assert (await running.one.post(COMPATIBLE, json=compatible_body(CLIP))).status_code == 200
