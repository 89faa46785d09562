"""The quality guard through the HTTP API, over an engine whose captions follow a script."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from serving.api.app import create_app
from serving.config import Settings
from serving.engine.base import EngineDelta
from serving.engine.fake import FakeEngine
from serving.errors import EngineFailed
from serving.quality import another_seed
from serving.types import FinishReason, Sampling
from tests.engine.test_remote import until
from tests.support.wire import COMPATIBLE, NATIVE, compatible_body, data_url, events, native_body, wav

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator
    from pathlib import Path

CLIP = data_url(wav(1))
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH

GOOD = [EngineDelta("A dog", 2, input_tokens=29), EngineDelta(" barks.", 3, STOP, uncounted_tokens=1)]
OTHER = [EngineDelta("A cat", 2, input_tokens=29), EngineDelta(" sleeps well.", 4, STOP, uncounted_tokens=1)]
LOOP = [EngineDelta("A dog 2", 3, input_tokens=29), EngineDelta(" 2 2 2", 4, STOP, looped=True)]
BLANK = [EngineDelta(" ", 1, input_tokens=29), EngineDelta("\n\t", 1, STOP)]
EMPTY = [EngineDelta("", 0, STOP, input_tokens=29)]
SHORT = [EngineDelta("A", 1, STOP, input_tokens=29)]
CUT = [EngineDelta("A dog", 2, LENGTH, input_tokens=29)]


class ScriptedEngine(FakeEngine):
    """An engine whose generations are the given ones, in turn; an exception is raised after the first delta."""

    def __init__(self, settings: Settings, *script: list[EngineDelta] | Exception) -> None:
        super().__init__(settings)
        self._script = [*script]
        self.requests: list[Sampling] = []

    async def generate(self, *arguments: Any, **_: Any) -> AsyncGenerator[EngineDelta]:
        """See `Engine`."""
        self.requests.append(arguments[2])
        entry = self._script.pop(0)
        if isinstance(entry, Exception):
            yield GOOD[0]
            raise entry
        for delta in entry:
            yield delta


@dataclass
class Service:
    """The whole application in this process."""

    client: httpx.AsyncClient
    engine: ScriptedEngine
    app: Any
    headers: dict[str, str] = field(default_factory=dict)

    async def ask(self, *, native: bool = False, stream: bool = False, **parameters: Any) -> httpx.Response:
        """Send one request in either dialect."""
        if native:
            headers = {"x-dashscope-sse": "enable"} if stream else {}
            body = native_body(CLIP, **parameters)
            return await self.client.post(NATIVE, json=body, headers={**self.headers, **headers})
        body = compatible_body(CLIP, stream=stream, stream_options={"include_usage": True}, **parameters)
        return await self.client.post(COMPATIBLE, json=body, headers=self.headers)

    async def metric(self, series: str) -> float:
        """Return the value of one series of the metrics."""
        components = self.app.state.components
        text, _ = await components.metrics.expose(components.engine.check_health)
        (line,) = [line for line in text.decode().splitlines() if line.startswith(f"{series} ")]
        return float(line.split()[-1])


@asynccontextmanager
async def service(directory: Path, *script: list[EngineDelta] | Exception, **changes: object) -> AsyncIterator[Service]:
    """Run the application over an engine with this script."""
    given = {"engine": "fake", "auth": False, "audio_workers": 1, "stream_flush_interval_s": 0, **changes}
    settings = Settings(data_dir=directory, uploads_dir=directory / "uploads", **given)  # type: ignore[arg-type]
    engine = ScriptedEngine(settings, *script)
    app = create_app(settings, engine)
    async with app.router.lifespan_context(app):
        await until(lambda: app.state.components.engine is engine and engine._ready)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://captioner") as client:
            yield Service(client, engine, app)


def content(answer: httpx.Response) -> str:
    """Return the text of a compatible answer."""
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


@pytest.mark.parametrize(("first", "defect"), [(LOOP, "loop"), (BLANK, "blank"), (EMPTY, "blank"), (SHORT, "short")])
async def test_a_defective_caption_is_sampled_again_and_billed_once(
    tmp_path: Path, first: list[EngineDelta], defect: str
) -> None:
    """A full response whose caption is defective has the second caption, its tokens alone, and a header."""
    async with service(tmp_path, first, OTHER) as running:
        answer = await running.ask(temperature=0.6, seed=6)
        assert (content(answer), answer.headers["x-captioner-retried"]) == ("A cat sleeps well.", defect)
        assert answer.json()["usage"]["completion_tokens"] == 6
        assert "captioner" not in answer.json()
        assert [sampling.seed for sampling in running.engine.requests] == [6, 7]
        assert await running.metric(f'captioner_caption_retries_total{{defect="{defect}",result="cured"}}') == 1
        assert await running.metric(f'captioner_caption_defects_total{{defect="{defect}"}}') == 0
        assert await running.metric('captioner_tokens_total{kind="output"}') == 6
        assert await running.metric("captioner_features_bytes") == 0


@pytest.mark.parametrize("second", [LOOP, BLANK, CUT, EngineFailed()], ids=["loop", "blank", "cut", "failed"])
async def test_a_second_sample_that_is_no_better_leaves_the_first(
    tmp_path: Path, second: list[EngineDelta] | Exception
) -> None:
    """If the second sample is defective or fails, the first is delivered and billed, with its mark."""
    async with service(tmp_path, LOOP, second) as running:
        answer = await running.ask()
        assert answer.status_code == 200
        assert (content(answer), answer.headers["x-captioner-retried"]) == ("A dog 2 2 2 2", "loop")
        assert answer.json()["captioner"] == {"stopped": "loop"}
        assert answer.json()["choices"][0]["finish_reason"] == "stop"
        assert answer.json()["usage"]["completion_tokens"] == 7
        assert await running.metric('captioner_caption_retries_total{defect="loop",result="kept"}') == 1
        assert await running.metric('captioner_caption_defects_total{defect="loop"}') == 1
        assert await running.metric('captioner_tokens_total{kind="output"}') == 7


@pytest.mark.parametrize("caption", [GOOD, CUT], ids=["good", "cut"])
async def test_other_captions_are_sampled_once(tmp_path: Path, caption: list[EngineDelta]) -> None:
    """A caption without defect, or one that its caller's `max_tokens` cut, is not sampled again."""
    async with service(tmp_path, caption) as running:
        answer = await running.ask()
        assert "x-captioner-retried" not in answer.headers
        assert "captioner" not in answer.json()
        assert len(running.engine.requests) == 1
        assert await running.metric('captioner_caption_defects_total{defect="cut"}') == (caption is CUT)


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": 0},
        {"stop": "A"},
        {"stop": [5]},
        {"logit_bias": {"5": 100}},
        {"allowed_token_ids": [5]},
        {"bad_words": ["dog"]},
        {"min_tokens": 1},
    ],
    ids=json.dumps,
)
async def test_a_second_sample_needs_chance_and_a_free_length(tmp_path: Path, parameters: dict[str, Any]) -> None:
    """A greedy caption, and one whose length the client's parameters may decide, is not sampled again."""
    async with service(tmp_path, BLANK) as running:
        answer = await running.ask(**parameters)
        assert (content(answer), len(running.engine.requests)) == (" \n\t", 1)
        assert running.engine.requests[0].stop_loops
        assert await running.metric('captioner_caption_defects_total{defect="blank"}') == 1


