"""The ways in which a request can end, by the names of the table in `serving/tenancy/BILLS.md`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from serving.types import SchedulingClass
from tests.support.wire import COMPATIBLE, data_url, wav
from tests.tenancy.billed_service import CLIP, NEW_YEAR_MS, NOON_MS

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from tests.tenancy.billed_service import BilledService

    Scenario = Callable[[BilledService, str], Coroutine[Any, Any, str]]
    """A request of that tenant; returns the status of its answer."""

LEFT = "left"
"""Instead of the status, if the client has left."""


def ask(tokens: int = 24, *, audio: str = CLIP, stream: bool = True, **parameters: Any) -> Scenario:
    """Request a caption for which the engine would write this number of tokens."""

    async def scenario(service: BilledService, tenant: str) -> str:
        service.engine.write(tokens)
        return await service.status(tenant, audio, stream=stream, **parameters)

    return scenario


def faulty(*, stream: bool = True, **faults: int) -> Scenario:
    """Request a caption in which the engine fails or hangs."""

    async def scenario(service: BilledService, tenant: str) -> str:
        service.engine.write(**faults)
        return await service.status(tenant, stream=stream)

    return scenario


def looping(times: int, *, stream: bool) -> Scenario:
    """Request a caption that loops, as often as it is generated up to this number of times."""

    async def scenario(service: BilledService, tenant: str) -> str:
        service.engine.write(loops=times)
        return await service.status(tenant, stream=stream)

    return scenario


async def without_key(service: BilledService, _: str) -> str:
    """Request a caption without a key."""
    return str((await service.client.post(COMPATIBLE, content=b"{")).status_code)


async def unreadable(service: BilledService, tenant: str) -> str:
    """Send a body that is no JSON."""
    return str((await service.client.post(COMPATIBLE, content=b"{", headers=service.key(tenant))).status_code)


async def beyond_requests(service: BilledService, tenant: str) -> str:
    """Send one more request than the minute allows; the first one counts, though it cannot be read."""
    assert await unreadable(service, tenant) == "400"
    return await service.status(tenant)


async def no_engine(service: BilledService, tenant: str) -> str:
    """Request a caption while the engine loads."""
    service.engine.unload()
    try:
        return await service.status(tenant)
    finally:
        service.engine.write()


async def no_slot(service: BilledService, tenant: str) -> str:
    """Request a caption while other tenants' captions hold all slots."""
    slots = service.components.pipeline._slots
    held = [slots.permit(SchedulingClass(f"other-{number}")) for number in range(slots.size)]
    for permit in held:
        permit.count(1)
    try:
        return await service.status(tenant)
    finally:
        for permit in held:
            permit.release()


async def full_queue(service: BilledService, tenant: str) -> str:
    """Request a caption while one holds the engine and another one fills its queue."""
    service.engine.hold()
    async with service.running("blocker"):
        await service.until(lambda: service.admission.load.running)
        async with service.running("waiter"):
            await service.until(lambda: service.admission.load.waiting)
            return await service.status(tenant)


async def queued_and_left(service: BilledService, tenant: str) -> str:
    """Leave while another caption holds the engine."""
    service.engine.hold()
    async with service.running("blocker"):
        await service.until(lambda: service.admission.load.running)
        async with service.running(tenant):
            await service.until(lambda: service.admission.load.waiting)
        await service.until(lambda: not service.admission.load.waiting)
    return LEFT


async def left_in_download(service: BilledService, tenant: str) -> str:
    """Leave while the audio is fetched from a server that sends nothing."""
    connected = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.set()
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        async with service.running(tenant, f"http://127.0.0.1:{port}/a.wav"):
            await asyncio.wait_for(connected.wait(), 60)
        await service.until(lambda: not service.components.pipeline.in_flight)
    finally:
        server.close()
    return LEFT


async def left_before_output(service: BilledService, tenant: str) -> str:
    """Leave once the engine has started, before its first token."""
    service.engine.hold()
    async with service.running(tenant):
        await service.until(lambda: service.admission.load.running)
    return LEFT


async def left_mid_stream(service: BilledService, tenant: str) -> str:
    """Leave with five tokens received, at which the engine hangs. The first event has the role and no text."""
    service.engine.write(hang_after_tokens=5)
    await service.leave_after(tenant, events=6)
    return LEFT


async def refused_by_disk(service: BilledService, tenant: str) -> str:
    """Request a caption while the ledger's disk is full."""
    async with service.stores.full_disk(service):
        return await service.status(tenant)


