"""The seams of a request's way in one process: real keys of two plans, HTTP, audio worker, fetcher, engine and ledger.

Each part has its own tests. These hold what one part passes to the next one: the scheduling class of the plan, the
turns that follow from it, and the bill. They count turns and nano-units, never time.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from serving.audio.download_messages import Start
from serving.engine.base import ignore_start
from serving.scheduling.shared_capacity import Permit
from serving.tenancy import schema
from serving.types import NO_TENANT, SchedulingClass
from tests.support.wire import NATIVE, native_body, wav
from tests.tenancy.billed_service import CLIP, NEW_YEAR_MS, ScriptedEngine, billed_service
from tests.tenancy.test_endings import with_prices

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from pathlib import Path

    from serving.config import Settings
    from serving.engine.base import EngineDelta
    from serving.types import Features, Sampling
    from tests.support.media import MediaServer
    from tests.tenancy.billed_service import BilledService

PLANS: dict[str, dict[str, Any]] = {
    "gold": {"weight": 3.0, "tenant_limits": {"requests_per_minute": 1000}},
    "bronze": {"weight": 1.0},
    "urgent": {"weight": 2.0, "priority": 1},
    "trial": {"free_tokens": 100, "free_days": 90},
}
TENANTS: dict[str, dict[str, Any]] = {f"{plan}-tenant": {"plan": plan} for plan in PLANS} | {"blocker": {}}
ROOMY = {"max_engine_queue": 1000, "max_concurrent_requests": 1000, "max_engine_wait_s": 600}
"""Bounds that no request of these tests reaches."""


class TurnByTurn(ScriptedEngine):
    """An engine of one slot that notes whose captions it is given, and starts one for each `turns.release()`."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.given: list[SchedulingClass] = []
        self.turns = asyncio.Semaphore(0)

    async def generate(
        self,
        request_id: str,
        features: Features,
        sampling: Sampling,
        scheduling_class: SchedulingClass = NO_TENANT,
        on_started: Callable[[], None] = ignore_start,
    ) -> AsyncGenerator[EngineDelta]:
        """Wait for a turn, then write the caption."""
        self.given.append(scheduling_class)
        await self.turns.acquire()
        async for delta in super().generate(request_id, features, sampling, scheduling_class, on_started):
            yield delta

    def go_on(self, captions: int) -> None:
        """Write this many captions more."""
        for _ in range(captions):
            self.turns.release()


def engine_of(service: BilledService) -> TurnByTurn:
    """Return the service's engine."""
    assert isinstance(service.engine, TurnByTurn)
    return service.engine


@pytest.mark.parametrize("replicated", [False, True])
async def test_tenants_get_turns_by_the_weights_of_their_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, replicated: bool
) -> None:
    """A tenant of weight 3 gets 30 of 40 captions that one engine slot makes, and one of weight 1 gets 10."""
    url = f"sqlite:///{tmp_path / 'seams.db'}"
    chosen: dict[str, Any] = {**ROOMY, "plans": PLANS, "engine": TurnByTurn, "replicated": replicated}
    async with billed_service(tmp_path, url, monkeypatch, TENANTS, **chosen) as service:
        engine = engine_of(service)
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=service.client.base_url, timeout=300, limits=limits) as service.client:
            blocker = asyncio.create_task(service.status("blocker"))
            await service.until(lambda: service.admission.load.running)
            # The tenant of the smaller weight comes first, with as many requests.
            requests = [
                asyncio.create_task(service.status(tenant))
                for tenant in ("bronze-tenant", "gold-tenant")
                for _ in range(50)
            ]
            await service.until(lambda: service.admission.load.waiting == 100)
            urgent = asyncio.create_task(service.status("urgent-tenant"))
            await service.until(lambda: service.admission.load.waiting == 101)
            engine.go_on(1 + 1 + 40)
            await service.until(lambda: engine.finished == 42)
            await service.until(lambda: service.components.pipeline.in_flight == 102 - 42)
            await service.components.usage_sessions.stop()
            ledger = service.components.usage_sessions.ledger
            await service.until(lambda: not ledger.pending)
            recorded = Counter(record.tenant_id for record in service.records() if record.ending == "finished")
            engine.go_on(60)
            assert {await each for each in (blocker, urgent, *requests)} == {"200"}
        assert [whose.tenant for whose in engine.given[:2]] == ["blocker", "urgent-tenant"]
        assert engine.given[1] == SchedulingClass("urgent-tenant", 2.0, 1)
        assert set(engine.given[2:]) == {SchedulingClass("gold-tenant", 3.0), SchedulingClass("bronze-tenant", 1.0)}
        for captions, of_gold in ((4, 3), (8, 6), (20, 15), (40, 30), (60, 45)):
            turns = Counter(whose.tenant for whose in engine.given[2 : 2 + captions])
            assert turns["gold-tenant"] == pytest.approx(of_gold, abs=1)
        assert recorded.pop("blocker") == recorded.pop("urgent-tenant") == 1
        assert recorded.total() == 40
        assert recorded["gold-tenant"] == pytest.approx(30, abs=1)


