"""The whole application in this process, with a fake engine that fails as a test wants, and the film as a clip."""

from __future__ import annotations

import asyncio
import io
import sqlite3
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import soundfile

from serving.api.app import create_app
from serving.config import Settings
from serving.engine.admission_control import AdmissionControl
from serving.engine.fake import FakeEngine
from serving.types import SAMPLE_RATE
from tests.audio.film import film
from tests.support.wire import COMPATIBLE, NATIVE, compatible_body, data_url, native_body

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable
    from pathlib import Path

    from serving.engine.base import EngineDelta
    from tests.audio.film import Film


def clip_of(story: Film) -> str:
    """Return a film as a data URL."""
    file = io.BytesIO()
    soundfile.write(file, story.samples, SAMPLE_RATE, format="WAV")
    return data_url(file.getvalue())


FILM = film(70)
"""75 s with known events."""


class FaultyEngine(FakeEngine):
    """An engine whose caption of a piece is preceded by a call that may raise; `seen` are the ids of its requests."""

    def __init__(self, settings: Settings, before: Callable[[str], None] = lambda _: None) -> None:
        super().__init__(settings)
        self._before = before
        self.seen: list[str] = []

    async def generate(self, request_id: str, *arguments: Any, **options: Any) -> AsyncGenerator[EngineDelta]:
        """See `Engine`."""
        self.seen.append(request_id)
        self._before(request_id)
        async for delta in super().generate(request_id, *arguments, **options):
            yield delta


@dataclass
class Service:
    """The application, its engine and a client."""

    app: Any
    engine: FaultyEngine
    client: httpx.AsyncClient
    directory: Path

    async def compatible(self, clip: str, **parameters: Any) -> httpx.Response:
        """Ask for a caption in the OpenAI dialect."""
        return await self.client.post(COMPATIBLE, json=compatible_body(clip, **parameters))

    async def native(self, clip: str, *, stream: bool = False, **parameters: Any) -> httpx.Response:
        """Ask for a caption in the DashScope dialect."""
        headers = {"x-dashscope-sse": "enable"} if stream else {}
        return await self.client.post(NATIVE, json=native_body(clip, **parameters), headers=headers)

    @property
    def unreleased(self) -> tuple[int, ...]:
        """Slots in use, memory of features and kept ones, disk of pieces, captions in the engine."""
        components = self.app.state.components
        pipeline, load = components.pipeline, components.engine.load
        held = pipeline.in_flight, components.workers.outstanding_bytes, pipeline._kept.used, pipeline._piece_files.used
        return (*held, load.running, load.waiting)

    async def metric(self, series: str) -> float:
        """Return the value of one series of the metrics."""
        components = self.app.state.components
        text, _ = await components.metrics.expose(components.engine.check_health)
        (line,) = [line for line in text.decode().splitlines() if line.startswith(f"{series} ")]
        return float(line.split()[-1])


def bills(directory: Path) -> list[tuple[Any, ...]]:
    """Return audio (ms), tokens of input and output, outcome, finish reason and billing of each request, once ended."""
    columns = "audio_ms, input_tokens, output_tokens, ending, finish_reason, billed"
    with closing(sqlite3.connect(directory / "captioner.db")) as database:
        return [*database.execute(f"SELECT {columns} FROM usage_records ORDER BY opened_at")]  # noqa: S608


@asynccontextmanager
async def service(
    directory: Path, before: Callable[[str], None] = lambda _: None, **changes: object
) -> AsyncIterator[Service]:
    """Run the application; `before` is called with the id of each request to the engine."""
    given = {"engine": "fake", "auth": False, "stream_flush_interval_s": 0, **changes}
    settings = Settings(data_dir=directory, uploads_dir=directory / "uploads", **given)  # type: ignore[arg-type]
    engine = FaultyEngine(settings, before)
    app = create_app(settings, AdmissionControl(engine, settings))
    async with app.router.lifespan_context(app):
        while not engine._ready:  # noqa: ASYNC110 - a few milliseconds
            await asyncio.sleep(0.01)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://captioner") as client:
            yield Service(app, engine, client, directory)
