"""Timelines through the HTTP API, over a fake engine in this process."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from serving.errors import EngineFailed, Overloaded
from serving.types import billed_audio_tokens
from tests.support.wire import data_url, events, wav
from tests.timeline.running import FILM, bills, clip_of, service

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import httpx

pytestmark = pytest.mark.usefixtures("in_process")

CLIP = clip_of(FILM)
AUDIO_TOKENS = billed_audio_tokens(FILM.samples.size)
TOKENS = 24


def _message(answer: httpx.Response) -> Any:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]


def _readable(segments: list[dict[str, Any]]) -> str:
    """Return the text of segments by another way than that of the service."""
    blocks = []
    for segment in segments:
        times = []
        for name in ("start", "end"):
            minutes, seconds = divmod(segment[name], 60)
            times.append(f"00:{minutes:02.0f}:{seconds:06.3f}")
        text = segment["caption"] or f"(no caption: {segment['error']})"
        blocks.append(f"[{times[0]} - {times[1]}] {text}")
    return "\n\n".join(blocks)


async def test_whole_timeline(tmp_path: Path) -> None:
    """Segments tile the audio, each has the caption of its piece, and the audio is billed once."""
    async with service(tmp_path) as running:
        answer = await running.compatible(CLIP, timeline={"max_segment_s": 15, "loudness": True, "speech_share": True})
        message = _message(answer)
        segments = message["timeline"]["segments"]
        assert len(segments) > 5
        assert (segments[0]["start"], segments[-1]["end"]) == (0, round(FILM.duration_s, 3))
        assert all(before["end"] == after["start"] for before, after in pairwise(segments))
        assert [segment["index"] for segment in segments] == [*range(len(segments))]
        for segment in segments:
            length_s = segment["end"] - segment["start"]
            (heard_s,) = re.findall(r"This clip of ([0-9.]+) seconds", segment["caption"])
            assert length_s - 0.01 <= float(heard_s) <= length_s + 1.01
            assert segment["finish_reason"] == "stop"
            assert -60 < segment["loudness_db"] < 0
            assert 0 <= segment["speech_share"] <= 1
        assert message["content"] == _readable(segments)
        assert answer.json()["choices"][0]["finish_reason"] == "stop"
        assert answer.json()["usage"] == {
            "prompt_tokens": AUDIO_TOKENS + 8,
            "completion_tokens": TOKENS * len(segments),
            "total_tokens": AUDIO_TOKENS + 8 + TOKENS * len(segments),
            "prompt_tokens_details": {"audio_tokens": AUDIO_TOKENS, "text_tokens": 8, "cached_tokens": 0},
            "completion_tokens_details": {"text_tokens": TOKENS * len(segments)},
        }
        assert running.unreleased == (0, 0, 0, 0, 0, 0)
        assert await running.metric('captioner_tokens_total{kind="output"}') == TOKENS * len(segments)
    assert bills(tmp_path) == [
        (round(1000 * FILM.duration_s), AUDIO_TOKENS + 8, TOKENS * len(segments), "finished", "stop", 1)
    ]


async def test_streamed_timeline(tmp_path: Path) -> None:
    """A stream has one segment in each event, the same as the whole answer, and ends with the same usage."""
    async with service(tmp_path) as running:
        whole = await running.compatible(CLIP, timeline=True)
        stream = await running.compatible(CLIP, timeline=True, stream=True, stream_options={"include_usage": True})
    chunks = [chunk for chunk in events(stream.text) if isinstance(chunk, dict)]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert "".join(delta["content"] for delta in deltas) == _message(whole)["content"]
    carried = [delta["timeline"]["segments"] for delta in deltas if "timeline" in delta]
    assert [len(segments) for segments in carried] == [1] * len(carried)
    assert [segments[0] for segments in carried] == _message(whole)["timeline"]["segments"]
    assert chunks[-1]["usage"] == whole.json()["usage"]
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"


async def test_native_timeline(tmp_path: Path) -> None:
    """The DashScope dialect has the same segments in `output.timeline`, whole, in deltas and cumulative."""
    async with service(tmp_path) as running:
        compatible = _message(await running.compatible(CLIP, timeline=True))
        whole = (await running.native(CLIP, timeline=True)).json()
        deltas = events((await running.native(CLIP, stream=True, timeline=True, incremental_output=True)).text)
        cumulative = events((await running.native(CLIP, stream=True, timeline=True)).text)
    assert whole["output"]["timeline"] == compatible["timeline"]
    assert whole["output"]["choices"][0]["message"]["content"] == [{"text": compatible["content"]}]
    segments = compatible["timeline"]["segments"]
    for answers in (deltas, cumulative):
        carried = [answer["output"]["timeline"] for answer in answers if "timeline" in answer["output"]]
        assert carried == [{"segments": [segment]} for segment in segments]
        assert answers[-1]["usage"] == whole["usage"]
        assert answers[-1]["output"]["choices"][0]["finish_reason"] == "stop"
    texts = [answer["output"]["choices"][0]["message"]["content"][0]["text"] for answer in deltas]
    assert "".join(texts) == compatible["content"]
    assert cumulative[-1]["output"]["choices"][0]["message"]["content"] == [{"text": compatible["content"]}]


@pytest.mark.parametrize("stream", [False, True])
async def test_no_timeline(tmp_path: Path, *, stream: bool) -> None:
    """Without the parameter, or with one that requests none, the answer is that of before, byte for byte."""
    async with service(tmp_path) as running:
        texts = set()
        for timeline in ({}, {"timeline": False}, {"timeline": None}):
            for answer in (
                await running.compatible(CLIP, stream=stream, **timeline),
                await running.native(CLIP, stream=stream, **timeline),
            ):
                ids = r'"created":\d+|[0-9a-f-]{36}'
                texts.add(re.sub(ids, "", answer.text))
        assert len(texts) == 2
        assert not any("timeline" in text for text in texts)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("yes", "'timeline' must be Boolean or Object"),
        (1, "'timeline' must be Boolean or Object"),
        ([], "'timeline' must be Boolean or Object"),
        ({"max_segment_s": 4.9}, "Range of max_segment_s should be [5, 30]"),
        ({"max_segment_s": 31}, "Range of max_segment_s should be [5, 30]"),
        ({"max_segment_s": True}, "'max_segment_s' must be Float"),
        ({"loudness": 1}, "'loudness' must be Boolean"),
        ({"summary": True}, "'timeline' has no member \"summary\""),
    ],
)
async def test_bad_timeline(tmp_path: Path, value: object, message: str) -> None:
    """A parameter that is none is 400, and the message says which values are."""
    async with service(tmp_path) as running:
        answer = await running.compatible(CLIP, timeline=value)
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, message)
        assert answer.json()["error"]["param"] is not None
        answer = await running.native(CLIP, timeline=value)
        assert (answer.status_code, answer.json()["message"]) == (400, message)


def _failing(*indices: int, error: Exception | None = None) -> Callable[[str], None]:
    def before(request_id: str) -> None:
        if int(request_id.rpartition("-")[2]) in indices:
            raise error or EngineFailed

    return before


@pytest.mark.parametrize("failing", [(1,), (0,), (0, 1, 3), (4,)])
@pytest.mark.parametrize("stream", [False, True])
async def test_piece_that_fails(tmp_path: Path, failing: tuple[int, ...], *, stream: bool) -> None:
    """A piece that fails says so in its segment; the others are kept, and its audio is not billed."""
    async with service(tmp_path, _failing(*failing)) as running:
        answer = await running.compatible(
            CLIP, timeline={"max_segment_s": 20}, stream=stream, stream_options={"include_usage": True}
        )
        assert answer.status_code == 200
        if stream:
            chunks = [chunk for chunk in events(answer.text) if isinstance(chunk, dict)]
            deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
            segments = [delta["timeline"]["segments"][0] for delta in deltas if "timeline" in delta]
            usage, finish_reason = chunks[-1]["usage"], chunks[-2]["choices"][0]["finish_reason"]
        else:
            segments = _message(answer)["timeline"]["segments"]
            assert _message(answer)["content"] == _readable(segments)
            usage, finish_reason = answer.json()["usage"], answer.json()["choices"][0]["finish_reason"]
        assert [segment["index"] for segment in segments] == [0, 1, 2, 3, 4]
        for segment in segments:
            if segment["index"] in failing:
                assert (segment["caption"], segment["error"]) == ("", "engine_failed")
                assert "finish_reason" not in segment
            else:
                assert segment["caption"]
                assert "error" not in segment
        lost = sum(round(16_000 * (segments[each]["end"] - segments[each]["start"])) for each in failing)
        audio_tokens = billed_audio_tokens(FILM.samples.size - lost)
        assert usage["prompt_tokens_details"]["audio_tokens"] == audio_tokens
        assert usage["completion_tokens"] == TOKENS * (5 - len(failing))
        assert finish_reason == "length"
        assert running.unreleased == (0, 0, 0, 0, 0, 0)
    (bill,) = bills(tmp_path)
    assert bill[1:] == (audio_tokens + 8, TOKENS * (5 - len(failing)), "finished", "length", 1)


@pytest.mark.parametrize("stream", [False, True])
async def test_all_pieces_fail(tmp_path: Path, *, stream: bool) -> None:
    """A timeline without a single caption fails as one caption does, and is not billed."""
    async with service(tmp_path, _failing(0, 1, 2)) as running:
        answer = await running.compatible(CLIP, timeline=True, stream=stream)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
        assert running.unreleased == (0, 0, 0, 0, 0, 0)
    ((*_, ending, _, billed),) = bills(tmp_path)
    assert (ending, billed) == ("failed", 0)


async def test_overloaded_piece(tmp_path: Path) -> None:
    """A piece that the engine has no capacity for is tried again."""
    refused: list[str] = []

    def before(request_id: str) -> None:
        if request_id.endswith("-2") and not refused:
            refused.append(request_id)
            raise Overloaded(retry_after_s=0)

    async with service(tmp_path, before) as running:
        segments = _message(await running.compatible(CLIP, timeline=True))["timeline"]["segments"]
        assert all(segment["caption"] for segment in segments)
        assert len(running.engine.seen) == len(segments) + 1
        assert len(refused) == 1


async def test_overloaded_service(tmp_path: Path) -> None:
    """A service without capacity for any piece refuses the timeline with 503, and nothing is billed."""
    async with service(tmp_path, _failing(0, 1, 2, error=Overloaded(retry_after_s=0))) as running:
        answer = await running.compatible(CLIP, timeline=True)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "0")
    assert bills(tmp_path)[0][-1] == 0


async def test_deadline(tmp_path: Path) -> None:
    """A response whose deadline passes has the captions until then, says so, and bills no audio that was not heard."""
    pace: dict[str, Any] = {"fake_ttft_s": 0.6, "response_timeout_s": 2.2, "max_num_seqs": 2}
    async with service(tmp_path, **pace) as running:
        answer = await running.compatible(CLIP, timeline={"max_segment_s": 10})
        segments = _message(answer)["timeline"]["segments"]
        heard = [segment for segment in segments if segment["caption"]]
        assert 0 < len(heard) < len(segments)
        assert {segment["error"] for segment in segments if not segment["caption"]} == {"deadline_exceeded"}
        assert answer.headers["x-dashscope-partialresponse"] == "true"
        assert answer.json()["choices"][0]["finish_reason"] == "length"
        billed_s = sum(segment["end"] - segment["start"] for segment in heard)
        assert answer.json()["usage"]["prompt_tokens"] == billed_audio_tokens(round(16_000 * billed_s)) + 8
        assert running.unreleased == (0, 0, 0, 0, 0, 0)
    assert bills(tmp_path)[0][3:] == ("partial", "length", 1)


async def test_cut_captions(tmp_path: Path) -> None:
    """`max_tokens` bounds the caption of each segment."""
    async with service(tmp_path) as running:
        answer = await running.compatible(CLIP, timeline=True, max_tokens=5)
        segments = _message(answer)["timeline"]["segments"]
        assert {segment["finish_reason"] for segment in segments} == {"length"}
        assert answer.json()["usage"]["completion_tokens"] == 5 * len(segments)
        assert answer.json()["choices"][0]["finish_reason"] == "length"


async def test_short_clip(tmp_path: Path) -> None:
    """A clip shorter than a piece is one segment, billed as the clip alone."""
    async with service(tmp_path) as running:
        answer = await running.compatible(data_url(wav(1)), timeline=True)
        (segment,) = _message(answer)["timeline"]["segments"]
        assert (segment["start"], segment["end"]) == (0, 1)
        assert answer.json()["usage"]["prompt_tokens"] == 21


async def test_long_captions(tmp_path: Path) -> None:
    """No line of a stream is longer than clients read, however long the captions are."""
    words: dict[str, Any] = {"fake_text": "好" * 2000, "fake_tokens": 12}
    async with service(tmp_path, **words) as running:
        stream = await running.compatible(CLIP, timeline=True, stream=True)
        assert max(map(len, stream.text.splitlines())) < 128 * 1024
        chunks = [chunk for chunk in events(stream.text) if isinstance(chunk, dict)]
        text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
        assert text.count("好") == 2000 * 12 * 3
        native = await running.native(CLIP, stream=True, timeline=True)
        assert max(map(len, native.text.splitlines())) < 128 * 1024
        assert json.loads(native.text.splitlines()[-2].removeprefix("data:"))["output"]["choices"][0]["finish_reason"]