async def ended_on_a_full_disk(service: BilledService, tenant: str) -> str:
    """End while the ledger's disk is full."""
    service.engine.hold()
    async with service.running(tenant) as task:
        await service.until(lambda: service.admission.load.running)
        async with service.stores.full_disk(service):
            service.engine.resume()
            return await task


async def without_database(service: BilledService, tenant: str) -> str:
    """Be admitted and end while the database is away."""
    service.stores.database_away = True
    try:
        return await service.status(tenant)
    finally:
        service.stores.database_away = False


async def over_midnight(service: BilledService, tenant: str) -> str:
    """Be admitted in the last millisecond of the year, and end in the next year, when another price is valid."""
    service.engine.hold()
    service.stores.now_ms = NEW_YEAR_MS - 1
    try:
        async with service.running(tenant) as task:
            await service.until(lambda: service.admission.load.running)
            service.stores.now_ms = NEW_YEAR_MS + 1000
            service.engine.resume()
            status = await task
        await service.settled()
        # Nothing of it counts in the new day, month and year.
        used = await service.used(tenant)
        assert [used[name] for name in ("tokens-day", "tokens-month", "money-day", "money-month")] == [0, 0, 0, 0]
        [record] = service.records(tenant)
        assert (record.opened_at, record.closed_at) == (NEW_YEAR_MS - 1, NEW_YEAR_MS + 1000)
        assert service.usage_by_day(tenant) == {"2026-12-31": "0.0006366"}
    finally:
        service.stores.now_ms = NOON_MS
    return status


async def after_a_price_change(service: BilledService, tenant: str) -> str:
    """Be admitted in the first millisecond of another price."""
    service.stores.now_ms = NEW_YEAR_MS
    return await service.status(tenant)


SCENARIOS: Mapping[str, tuple[Scenario, Mapping[str, Any]]] = {
    "complete": (ask(), {}),
    "at its `max_tokens` (10)": (ask(max_tokens=10), {}),
    "at the end of a budget (31 tokens a day)": (ask(), {"tokens_per_day": 31}),
    "the deadline cuts it after 5 tokens": (faulty(stream=False, hang_after_tokens=5), {}),
    "empty: the model writes nothing": (ask(0), {}),
    "empty: the client's stop string is the first word": (ask(stop=["This"]), {}),
    "its loop is stopped after 5 tokens, in a stream": (looping(1, stream=True), {}),
    "its loop is stopped, and the second sample is good": (looping(1, stream=False), {}),
    "its loop is stopped after 5 tokens, twice": (looping(2, stream=False), {}),
    "within the free quota": (ask(), {"free_tokens": 1000}),
    "the free quota (31 tokens) ends in it": (ask(), {"free_tokens": 31}),
    "admitted before midnight and a new price, ends later": (over_midnight, {}),
    "admitted after a new price (0.02 and 0.03 CNY)": (after_a_price_change, {}),
    "no key": (without_key, {}),
    "refused by a limit of the minute (1 request, used before)": (beyond_requests, {"requests_per_minute": 1}),
    "refused by a budget that leaves less than 22 tokens": (ask(), {"tokens_per_day": 21}),
    "its body cannot be read": (unreadable, {}),
    "no engine is ready": (no_engine, {}),
    "all `max_concurrent_requests` are in use": (no_slot, {}),
    "the ledger's disk is full": (refused_by_disk, {}),
    "its audio cannot be read": (ask(audio="data:;base64,AAAA"), {}),
    "its length exceeds a limit (20 tokens a minute)": (ask(), {"tokens_per_minute": 20}),
    "its length exceeds a budget (2 s, 30 tokens a day)": (ask(audio=data_url(wav(2))), {"tokens_per_day": 30}),
    "the engine's queue is full": (full_queue, {}),
    "left while its audio is fetched": (left_in_download, {}),
    "left while queued for the engine": (queued_and_left, {}),
    "left before the first token": (left_before_output, {}),
    "left in mid-stream, after 5 tokens": (left_mid_stream, {}),
    "the engine is lost before the first token": (faulty(fail_after_tokens=0), {}),
    "the engine is lost in mid-stream, after 5 tokens": (faulty(fail_after_tokens=5), {}),
    "nothing is generated before the deadline": (faulty(stream=False, hang_after_tokens=0), {}),
    "the ledger's disk is full when it ends": (ended_on_a_full_disk, {}),
    "the database is away from admission to end": (without_database, {}),
}
"""Scenario and settings of the tenant: limits, and free tokens."""
