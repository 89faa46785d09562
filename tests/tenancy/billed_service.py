"""The service in this process behind a real listener, with an engine and a clock that a test controls."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httpx
import sqlalchemy as sa
import uvicorn

from serving.api.app import create_app
from serving.api.uvicorn_protocol import protocol
from serving.config import Settings
from serving.engine.admission_control import AdmissionControl
from serving.engine.fake import FakeEngine, Faults
from serving.engine.remote.client import RemoteEngine
from serving.engine.remote.server import EngineServer
from serving.tenancy import database as databases
from serving.tenancy import usage_session
from serving.tenancy.admin.service import Administration
from serving.tenancy.billing import reports
from serving.tenancy.key_hashing import Pepper
from serving.tenancy.ledger import ledger as ledgers
from serving.tenancy.ledger import usage_table
from serving.tenancy.schema import usage_records
from serving.types import FinishReason
from tests.support.wire import COMPATIBLE, compatible_body, data_url, wav

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping
    from pathlib import Path

    import pytest

    from serving.engine.base import Engine, EngineDelta
    from serving.types import Features, Sampling

CLIP = data_url(wav(1))
"""One second: 13 tokens of audio and 8 of text."""

METRICS_TOKEN = "scrape"  # noqa: S105 - of this test
NOON_MS = 1_798_718_400_000  # 2026-12-31, 12:00 UTC
NEW_YEAR_MS = 1_798_761_600_000  # 2027-01-01, 00:00 UTC
UNLIMITED = 10**12
LOOP_TOKENS = 5
"""Tokens of a caption whose loop is stopped."""

ALL_LIMITS: Mapping[str, Any] = {
    "requests_per_minute": 1000,
    "tokens_per_minute": 1_000_000,
    "audio_seconds_per_minute": 1000,
    "concurrent_requests": 100,
    "concurrent_audio_seconds": 1000,
    "tokens_per_day": 1_000_000,
    "tokens_per_month": 1_000_000,
    "money_per_day": 1000,
    "money_per_month": 1000,
}
"""Limits that no row reaches unless it sets its own: so all of them are in the headers."""


class ScriptedEngine(FakeEngine):
    """A fake engine whose next captions a test decides."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        assert settings.fake_stall_file is not None
        self._stalled_while = settings.fake_stall_file
        self._loops = 0

    def write(self, tokens: int = 24, *, loops: int = 0, **faults: int | None) -> None:
        """Let the next captions have this number of tokens, and these faults; the first `loops` of them loop."""
        self._stalled_while.unlink(missing_ok=True)
        self._loops = loops
        self._tokens, self.faults, self._ready = tokens, Faults(**faults), True

    def unload(self) -> None:
        """Refuse captions, as an engine does that still loads."""
        self._ready = False

    def _deltas(self, features: Features, sampling: Sampling) -> Iterator[EngineDelta]:
        """Yield a caption; one that loops is stopped at its fifth token."""
        loops = self._loops > 0
        self._loops -= loops
        for number, delta in enumerate(super()._deltas(features, sampling), 1):
            if loops and number == LOOP_TOKENS:
                yield replace(delta, finish_reason=FinishReason.STOP, looped=True)
                return
            yield delta

    def hold(self) -> None:
        """Start captions without writing anything, until `resume`."""
        self._stalled_while.touch()

    def resume(self) -> None:
        """Write what was held."""
        self._stalled_while.unlink(missing_ok=True)