@pytest.mark.parametrize(
    ("setting", "header", "stops", "samples"),
    [
        ("retry", None, True, 2),
        ("retry", "retry", True, 2),
        ("retry", "Stop", True, 1),
        ("retry", "off", False, 1),
        ("stop", None, True, 1),
        ("stop", "retry", True, 1),
        ("stop", "off", False, 1),
        ("off", "retry", False, 1),
    ],
)
@pytest.mark.parametrize("native", [True, False])
async def test_the_weaker_of_setting_and_request_holds(  # noqa: PLR0917 - parameters of the test
    tmp_path: Path,
    setting: str,
    header: str | None,
    stops: bool,  # noqa: FBT001
    samples: int,
    native: bool,  # noqa: FBT001
) -> None:
    """A request may weaken the operator's policy by a header, in both dialects, and not strengthen it."""
    async with service(tmp_path, BLANK, GOOD, quality_guard=setting) as running:
        running.headers = {"x-captioner-guard": header} if header else {}
        answer = await running.ask(native=native)
        assert answer.status_code == 200
        assert answer.headers.get("x-captioner-retried") == ("blank" if samples == 2 else None)
        assert [sampling.stop_loops for sampling in running.engine.requests] == [stops] * samples


@pytest.mark.parametrize("native", [True, False])
async def test_an_unknown_policy_is_refused(tmp_path: Path, native: bool) -> None:  # noqa: FBT001
    """A header with any other value gets 400."""
    async with service(tmp_path) as running:
        running.headers = {"x-captioner-guard": "always"}
        answer = await running.ask(native=native)
        assert answer.status_code == 400
        assert "x-captioner-guard should be off, stop or retry" in answer.text


