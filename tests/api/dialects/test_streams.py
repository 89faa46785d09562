"""Streams of any text, split in any way, are put together by clients; no body of a request breaks a codec."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.api.dialects.base import HEARTBEAT
from serving.api.dialects.dashscope import DashScopeCodec, DashScopeReply
from serving.api.dialects.openai import OpenAICodec, OpenAIReply
from serving.config import Settings
from serving.errors import ClientError, EngineFailed
from serving.types import CaptionDelta, FinishReason, Usage
from tests.api.dialects.bad_parameters import COMPATIBLE_ONLY, NATIVE_ONLY, PARAMETERS
from tests.api.dialects.bad_requests import GOOD, MODEL, compatible, native
from tests.api.dialects.clients import dashscope_1x, httpx_sse, openai_chunks
from tests.support.lazy import Lazy

if TYPE_CHECKING:
    import openai

    from serving.api.dialects.base import Reply
else:
    openai = Lazy("openai")

SETTINGS = Settings()

# Characters that end lines for some reader, need escapes, or need two UTF-16 units.
awkward = st.sampled_from('\u2028\u2029\u0085\x0b\x0c\x1c\r\n\t\0\x7f"\\/\N{GRINNING FACE}\U0010ffff\ufeff声é')
words = st.text(st.one_of(awkward, st.characters(exclude_categories=["Cs"])), max_size=40)
captions = st.lists(words, max_size=12)


def stream_of(reply: Reply, pieces: list[str], reason: FinishReason = FinishReason.STOP) -> bytes:
    """Return the events of a caption in these pieces, with a heartbeat before each."""
    usage = Usage(audio_tokens=76)
    stream = b""
    for piece in pieces:
        usage = Usage(usage.audio_tokens, usage.output_tokens + 1)
        stream += HEARTBEAT + reply.event(CaptionDelta(piece, usage))
    return stream + HEARTBEAT + reply.event(CaptionDelta("", usage, reason))


def native_reply(*, incremental: bool) -> DashScopeReply:
    """Return a streaming reply."""
    parameters = json.dumps({"incremental_output": incremental})
    headers = {"accept": "text/event-stream"}
    return DashScopeCodec(SETTINGS).decode_request(native(GOOD, parameters=parameters), headers, "id")[1]


def compatible_reply(*, include_usage: bool) -> OpenAIReply:
    """Return a streaming reply."""
    parameters = json.dumps({"stream": True, "stream_options": {"include_usage": include_usage}})
    return OpenAICodec(SETTINGS).decode_request(compatible(GOOD, parameters=parameters), {}, "id")[1]


def native_text(payload: dict[str, Any]) -> str:
    """Return the text of a result, indexed as in the manual's samples."""
    text: str = payload["output"]["choices"][0]["message"]["content"][0]["text"]
    return text


@given(captions)
def test_incremental(pieces: list[str]) -> None:
    """The texts of an incremental stream add up to the caption, for both readers of events."""
    stream = stream_of(native_reply(incremental=True), pieces)
    assert "".join(native_text(payload) for _, payload in dashscope_1x(stream)) == "".join(pieces)
    assert "".join(native_text(json.loads("\n".join(event.data))) for event in httpx_sse(stream)) == "".join(pieces)


@given(captions)
def test_cumulative(pieces: list[str]) -> None:
    """Each text of a cumulative stream is a prefix of the next, and the last is the caption."""
    texts = [native_text(payload) for _, payload in dashscope_1x(stream_of(native_reply(incremental=False), pieces))]
    assert all(later.startswith(text) for text, later in itertools.pairwise(texts))
    assert texts[-1] == "".join(pieces)


@given(captions, st.booleans())
def test_compatible(pieces: list[str], include_usage: bool) -> None:  # noqa: FBT001
    """The contents of a compatible stream add up to the caption; usage comes once, last, if requested."""
    chunks = openai_chunks(stream_of(compatible_reply(include_usage=include_usage), pieces))
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert "".join(choice["delta"]["content"] for choice in choices) == "".join(pieces)
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert [chunk["usage"] is not None for chunk in chunks] == [False] * len(choices) + [True] * include_usage
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1


@given(words, st.sampled_from(FinishReason))
def test_whole(text: str, reason: FinishReason) -> None:
    """A body that is not streamed is JSON that holds the caption."""
    last = CaptionDelta("", Usage(audio_tokens=76, output_tokens=3), reason)
    body = json.loads(native_reply(incremental=False).full_body(text, last))
    assert native_text(body) == text
    assert body["output"]["choices"][0]["finish_reason"] == reason
    body = json.loads(compatible_reply(include_usage=False).full_body(text, last))
    assert body["choices"][0]["message"] == {"content": text, "role": "assistant"}
    assert body["choices"][0]["finish_reason"] == reason


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "type", "audio", "input_audio", "data", "audio_url", "url", "text", "messages"]
            )
            | st.text(max_size=5),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
parameters = {name for name, *_ in (*PARAMETERS, *NATIVE_ONLY, *COMPATIBLE_ONLY)}
names = st.sampled_from(["model", "messages", "input", "parameters", "stream_options", *sorted(parameters)])
requests = st.dictionaries(names, values, max_size=6)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]) | values, "content": values}), max_size=3
)


@given(st.one_of(st.binary(max_size=60), values.map(json.dumps).map(str.encode)))
def test_no_body_breaks_a_codec(body: bytes) -> None:
    """Any bytes and any JSON are decoded or refused, never anything else."""
    decode_all(body)


@given(requests, messages | values)
def test_no_request_breaks_a_codec(request: dict[str, Any], said: Any) -> None:
    """Any request with known fields of any type is decoded or refused, never anything else."""
    decode_all(json.dumps({"messages": said, **request, "model": MODEL}).encode())
    whole = {"input": {"messages": said}, "parameters": request, **request, "model": MODEL}
    decode_all(json.dumps(whole).encode())


def decode_all(body: bytes) -> None:
    """Decode in both dialects; render refusals."""
    for codec in (DashScopeCodec(SETTINGS), OpenAICodec(SETTINGS)):
        try:
            codec.decode_request(body, {}, "id")
        except ClientError as error:
            json.loads(codec.error(error, "id").body)


def official_client(stream: bytes) -> openai.OpenAI:
    """Return the official client, with a server that answers every request with this stream."""

    def answer(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, content=stream, headers={"content-type": "text/event-stream"})

    transport = httpx2.MockTransport(answer)
    return openai.OpenAI(
        api_key="x", base_url="http://captioner.test/v1", http_client=httpx2.Client(transport=transport)
    )


def ask(client: openai.OpenAI) -> openai.Stream[openai.types.chat.ChatCompletionChunk]:
    """Make a streamed request."""
    return client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x"}], stream=True)


def test_the_official_client_reads_the_stream() -> None:
    """The official OpenAI client puts an awkward caption together and reads the usage."""
    pieces = ["The \u2028", "clip\u0085\r\n", "\N{GRINNING FACE}", '"'] * 20
    with official_client(stream_of(compatible_reply(include_usage=True), pieces)) as client:
        chunks = list(ask(client))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "".join(pieces)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == 84
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"


def test_the_official_client_raises_the_error() -> None:
    """The official OpenAI client raises the error in the middle of a stream."""
    reply = compatible_reply(include_usage=True)
    stream = reply.event(CaptionDelta("The ", Usage(76, 1))) + reply.error_event(EngineFailed())
    with official_client(stream) as client, pytest.raises(openai.APIError, match="inference internal error") as raised:
        list(ask(client))
    assert (raised.value.code, raised.value.type) == ("internal_error", "internal_error")