class Stores:
    """The clock, the disk and the database under the service, each of which can be made to fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ms = NOON_MS
        self.disk_full = self.database_away = False
        monkeypatch.setattr(usage_session, "now_ms", lambda: self.now_ms)
        monkeypatch.setattr(ledgers, "now_ms", lambda: self.now_ms)
        pwrite, allocate, write = os.pwrite, os.posix_fallocate, usage_table.write

        def on_disk(call: Callable[..., Any]) -> Callable[..., Any]:
            def called(*arguments: Any) -> Any:
                if self.disk_full:
                    raise OSError(28, "No space left on device")
                return call(*arguments)

            return called

        def written(*arguments: Any) -> None:
            if self.database_away:
                raise sa.exc.OperationalError("", {}, ConnectionError("away"))
            write(*arguments)

        monkeypatch.setattr(os, "pwrite", on_disk(pwrite))
        monkeypatch.setattr(os, "posix_fallocate", on_disk(allocate))
        monkeypatch.setattr(usage_table, "write", written)

    @contextlib.asynccontextmanager
    async def full_disk(self, service: BilledService) -> AsyncIterator[None]:
        """Fill the disk; once it has space again, wait until the ledger records again."""
        self.disk_full = True
        try:
            yield
        finally:
            self.disk_full = False
            await service.until(lambda: service.components.usage_sessions.ledger.writable)


class BilledService:
    """A running service: its engine, stores, keys of tenants, ledger and metrics."""

    def __init__(self, database: sa.Engine, stores: Stores, keys: Mapping[str, str]) -> None:
        self.database, self.stores, self.keys = database, stores, keys
        self.engine: ScriptedEngine
        self.admission: AdmissionControl
        self.components: Any
        self.client: httpx.AsyncClient
        self.probes: Counter[str] = Counter()
        """Requests that `used` has sent, by tenant."""

    def key(self, tenant: str) -> dict[str, str]:
        """Return the header that identifies a tenant."""
        return {"authorization": f"Bearer {self.keys[tenant]}"}

    async def post(self, tenant: str, audio: str = CLIP, *, stream: bool = True, **parameters: Any) -> httpx.Response:
        """Request a caption and read the response to its end."""
        body = compatible_body(audio, stream=stream, **parameters)
        return await self.client.post(COMPATIBLE, json=body, headers=self.key(tenant))

    async def status(self, tenant: str, audio: str = CLIP, *, stream: bool = True, **parameters: Any) -> str:
        """Request a caption, read the response to its end and return its status."""
        return str((await self.post(tenant, audio, stream=stream, **parameters)).status_code)

    @contextlib.asynccontextmanager
    async def running(self, tenant: str, audio: str = CLIP) -> AsyncIterator[asyncio.Task[str]]:
        """Request a caption in the background. A request that has not ended is cancelled: its client leaves."""
        task = asyncio.create_task(self.status(tenant, audio))
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.wait((task,))

    async def leave_after(self, tenant: str, events: int) -> None:
        """Read some events of a stream, then close the connection."""
        body = compatible_body(CLIP, stream=True)
        async with self.client.stream("POST", COMPATIBLE, json=body, headers=self.key(tenant)) as response:
            seen = b""
            async for piece in response.aiter_raw():
                seen += piece
                if seen.count(b"data:") >= events:
                    return

    async def until(self, condition: Callable[[], Any], timeout_s: float = 60) -> Any:
        """Wait until the condition holds; return its value."""
        deadline = time.monotonic() + timeout_s
        while not (found := condition()):
            if time.monotonic() > deadline:
                raise TimeoutError
            await asyncio.sleep(0.01)
        return found

    async def settled(self) -> None:
        """Wait until nothing runs and the database has every record."""
        ledger = self.components.usage_sessions.ledger
        pipeline = self.components.pipeline
        await self.until(lambda: not (ledger.open_records or pipeline.in_flight or ledger.pending))
        await self.components.usage_sessions.stop()

    def records(self, tenant: str | None = None) -> list[Any]:
        """Return the records of a tenant, or all, in the order of their admission."""
        query = sa.select(usage_records).order_by(usage_records.c.opened_at, usage_records.c.reported_at)
        if tenant is not None:
            query = query.where(usage_records.c.tenant_id == tenant)
        with self.database.connect() as connection:
            return list(connection.execute(query).all())

    def usage_by_day(self, tenant: str) -> dict[str, str]:
        """Return what a tenant was billed, by day."""
        since, until = dt.date(2026, 12, 1), dt.date(2027, 1, 31)
        rows = reports.usage(self.database, since=since, until=until, by=("day",), tenant=tenant)
        return {row["day"]: row["amount"] for row in rows}

    async def used(self, tenant: str) -> dict[str, float]:
        """Return what counts against each of a tenant's limits, from the headers of a request that cannot be read.

        That request counts as one of the minute and as a running one, unless a limit refuses it, and is subtracted.
        """
        answer = await self.client.post(COMPATIBLE, content=b"{", headers=self.key(tenant))
        assert answer.status_code in {400, 429}, answer.text
        limits = {name.removeprefix("x-ratelimit-"): value for name, value in answer.headers.items()}
        used = {
            name.removeprefix("limit-"): float(limit) - float(limits[name.replace("limit-", "remaining-", 1)])
            for name, limit in limits.items()
            if name.startswith("limit-")
        }
        if answer.status_code == 400:
            self.probes[tenant] += 1
            used["concurrent-requests"] -= 1
        return used | {"requests": used["requests"] - self.probes[tenant]}

    async def metrics(self, tenant: str) -> dict[str, float]:
        """Return a tenant's counters: its requests by outcome, the tokens of its bills by kind, and its cost."""
        text = (await self.client.get("/metrics", headers={"authorization": f"Bearer {METRICS_TOKEN}"})).text
        found: dict[str, float] = {}
        for line in text.splitlines():
            if line.startswith("captioner_tenant_") and f'tenant="{tenant}"' in line:
                series, _, value = line.rpartition(" ")
                name, _, labels = series.partition("{")
                word = next((part.split('"')[1] for part in labels.split(",") if not part.startswith("tenant")), "")
                found[f"{name.removeprefix('captioner_tenant_').removesuffix('_total')} {word}".strip()] = float(value)
        return found

    def _ready(self) -> bool:
        return self.components.keys.waiting_for is None