@pytest.mark.parametrize("replicated", [False, True])
async def test_every_part_sees_whose_request_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, media: MediaServer, *, replicated: bool
) -> None:
    """Body, slot, fetcher, worker, features and engine, in a replica too, get the class of the key's plan."""
    seen: dict[str, set[SchedulingClass]] = {}
    media.files["seams.wav"] = wav(1)
    make = Permit.__init__

    def noted(permit: Permit, capacity: Any, scheduling_class: SchedulingClass) -> None:
        seen.setdefault(capacity._reason, set()).add(scheduling_class)
        make(permit, capacity, scheduling_class)

    url = f"sqlite:///{tmp_path / 'seams.db'}"
    chosen: dict[str, Any] = {**ROOMY, "plans": PLANS, "engine": TurnByTurn, "replicated": replicated}
    async with billed_service(tmp_path, url, monkeypatch, TENANTS, **chosen) as service:
        engine, workers, downloads = engine_of(service), service.components.workers, service.components.downloads
        engine.go_on(3)
        enqueue, send = workers._queue.add, downloads._send

        def enqueued(task: Any) -> None:
            seen.setdefault("worker", set()).add(task.scheduling_class)
            enqueue(task)

        def sent(message: Any) -> None:
            if isinstance(message, Start):
                whose = SchedulingClass(message.tenant, message.weight, message.priority)
                seen.setdefault("fetcher", set()).add(whose)
            send(message)

        monkeypatch.setattr(workers._queue, "add", enqueued)
        monkeypatch.setattr(downloads, "_send", sent)
        monkeypatch.setattr(Permit, "__init__", noted)
        address = media.url("seams.wav")
        assert await service.status("urgent-tenant", address) == "200"
        assert await service.status("urgent-tenant", address, stream=False) == "200"
        native = await service.client.post(NATIVE, json=native_body(CLIP), headers=service.key("urgent-tenant"))
        assert native.status_code == 200
        seen["engine"] = set(engine.given)
    whose = {SchedulingClass("urgent-tenant", 2.0, 1)}
    names = ("bodies", "concurrent_requests", "fetcher", "worker", "capacity", "engine")
    assert {name: seen[name] for name in names} == dict.fromkeys(names, whose)