async def test_a_stream_ends_where_the_engine_stopped_it(tmp_path: Path) -> None:
    """A streamed loop ends as a stop, with a mark in the last chunk alone; nothing is sampled again."""
    async with service(tmp_path, LOOP) as running:
        answer = await running.ask(stream=True)
        chunks = events(answer.text)
        assert (
            "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks if chunk["choices"]) == "A dog 2 2 2 2"
        )
        assert [chunk["captioner"] for chunk in chunks if "captioner" in chunk] == [{"stopped": "loop"}]
        (end,) = [chunk for chunk in chunks if chunk["choices"] and chunk["choices"][0]["finish_reason"]]
        assert (end["choices"][0]["finish_reason"], end["captioner"]) == ("stop", {"stopped": "loop"})
        assert chunks[-1]["usage"]["completion_tokens"] == 7
        assert len(running.engine.requests) == 1
        assert await running.metric('captioner_caption_defects_total{defect="loop"}') == 1


@pytest.mark.parametrize("incremental", [True, False])
async def test_a_native_stream_has_the_mark_in_its_last_event(tmp_path: Path, incremental: bool) -> None:  # noqa: FBT001
    """In the native dialect the last event, and no other, says that the caption was stopped."""
    async with service(tmp_path, LOOP) as running:
        answer = await running.ask(native=True, stream=True, incremental_output=incremental)
        frames = [json.loads(line[5:]) for line in answer.text.splitlines() if line.startswith("data:")]
        assert [frame.get("captioner") for frame in frames] == [None] * (len(frames) - 1) + [{"stopped": "loop"}]
        assert frames[-1]["output"]["choices"][0]["finish_reason"] == "stop"
        assert frames[-1]["usage"]["output_tokens"] == 7


async def test_a_full_native_response_has_the_mark(tmp_path: Path) -> None:
    """A loop that is delivered in one response is marked in the native dialect, too."""
    async with service(tmp_path, LOOP, quality_guard="stop") as running:
        body = (await running.ask(native=True)).json()
        assert body["captioner"] == {"stopped": "loop"}
        assert body["usage"]["output_tokens"] == 7


async def test_benchmarks_are_left_alone(tmp_path: Path) -> None:
    """A caption that ignores its end of turn is neither stopped nor sampled again."""
    async with service(tmp_path, BLANK, allow_ignore_eos=True) as running:
        await running.ask(ignore_eos=True)
        assert [sampling.stop_loops for sampling in running.engine.requests] == [False]


async def test_features_that_do_not_fit_are_not_kept(tmp_path: Path) -> None:
    """Without memory for the features of a caption, its first sample is delivered."""
    long = data_url(wav(30))
    async with service(tmp_path, LOOP, max_features_bytes=4 * 2**20) as running:
        answer = await running.client.post(COMPATIBLE, json=compatible_body(long))
        assert content(answer) == "A dog 2 2 2 2"
        assert "x-captioner-retried" not in answer.headers


def test_a_seed_gives_one_other_seed() -> None:
    """A request with a seed has the same two seeds each time; without one, both samples are random."""
    assert another_seed(Sampling(seed=2**63 - 1)).seed == 2**63 - 2
    assert another_seed(Sampling()) == Sampling()
    assert replace(another_seed(Sampling(seed=4)), seed=4) == Sampling(seed=4)
