"""Probabilities of tokens in OpenAI's form, whole and streamed; without them no answer changes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.chat_completion import ChoiceLogprobs

from serving.api.dialects.openai import OpenAICodec
from serving.config import Settings
from serving.types import CaptionDelta, FinishReason, TokenLogprob, Usage
from tests.api.dialects.bad_requests import GOOD, compatible
from tests.api.dialects.clients import LONGEST_LINE_BYTES, openai_chunks
from tests.support.served import served
from tests.support.wire import COMPATIBLE, compatible_body, data_url, events, wav

A = TokenLogprob("A", -0.25, (("A", -0.25), ("The", -1.5)))
DOG = TokenLogprob(" d\u00f6g", -9999.0)
USAGE = Usage(13, 2)


def reply(parameters: dict[str, Any]) -> Any:
    """Return the reply to a request with these parameters."""
    return OpenAICodec(Settings()).decode_request(compatible(GOOD, parameters=json.dumps(parameters)), {}, "id")[1]


def tokens(chunk: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the tokens of a chunk."""
    found: list[dict[str, Any]] = (chunk["choices"][0]["logprobs"] or {}).get("content", [])
    return found


def test_whole() -> None:
    """A choice has the tokens, their bytes, and the likeliest ones in their place."""
    whole = reply({"logprobs": True, "top_logprobs": 2})
    body = json.loads(whole.full_body("A d\u00f6g", CaptionDelta("", USAGE, FinishReason.STOP, logprobs=(A, DOG))))
    assert body["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": "A",
                "logprob": -0.25,
                "bytes": [65],
                "top_logprobs": [
                    {"token": "A", "logprob": -0.25, "bytes": [65]},
                    {"token": "The", "logprob": -1.5, "bytes": [84, 104, 101]},
                ],
            },
            {"token": " d\u00f6g", "logprob": -9999, "bytes": [32, 100, 195, 182, 103], "top_logprobs": []},
        ],
        "refusal": None,
    }
    ChoiceLogprobs.model_validate(body["choices"][0]["logprobs"])
    ChatCompletion.model_validate(body)


def test_streamed() -> None:
    """Each chunk has its tokens, a token whose text is held back comes alone, and the last chunk has none."""
    streamed = reply({"logprobs": True, "stream": True})
    stream = streamed.event(CaptionDelta("A", USAGE, logprobs=(A,)))
    stream += streamed.event(CaptionDelta("", USAGE, logprobs=(DOG,)))
    stream += streamed.event(CaptionDelta(" d\u00f6g", USAGE, FinishReason.STOP))
    chunks = openai_chunks(stream)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
    found = [(chunk["choices"][0]["delta"]["content"], [each["token"] for each in tokens(chunk)]) for chunk in chunks]
    assert found == [("", []), ("A", ["A"]), ("", [" d\u00f6g"]), (" d\u00f6g", []), ("", [])]


def test_many_tokens_fit_the_lines() -> None:
    """A delta of many tokens with 20 alternatives each becomes several chunks, whose lines every client reads."""
    token = TokenLogprob("\U0001f3b5" * 8, -1.0, tuple(("\U0001f3b5" * 8, -1.0 - each) for each in range(20)))
    streamed = reply({"logprobs": True, "top_logprobs": 20, "stream": True})
    stream = streamed.event(CaptionDelta("x" * 20_000, USAGE, FinishReason.STOP, logprobs=(token,) * 200))
    assert max(map(len, stream.split(b"\n"))) < LONGEST_LINE_BYTES
    chunks = openai_chunks(stream)
    assert sum(len(tokens(chunk)) for chunk in chunks) == 200
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "x" * 20_000


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("interval_s", [0, 0.05])
async def test_from_the_engine_to_the_answer(interval_s: float) -> None:
    """Every billed token has its probability, whole and streamed, where deltas are merged and where they are not."""
    async with served(fake_tokens=5, stream_flush_interval_s=interval_s) as client:
        body = compatible_body(data_url(wav(1)), logprobs=True, top_logprobs=2)
        whole = (await client.post(COMPATIBLE, json=body)).json()
        content = whole["choices"][0]["logprobs"]["content"]
        assert "".join(each["token"] for each in content) == whole["choices"][0]["message"]["content"]
        assert len(content) == whole["usage"]["completion_tokens"] == 5
        assert [len(each["top_logprobs"]) for each in content] == [2] * 5
        chunks = events((await client.post(COMPATIBLE, json=body | {"stream": True})).text)
        streamed = [each for chunk in chunks for each in tokens(chunk)]
        assert streamed == content
        plain = (await client.post(COMPATIBLE, json=compatible_body(data_url(wav(1))))).json()
        assert plain["choices"][0]["logprobs"] is None