async def test_bills_over_the_end_of_free_tokens_and_a_price_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 free tokens cover two captions of 45 tokens and ten tokens of the third; the new price begins at midnight.

    A clip of a second has 21 input tokens and a caption 24, so its price is 21 x 15,800 + 24 x 12,700 = 636,600 nanos,
    in the new year 21 x 20,000 + 24 x 30,000 = 1,140,000. Of the third caption 35 of 45 tokens are paid: 495,133.3.
    """
    url = f"sqlite:///{tmp_path / 'seams.db'}"
    with_prices(url).dispose()
    async with billed_service(
        tmp_path, url, monkeypatch, TENANTS, plans=PLANS, engine=TurnByTurn, region="beijing"
    ) as service:
        engine_of(service).go_on(8)
        for now_ms in (
            NEW_YEAR_MS - 5,
            NEW_YEAR_MS - 3,
            NEW_YEAR_MS - 2,
            NEW_YEAR_MS - 1,
            NEW_YEAR_MS,
            NEW_YEAR_MS + 1,
        ):
            service.stores.now_ms = now_ms
            assert await service.status("trial-tenant") == "200"
        for now_ms in (NEW_YEAR_MS - 1, NEW_YEAR_MS):
            service.stores.now_ms = now_ms
            assert await service.status("bronze-tenant") == "200"
        await service.settled()
        trial, bronze = service.records("trial-tenant"), service.records("bronze-tenant")
        assert [(each.free_tokens, each.amount_nanos) for each in trial] == [
            (45, 0),
            (45, 0),
            (10, 495_134),
            (0, 636_600),
            (0, 1_140_000),
            (0, 1_140_000),
        ]
        assert [(each.free_tokens, each.amount_nanos) for each in bronze] == [(0, 636_600), (0, 1_140_000)]
        assert [(each.input_price, each.output_price) for each in bronze] == [("0.0158", "0.0127"), ("0.02", "0.03")]
        assert service.usage_by_day("trial-tenant") == {"2026-12-31": "0.001131734", "2027-01-01": "0.00228"}
        assert service.usage_by_day("bronze-tenant") == {"2026-12-31": "0.0006366", "2027-01-01": "0.00114"}
        assert (await service.metrics("trial-tenant"))["cost CNY"] == pytest.approx(0.003411734, abs=1e-15)


async def test_a_quota_that_is_over_bills_the_next_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant that was activated 91 days ago pays, one that was activated 89 days ago does not."""
    url = f"sqlite:///{tmp_path / 'seams.db'}"
    with_prices(url).dispose()
    async with billed_service(
        tmp_path, url, monkeypatch, TENANTS, plans=PLANS, engine=TurnByTurn, region="beijing"
    ) as service:
        engine_of(service).go_on(2)
        for days, of_caption in ((89, (45, 0)), (91, (0, 636_600))):
            at_ms = service.stores.now_ms - days * 86_400_000
            with service.database.begin() as connection:
                connection.execute(schema.tenants.update().values(activated_at=at_ms))
                connection.execute(schema.store_state.update().values(revision=schema.store_state.c.revision + 1))
            service.components.keys.refresh()
            service.stores.now_ms += 1
            assert await service.status("trial-tenant") == "200"
            await service.settled()
            record = service.records("trial-tenant")[-1]
            assert (record.free_tokens, record.amount_nanos) == of_caption


@pytest.mark.parametrize("replicated", [False, True])
async def test_while_a_caption_streams_neither_its_body_nor_its_features_are_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, replicated: bool
) -> None:
    """Once the engine has written a token, the memory of bodies and of features is 0, here and in a replica."""
    url = f"sqlite:///{tmp_path / 'seams.db'}"
    chosen: dict[str, Any] = {"plans": PLANS, "engine": TurnByTurn, "replicated": replicated}
    async with billed_service(tmp_path, url, monkeypatch, TENANTS, **chosen) as service:
        engine, components = engine_of(service), service.components
        engine.write(hang_after_tokens=5)
        async with service.running("gold-tenant"):
            await service.until(lambda: engine.given)
            assert components.bodies.used == 0  # the clip is decoded
            assert components.workers.outstanding_bytes == 51_200  # 128 floats for each of 100 frames
            engine.go_on(1)
            await service.until(lambda: engine.steps)
            await service.until(lambda: not components.workers.outstanding_bytes)
            assert components.pipeline.in_flight == 1


async def test_the_deadline_counts_from_the_arrival(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that arrived 59 s before its audio is known has a second left of a deadline of 60 s."""
    url = f"sqlite:///{tmp_path / 'seams.db'}"
    async with billed_service(
        tmp_path, url, monkeypatch, TENANTS, plans=PLANS, engine=TurnByTurn, response_timeout_s=60
    ) as service:
        engine, metrics = engine_of(service), service.components.metrics
        engine.write(hang_after_tokens=5)
        engine.go_on(1)
        begin = metrics.begin

        def begun_before(*arguments: Any, **named: Any) -> Any:
            record = begin(*arguments, **named)
            record.started -= 59
            return record

        monkeypatch.setattr(metrics, "begin", begun_before)
        answer = await asyncio.wait_for(service.post("gold-tenant", stream=False), 40)
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["finish_reason"] == "length"
