"""The native dialect to the byte: bodies, events, errors in a stream, model lists."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serving import errors
from serving.api.dialects import dashscope
from serving.api.dialects.base import HEARTBEAT, MAX_TEXT_BYTES
from serving.api.dialects.dashscope import DashScopeCodec, DashScopeReply
from serving.config import Settings
from serving.types import CaptionDelta, FinishReason, Usage
from tests.api.dialects.bad_requests import GOOD, MODEL, native
from tests.api.dialects.clients import dashscope_1x, httpx_sse

SETTINGS = Settings()
REQUEST_ID = "d532f72c-e75b-4ffb-a1ef-d2465e758958"


def reply(parameters: str = "{}", *, stream: bool = True) -> DashScopeReply:
    """Return the reply to a good request."""
    headers = {"x-dashscope-sse": "enable"} if stream else {}
    return DashScopeCodec(SETTINGS).decode_request(native(GOOD, parameters=parameters), headers, REQUEST_ID)[1]


def delta(text: str, tokens: int, finish_reason: FinishReason | None = None) -> CaptionDelta:
    """Return the next delta of a caption of a clip of 76 audio tokens."""
    return CaptionDelta(text, Usage(audio_tokens=76, output_tokens=tokens), finish_reason)


def texts(stream: bytes) -> list[str]:
    """Return the text of each result."""
    return [payload["output"]["choices"][0]["message"]["content"][0]["text"] for _, payload in dashscope_1x(stream)]


def test_full_body_is_the_manuals() -> None:
    """A response that is not streamed is the manual's body to the byte."""
    last = CaptionDelta("", Usage(audio_tokens=152, output_tokens=399), FinishReason.STOP)
    assert reply(stream=False).full_body("The audio clip …", last).decode() == (
        '{"output":{"choices":[{"finish_reason":"stop","message":{"role":"assistant",'
        '"content":[{"text":"The audio clip \\u2026"}]}}]},'
        '"usage":{"input_tokens":160,"output_tokens":399,"total_tokens":559,'
        '"input_tokens_details":{"audio_tokens":152,"text_tokens":8},"output_tokens_details":{"text_tokens":399}},'
        '"request_id":"d532f72c-e75b-4ffb-a1ef-d2465e758958"}'
    )


def test_incremental_events_to_the_byte() -> None:
    """Incremental events carry the new text, and an empty text with the finish reason at the end."""
    incremental = reply('{"incremental_output":true}')
    stream = incremental.event(delta("The audio ", 3)) + incremental.event(delta("", 3, FinishReason.STOP))
    usage = (
        '"usage":{"input_tokens_details":{"audio_tokens":76,"text_tokens":8},"total_tokens":87,"output_tokens":3,'
        '"input_tokens":84,"output_tokens_details":{"text_tokens":3}},'
        '"request_id":"d532f72c-e75b-4ffb-a1ef-d2465e758958"}\n\n'
    )
    assert stream.decode() == (
        "id:1\nevent:result\n:HTTP_STATUS/200\n"
        'data:{"output":{"choices":[{"message":{"content":[{"text":"The audio "}],"role":"assistant"},'
        f'"finish_reason":"null"}}]}},{usage}'
        "id:2\nevent:result\n:HTTP_STATUS/200\n"
        'data:{"output":{"choices":[{"message":{"content":[{"text":""}],"role":"assistant"},'
        f'"finish_reason":"stop"}}]}},{usage}'
    )
    assert incremental.ended


@pytest.mark.parametrize("parameters", ["{}", '{"incremental_output":false}', '{"incremental_output":null}'])
def test_cumulative_events(parameters: str) -> None:
    """By default each event carries all text so far, and the last event the finish reason."""
    cumulative = reply(parameters)
    stream = cumulative.event(delta("A ", 1)) + cumulative.event(delta("dog", 2))
    stream += cumulative.event(delta(".", 3, FinishReason.LENGTH))
    assert texts(stream) == ["A ", "A dog", "A dog."]
    reasons = [payload["output"]["choices"][0]["finish_reason"] for _, payload in dashscope_1x(stream)]
    assert reasons == ["null", "null", "length"]
    assert [event.id for event in httpx_sse(stream)] == ["1", "2", "3"]
    assert [payload["usage"]["output_tokens"] for _, payload in dashscope_1x(stream)] == [1, 2, 3]


def test_no_event_without_new_text() -> None:
    """A delta without text that is not the last renders no event."""
    assert reply().event(delta("", 1)) == reply('{"incremental_output":true}').event(delta("", 1)) == b""


@pytest.mark.parametrize("piece", ["word ", "声音", "\N{GRINNING FACE}", '"\\\n'])
def test_cumulative_stream_ends_before_the_longest_line(piece: str) -> None:
    """A cumulative stream that reaches the longest line ends as `length` with the text that fits, and stays silent."""
    cumulative = reply()
    pieces = [piece * 300] * 150
    stream, sent = b"", 0
    for text in pieces:
        sent += 300
        stream += cumulative.event(delta(text, sent))
        if cumulative.ended:
            break
    last = dashscope_1x(stream)[-1][1]
    text = last["output"]["choices"][0]["message"]["content"][0]["text"]
    assert last["output"]["choices"][0]["finish_reason"] == "length"
    assert last["usage"]["output_tokens"] == sent
    assert "".join(pieces).startswith(text)
    room = MAX_TEXT_BYTES - len(json.dumps(text)[1:-1])
    assert 0 <= room < 12, "one more character might not have fit"
    assert cumulative.event(delta("more", sent + 1)) == b""
    assert cumulative.event(delta("", sent + 1, FinishReason.STOP)) == b""


