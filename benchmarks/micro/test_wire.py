"""The wire: reading a request with 30 s of MP3, and writing the 256 events of a stream; JSON libraries as reference.

pytest benchmarks/micro/test_wire.py --benchmark-group-by=func,param:dialect
"""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from serving.api.dialects.dashscope import DashScopeCodec
from serving.api.dialects.openai import OpenAICodec
from serving.config import Settings
from serving.types import CaptionDelta, FinishReason, Usage

if TYPE_CHECKING:
    from collections.abc import Callable

    from serving.api.dialects.base import Codec

AUDIO = f"data:audio/mp3;base64,{base64.b64encode(bytes(480_000)).decode()}"
MODEL = "qwen3-omni-30b-a3b-captioner"
SSE = {"x-dashscope-sse": "enable"}
TOKENS = 256
DELTAS = [
    *(CaptionDelta(f" word{number % 10}", Usage(375, number + 1)) for number in range(TOKENS)),
    CaptionDelta("", Usage(375, TOKENS), FinishReason.STOP),
]
BODIES = {
    "openai": json.dumps(
        {
            "model": MODEL,
            "messages": [
                {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": AUDIO, "format": "mp3"}}]}
            ],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode(),
    "dashscope": json.dumps(
        {
            "model": MODEL,
            "input": {"messages": [{"role": "user", "content": [{"audio": AUDIO}]}]},
            "parameters": {"incremental_output": True},
        }
    ).encode(),
}


@pytest.fixture(params=BODIES)
def dialect(request: pytest.FixtureRequest) -> str:
    """Dialect."""
    return str(request.param)


@pytest.fixture
def codec(dialect: str) -> Codec:
    """The service's codec of the dialect."""
    settings = Settings(served_model_name=MODEL)
    return OpenAICodec(settings) if dialect == "openai" else DashScopeCodec(settings)


def test_read_service(benchmark: Callable[..., Any], dialect: str, codec: Codec) -> None:
    """A request is parsed and checked; the audio stays encoded."""
    request, reply = benchmark(codec.decode_request, BODIES[dialect], SSE, "id")
    assert request.model == MODEL
    assert reply.stream


def test_read_library(benchmark: Callable[..., Any], dialect: str) -> None:
    """A request is parsed by the standard library."""
    assert benchmark(json.loads, BODIES[dialect])["model"] == MODEL


def test_write_service(benchmark: Callable[..., Any], dialect: str, codec: Codec) -> None:
    """The events of a stream are written, from the first to the last."""

    def stream() -> bytes:
        _, reply = codec.decode_request(BODY_WITHOUT_AUDIO[dialect], SSE, "id")
        return b"".join(reply.event(delta) for delta in DELTAS)

    written = benchmark(stream)
    assert written.count(b"\n\n") >= TOKENS


BODY_WITHOUT_AUDIO = {name: body.replace(AUDIO.encode(), b"https://a.example/a.mp3") for name, body in BODIES.items()}


@pytest.mark.parametrize("dumps", [json.dumps, orjson.dumps], ids=["json", "orjson"])
def test_write_library(benchmark: Callable[..., Any], dialect: str, dumps: Callable[[Any], str | bytes]) -> None:
    """The same number of events of the same shape is encoded by a library, from dictionaries."""

    def event(delta: CaptionDelta) -> dict[str, Any]:
        if dialect == "openai":
            return {
                "choices": [{"delta": {"content": delta.text}, "finish_reason": None, "index": 0, "logprobs": None}],
                "object": "chat.completion.chunk",
                "usage": None,
                "created": 1_700_000_000,
                "system_fingerprint": None,
                "model": MODEL,
                "id": "chatcmpl-id",
            }
        usage = {"input_tokens": delta.usage.input_tokens, "output_tokens": delta.usage.output_tokens}
        message = {"content": [{"text": delta.text}], "role": "assistant"}
        return {
            "output": {"choices": [{"message": message, "finish_reason": "null"}]},
            "usage": {**usage, "total_tokens": sum(usage.values()), "input_tokens_details": {"audio_tokens": 375}},
            "request_id": "id",
        }

    def stream() -> bytes:
        texts = (dumps(event(delta)) for delta in DELTAS)
        return b"".join(b"data: %b\n\n" % (text if isinstance(text, bytes) else text.encode()) for text in texts)

    assert benchmark(stream).count(b"\n\n") == len(DELTAS)
