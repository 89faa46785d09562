"""The application as a client in the same process sees it, with helper processes replaced (fixture `in_process`)."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx

from serving.api.app import create_app
from serving.config import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from serving.engine.base import Engine


@asynccontextmanager
async def served(engine: Engine | None = None, /, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of a ready application with the fake engine, without authentication unless `settings` say so."""
    chosen = Settings(**{"engine": "fake", "auth": False, "audio_workers": 1, **settings})
    app = create_app(chosen, engine)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", timeout=30) as client,
    ):
        while (await client.get("/readyz")).status_code != 200:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.01)
        yield client
