"""Requests that were meant for another server: other base URLs and probes work, and errors name the next step."""

from __future__ import annotations

import pytest

from serving.config import Settings
from serving.engine.fake import FakeEngine
from serving.errors import EngineFailed
from tests.support.served import served
from tests.support.wire import COMPATIBLE, MODEL, compatible_body, data_url, native_body, wav

pytestmark = pytest.mark.usefixtures("in_process")

CLIP = data_url(wav(1))
ENDPOINTS = (
    "Not found! Captions: POST /v1/chat/completions (OpenAI), POST /v1/audio/transcriptions (a form with a file), "
    "POST /api/v1/services/aigc/multimodal-generation/generation (DashScope). Models: GET /v1/models."
)


async def test_base_urls_without_v1() -> None:
    """Chat completions and models answer below every base URL that people write."""
    async with served() as client:
        for prefix in ("", "/v1", "/compatible-mode", "/compatible-mode/v1"):
            answer = await client.post(f"{prefix}/chat/completions", json=compatible_body(CLIP))
            assert answer.status_code == 200, answer.text
            assert [each["id"] for each in (await client.get(f"{prefix}/models")).json()["data"]] == [MODEL]
            assert (await client.get(f"{prefix}/models/{MODEL}")).json()["id"] == MODEL
            assert (await client.get(f"{prefix}/models/x")).json()["error"]["code"] == "model_not_found"
            refused = await client.post(f"{prefix}/chat/completions", content=b"")
            assert refused.json()["error"]["code"] == "invalid_parameter_error"


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embeddings", "/completions", "/v1/v1/chat/completions"])
async def test_an_unknown_path_lists_the_endpoints_to_openais_clients(path: str) -> None:
    """A path of OpenAI's that is not served is 404 in that dialect, with the endpoints."""
    async with served() as client:
        answer = await client.post(path, json={})
        assert (answer.status_code, answer.json()["error"]["message"]) == (404, ENDPOINTS)


async def test_an_unknown_path_lists_the_endpoints_to_dashscopes_clients() -> None:
    """Any other path is 404 in the native dialect, with the endpoints."""
    async with served() as client:
        answer = await client.get("/api/v1/tasks/1")
        assert (answer.status_code, answer.json()["code"], answer.json()["message"]) == (404, "NotFound", ENDPOINTS)


async def test_a_wrong_method_names_the_right_one() -> None:
    """A method that the path does not have is refused with those that it has."""
    async with served() as client:
        answer = await client.get(COMPATIBLE)
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
        assert answer.json()["error"]["message"] == "Request method 'GET' is not supported. Use POST."


async def test_health_is_vllms() -> None:
    """`/health` is 200 without a body while captions can be made, and 503 once they cannot."""
    engine = _Mortal(Settings(auth=False))
    async with served(engine) as client:
        healthy = await client.get("/health")
        assert (healthy.status_code, healthy.content) == (200, b"")
        engine.dead = True
        sick = await client.get("/health")
        assert (sick.status_code, sick.content) == (503, b"")


class _Mortal(FakeEngine):
    dead = False

    async def check_health(self) -> None:
        if self.dead:
            raise EngineFailed


async def test_usage_has_cached_tokens() -> None:
    """Clients of OpenAI's that read `cached_tokens` find 0: nothing is cached. The native usage has no such field."""
    async with served() as client:
        usage = (await client.post(COMPATIBLE, json=compatible_body(CLIP))).json()["usage"]
        assert usage["prompt_tokens_details"] == {"audio_tokens": 13, "text_tokens": 8, "cached_tokens": 0}
        path = "/api/v1/services/aigc/multimodal-generation/generation"
        native = (await client.post(path, json=native_body(CLIP))).json()["usage"]
        assert native["input_tokens_details"] == {"audio_tokens": 13, "text_tokens": 8}


async def test_a_text_only_probe_is_refused_with_the_next_step() -> None:
    """A gateway's probe without audio is 400, costs no engine time, and names the probe to use."""
    probe = {"model": MODEL, "messages": [{"role": "user", "content": "What's 1 + 1?"}], "max_tokens": 5}
    async with served() as client:
        answer = await client.post(COMPATIBLE, json=probe)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].endswith("To probe the service use GET /health.")