def test_large_delta_is_split() -> None:
    """An incremental delta of any size is split into lines that every client reads."""
    text = "\N{GRINNING FACE}\u2028" * 50_000
    stream = reply('{"incremental_output":true}').event(delta(text, 9, FinishReason.STOP))
    assert "".join(texts(stream)) == text


def test_error_in_a_stream_to_the_byte() -> None:
    """An error after the stream started has no space after `event:`, and its status before its data."""
    incremental = reply('{"incremental_output":true}')
    incremental.event(delta("The ", 1))
    assert incremental.error_event(errors.EngineFailed()).decode() == (
        "id:2\nevent:error\nstatus:500\n:HTTP_STATUS/500\n"
        'data:{"code":"InternalError.Algo","message":"inference internal error.",'
        '"request_id":"d532f72c-e75b-4ffb-a1ef-d2465e758958"}\n\n'
    )
    assert incremental.ended


def test_status_of_an_error_in_a_stream_reaches_1x() -> None:
    """The DashScope SDK 1.x reads the status of an error in a stream."""
    cumulative = reply()
    stream = HEARTBEAT + cumulative.event(delta("The ", 1)) + HEARTBEAT + cumulative.error_event(errors.Overloaded())
    (ok, _), (status, payload) = dashscope_1x(stream)
    assert (ok, status, payload["code"]) == (200, 503, "ModelServingError")
    assert [event.name for event in httpx_sse(stream)] == ["result", "error"]


@pytest.mark.parametrize(
    ("headers", "stream"),
    [
        ({}, False),
        ({"accept": "*/*"}, False),
        ({"accept": "application/json; charset=utf-8"}, False),
        ({"x-dashscope-sse": "disable"}, False),
        ({"accept": "text/event-stream"}, True),
        ({"accept": "application/json, Text/Event-Stream;q=0.9"}, True),
        ({"x-dashscope-sse": "enable", "accept": "*/*"}, True),
        ({"x-dashscope-sse": "Enable"}, True),
    ],
)
def test_headers_decide_on_streaming(headers: dict[str, str], *, stream: bool) -> None:
    """Either header requests a stream; `parameters.stream` is ignored."""
    body = native(GOOD, parameters=f'{{"stream":{json.dumps(not stream)}}}')
    assert DashScopeCodec(SETTINGS).decode_request(body, headers, REQUEST_ID)[1].stream is stream


def test_parameters_may_be_missing() -> None:
    """A request without `parameters`, or with null, is accepted."""
    for body in (native(GOOD, parameters="null"), native(GOOD).replace(b',"parameters":{}', b"")):
        request, _ = DashScopeCodec(SETTINGS).decode_request(body, {}, REQUEST_ID)
        assert request.sampling.max_tokens == 32_768


def page(query: dict[str, str], **settings: Any) -> dict[str, Any]:
    """Return the output of a page of the model list."""
    body: dict[str, Any] = json.loads(dashscope.models_page(Settings(**settings), query, REQUEST_ID))
    assert body["request_id"] == REQUEST_ID
    output: dict[str, Any] = body["output"]
    return output


def test_models_page() -> None:
    """The list pages and filters as the SDK requests, and counts the models that pass the filter."""
    aliases = {"model": "Qwen/Qwen3-Omni-30B-A3B-Captioner", "model_aliases": ("a", "b")}
    models = page({}, **aliases)
    assert (models["total"], models["page_no"], models["page_size"]) == (3, 1, 10)
    assert [entry["model"] for entry in models["models"]] == [MODEL, "a", "b"]
    assert {entry["provider"] for entry in models["models"]} == {"qwen"}
    second = page({"page_no": "2", "page_size": "2"}, **aliases)
    assert [entry["model"] for entry in second["models"]] == ["b"]
    assert page({"model": "a"}, **aliases)["total"] == 1
    assert page({"model": "none"}, **aliases)["models"] == []


@pytest.mark.parametrize(
    "query", [{name: value} for name in ("page_no", "page_size") for value in ("0", "-1", "x", "²", "9" * 5000)]
)
def test_bad_page_is_refused(query: dict[str, str]) -> None:
    """A page that cannot exist is a bad request."""
    with pytest.raises(errors.InvalidRequest):
        page(query)


def test_one_model() -> None:
    """One model is shown alone; an unknown model does not exist."""
    body = json.loads(dashscope.model(SETTINGS, MODEL, REQUEST_ID))
    assert body["output"]["model"] == MODEL
    with pytest.raises(errors.ModelNotFound):
        dashscope.model(SETTINGS, "none", REQUEST_ID)


@pytest.mark.parametrize(("engine", "words"), [("vllm", "small stand-in"), ("fake", "No model")])
def test_a_stand_in_says_so(engine: str, words: str) -> None:
    """A stand-in does not pass for the captioner."""
    entry = page({}, engine=engine)["models"][0]
    assert words in entry["description"]
    assert entry["provider"] != "qwen"
    assert entry["name"] != "Qwen3-Omni-30B-A3B-Captioner"