@contextlib.asynccontextmanager
async def billed_service(
    directory: Path,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    tenants: Mapping[str, Mapping[str, Any]],
    *,
    plans: Mapping[str, Mapping[str, Any]] | None = None,
    engine: type[ScriptedEngine] = ScriptedEngine,
    replicated: bool = False,
    **settings: Any,
) -> AsyncIterator[BilledService]:
    """Run a service with these tenants, by their ids: `plan`, `limits`, `free_tokens` and the like.

    A tenant without a plan has the plan `billed`, which limits nothing. With `replicated` the engine is behind a
    socket, as a replica's is behind its frontend.
    """
    given = Settings(
        engine="fake",
        audio_workers=1,
        data_dir=directory / "data",
        download_dir=directory,
        uploads_dir=directory / "uploads",
        database_url=database_url,
        metrics_token=METRICS_TOKEN,
        metrics_tenants=1000,
        stream_flush_interval_s=0,
        fetch_allow=["127.0.0.0/8"],
        fake_stall_file=directory / "stall",
        **{"fake_kv_tokens": 256, "max_engine_queue": 1, "max_concurrent_requests": 12, **settings},
    )
    database = databases.connect(database_url)
    databases.migrate(database)
    administration = Administration(database, Pepper.of(given), "test")
    for name, plan in {"billed": {}, **(plans or {})}.items():
        administration.set_plan(
            name, **{"tenant_limits": {}, "key_limits": {}, "free_tokens": 0, "free_days": 0, **plan}
        )
    keys = {}
    for name, chosen in tenants.items():
        administration.create_tenant(name, **{"plan": "billed", **chosen})
        keys[name] = administration.create_key(name)[1]
    service = BilledService(database, Stores(monkeypatch), keys)
    service.engine = engine(given)
    service.admission = AdmissionControl(service.engine, given)
    engines = _behind_a_socket(given, service.admission) if replicated else nullcontext(service.admission)
    try:
        async with engines as served, _served(given, service, served):
            yield service
    finally:
        database.dispose()


@contextlib.asynccontextmanager
async def _served(given: Settings, service: BilledService, engine: Engine) -> AsyncIterator[None]:
    app = create_app(given, engine)
    service.components = app.state.components
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, http=protocol(given), ws="none", log_config=None, access_log=False)
    )
    serving = asyncio.create_task(server.serve())
    try:
        await service.until(lambda: server.started and service._ready())
        port = server.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as service.client:
            await service.until(lambda: service.engine._ready)
            yield
    finally:
        service.engine.resume()
        service.engine.die()
        server.should_exit = True
        await serving


@contextlib.asynccontextmanager
async def _behind_a_socket(given: Settings, admission: AdmissionControl) -> AsyncIterator[RemoteEngine]:
    secret = "sesame"  # noqa: S105 - of this test
    server = EngineServer(given, admission, lambda: secret)
    await admission.start()
    await server.start("127.0.0.1")
    engine = RemoteEngine()
    engine.update([f"127.0.0.1:{server.port}"], secret)
    try:
        yield engine
    finally:
        await server.stop()
        await admission.stop()
