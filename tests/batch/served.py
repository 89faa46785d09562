"""The application in this process with keys of two tenants, for tests of files and batches."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from serving.api.app import create_app
from serving.config import Settings
from serving.tenancy import database as databases
from serving.tenancy.admin.service import Administration
from serving.tenancy.key_hashing import Pepper
from tests.support.wire import compatible_body, data_url, wav

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from pathlib import Path

    from serving.api.components import Components
    from serving.engine.base import Engine

CLIP = data_url(wav(1))


@dataclass
class Served:
    """An application that has started, with a client of tenant `one` and another one of tenant `two`."""

    components: Components
    administration: Administration
    one: httpx.AsyncClient
    two: httpx.AsyncClient

    async def upload(self, content: bytes, purpose: str = "batch", name: str = "in.jsonl") -> str:
        """Store a file of tenant `one`; return its id."""
        answer = await self.one.post("/v1/files", data={"purpose": purpose}, files={"file": (name, content)})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])


@asynccontextmanager
async def served(
    directory: Path, engine: Engine | None = None, *, plan: dict[str, Any] | None = None, **given: Any
) -> AsyncIterator[Served]:
    """Start an application over the data in `directory`, with the fake engine. `plan`: of tenant `one`."""
    settings = Settings(
        engine="fake",
        audio_workers=1,
        data_dir=directory / "data",
        uploads_dir=directory / "uploads",
        download_dir=directory,
        stream_flush_interval_s=0,
        fetch_allow=["127.0.0.0/8"],
        **given,
    )
    database = databases.open_database(settings)
    databases.migrate(database)
    administration = Administration(database, Pepper.of(settings), "test")
    unlimited = {"tenant_limits": {}, "key_limits": {}, "free_tokens": 0, "free_days": 0}
    administration.set_plan("of-one", **(unlimited | (plan or {})))
    keys = {}
    for name, its_plan in (("one", "of-one"), ("two", "unlimited")):
        if name not in {tenant["id"] for tenant in administration.tenants()}:
            administration.create_tenant(name, plan=its_plan)
        keys[name] = administration.create_key(name)[1]
    app = create_app(settings, engine)
    async with app.router.lifespan_context(app), _client(app, keys["one"]) as one, _client(app, keys["two"]) as two:
        while (await one.get("/readyz")).status_code != 200:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.01)
        yield Served(app.state.components, administration, one, two)
    database.dispose()


def _client(app: Any, key: str) -> httpx.AsyncClient:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", headers=headers, timeout=60)


def line(custom_id: str, audio: str = CLIP, **changes: Any) -> dict[str, Any]:
    """Return a line of an input file."""
    body = compatible_body(audio, **changes.pop("parameters", {}))
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body, **changes}


def jsonl(lines: Iterable[Any]) -> bytes:
    """Return an input file; a line that is a text is taken as it is."""
    return b"".join((each if isinstance(each, str) else json.dumps(each)).encode() + b"\n" for each in lines)
