"""The compatible dialect to the byte: bodies, chunks, errors in a stream, model lists."""

from __future__ import annotations

import json

import pytest

from serving import errors
from serving.api.dialects import openai
from serving.api.dialects.base import HEARTBEAT
from serving.api.dialects.openai import OpenAICodec, OpenAIReply
from serving.config import Settings
from serving.types import CaptionDelta, FinishReason, Usage
from tests.api.dialects.bad_requests import GOOD, MODEL, compatible
from tests.api.dialects.clients import openai_chunks

SETTINGS = Settings()
REQUEST_ID = "f4155bf9-b860-49d6-8ee2-092da7359097"

USAGE = (
    '{"prompt_tokens":160,"completion_tokens":387,"total_tokens":547,'
    '"prompt_tokens_details":{"audio_tokens":152,"text_tokens":8,"cached_tokens":0},"completion_tokens_details":{"text_tokens":387}}'
)


@pytest.fixture(autouse=True)
def _at_the_manuals_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.api.dialects.openai.time.time", lambda: 1_758_002_134.9)


def reply(parameters: str = '{"stream":true}') -> OpenAIReply:
    """Return the reply to a good request."""
    return OpenAICodec(SETTINGS).decode_request(compatible(GOOD, parameters=parameters), {}, REQUEST_ID)[1]


def delta(text: str, finish_reason: FinishReason | None = None) -> CaptionDelta:
    """Return the next delta of the manual's caption."""
    return CaptionDelta(text, Usage(audio_tokens=152, output_tokens=387), finish_reason)


def test_full_body_is_the_manuals() -> None:
    """A response that is not streamed is the manual's body to the byte."""
    whole = reply("{}")
    assert not whole.stream
    assert whole.full_body("The audio", delta("", FinishReason.STOP)).decode() == (
        '{"choices":[{"message":{"content":"The audio","role":"assistant"},"finish_reason":"stop","index":0,'
        '"logprobs":null}],"object":"chat.completion","created":1758002134,"model":"qwen3-omni-30b-a3b-captioner",'
        '"system_fingerprint":null,"id":"chatcmpl-f4155bf9-b860-49d6-8ee2-092da7359097",'
        f'"usage":{USAGE}}}'
    )


@pytest.mark.parametrize("include_usage", [True, False])
def test_chunks_to_the_byte(*, include_usage: bool) -> None:
    """Role, texts, finish, usage if requested, `[DONE]`: each chunk is right to the byte."""
    options = f'{{"stream":true,"stream_options":{{"include_usage":{json.dumps(include_usage)}}}}}'
    streamed = reply(options)

    def chunk(choices: str, usage: str = "null") -> str:
        return (
            f'data: {{"choices":[{choices}],"object":"chat.completion.chunk","usage":{usage},"created":1758002134,'
            '"system_fingerprint":null,"model":"qwen3-omni-30b-a3b-captioner",'
            '"id":"chatcmpl-f4155bf9-b860-49d6-8ee2-092da7359097"}\n\n'
        )

    def choice(delta: str, finish_reason: str = "null") -> str:
        return f'{{"delta":{{{delta}}},"index":0,"logprobs":null,"finish_reason":{finish_reason}}}'

    assert streamed.event(delta("The ")).decode() == (
        chunk(choice('"content":"","role":"assistant"')) + chunk(choice('"content":"The "'))
    )
    assert streamed.event(delta("audio")).decode() == chunk(choice('"content":"audio"'))
    assert streamed.event(delta("")) == b""
    assert streamed.event(delta(".", FinishReason.STOP)).decode() == (
        chunk(choice('"content":"."'))
        + chunk(choice('"content":""', '"stop"'))
        + (chunk("", USAGE) if include_usage else "")
        + "data: [DONE]\n\n"
    )
    assert streamed.ended
    assert streamed.event(delta("more")) == b""


def test_caption_without_text() -> None:
    """A caption that ends at once still has its role, its finish reason and its end."""
    chunks = openai_chunks(reply().event(delta("", FinishReason.LENGTH)))
    assert [choice["delta"] for chunk in chunks for choice in chunk["choices"]] == [
        {"content": "", "role": "assistant"},
        {"content": ""},
    ]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_large_delta_is_split() -> None:
    """A delta of any size is split into lines that every client reads."""
    text = "\N{GRINNING FACE}\u2028" * 50_000
    chunks = openai_chunks(reply().event(delta(text, FinishReason.STOP)))
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == text


def test_error_in_a_stream_to_the_byte() -> None:
    """An error after the stream started is one data event, and the end."""
    streamed = reply()
    streamed.event(delta("The "))
    message = "An internal error has occured, please try again later or contact service support."
    assert streamed.error_event(errors.Internal()).decode() == (
        f'data: {{"error":{{"message":"{message}","type":"internal_error","param":null,"code":"internal_error"}}}}\n\n'
    )
    assert streamed.ended


def test_stream_options_count_only_when_streaming() -> None:
    """Stream options of a response that is not streamed are ignored, whatever they are."""
    assert not reply('{"stream_options":"what"}').stream
    assert not reply('{"stream":null,"stream_options":{"include_usage":true}}').stream


def test_heartbeats_between_chunks_are_harmless() -> None:
    """Comments may appear between any chunks."""
    streamed = reply()
    stream = HEARTBEAT + streamed.event(delta("A")) + HEARTBEAT + streamed.event(delta("", FinishReason.STOP))
    assert len(openai_chunks(stream)) == 3


def test_models() -> None:
    """The list has every accepted name, in the manual's format; the response for one model is an element of it."""
    settings = Settings(model="Qwen/Qwen3-Omni-30B-A3B-Captioner", model_aliases=("a", MODEL))
    first = f'{{"id":"{MODEL}","object":"model","created":1758002134,"owned_by":"system"}}'
    assert openai.models_page(settings).decode() == (
        f'{{"object":"list","data":[{first},{first.replace(MODEL, "a")}]}}'
    )
    assert openai.model(settings, MODEL).decode() == first
    with pytest.raises(errors.ModelNotFound):
        openai.model(settings, "b")


@pytest.mark.parametrize(
    ("engine", "owner", "words"),
    [("vllm", "captioner-embedded", "not the 30B captioner"), ("fake", "captioner-fake", "No model")],
)
def test_a_stand_in_says_so(engine: str, owner: str, words: str) -> None:
    """A stand-in does not pass for the captioner."""
    entry = json.loads(openai.model(Settings(engine=engine), MODEL))
    assert entry["owned_by"] == owner
    assert words in entry["description"]
