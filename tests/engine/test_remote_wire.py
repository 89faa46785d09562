"""Frames between frontends and engine replicas: this version and the version before read each other."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import orjson
import pytest

from serving.engine.base import EngineDelta, Load
from serving.engine.remote.wire import (
    Abort,
    Deltas,
    Failure,
    FeaturesPiece,
    Generate,
    Hello,
    Message,
    ProtocolError,
    State,
    encode,
    merge,
    read_message,
    split,
)
from serving.errors import EngineFailed, Internal, Overloaded
from serving.types import FinishReason, Sampling, SchedulingClass, TokenLogprob

BEFORE: dict[str, tuple[Message, bytes]] = {
    "hello": (Hello("sesame"), b'\x00\x00\x00\x13\x00\x00\x00\x00{"secret":"sesame"}'),
    "generate": (
        Generate(
            number=7,
            request_id="r-1",
            sampling=Sampling(seed=3, stop=("END",), stop_token_ids=(5,), stop_token_sequences=((6, 7),)),
            scheduling_class=SchedulingClass("t-1", 2.0, 1),
            samples=321,
            frames=2,
            trace={"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
        ),
        (
            b'\x00\x00\x01\xb8\x00\x00\x00\x00{"op":"generate","id":7,"request_id":"r-1","sampling":{"temperature":0.6,'
            b'"top_p":0.95,"top_k":20,"max_tokens":32768,"seed":3,"stop":["END"],"stop_token_ids":[5],'
            b'"stop_token_sequences":[[6,7]],"presence_penalty":0.0,"frequency_penalty":0.0,"repetition_penalty":1.0,'
            b'"ignore_eos":false},"share":{"flow":"t-1","weight":2.0,"priority":1},"samples":321,"frames":2,'
            b'"trace":{"traceparent":"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}}'
        ),
    ),
    "features": (
        FeaturesPiece(7, b"\x00\x00\x80?"),
        b'\x00\x00\x00\x18\x00\x00\x00\x04{"op":"features","id":7}\x00\x00\x80?',
    ),
    "abort": (Abort(7), b'\x00\x00\x00\x15\x00\x00\x00\x00{"op":"abort","id":7}'),
    "state": (
        State(seen=8, ready=True, failed=False, draining=False, load=Load(1, 2, 3.5, 4, 5, 6.5)),
        (
            b'\x00\x00\x00\xae\x00\x00\x00\x00{"op":"state","seen":8,"ready":true,"failed":false,"draining":false,'
            b'"load":{"running":1,"waiting":2,"audio_s":3.5,"kv_tokens":4,"kv_capacity_tokens":5,"waiting_audio_s":6.5}}'
        ),
    ),
    "deltas": (
        Deltas(
            {
                7: EngineDelta("A d\u00f6g", 2, None, 0.25, 29, 0),
                8: EngineDelta("", 0, FinishReason.STOP, 0.0, 0, 1),
            }
        ),
        (
            b'\x00\x00\x00l\x00\x00\x00\x00{"op":"deltas","deltas":[[7,"A d\xc3\xb6g",2,null],[8,"",0,"stop"]],'
            b'"queue_s":[[7,0.25]],"own":[[7,29,0],[8,0,1]]}'
        ),
    ),
    "overloaded": (
        Failure(7, "Overloaded", "Too many requests.", 3, "engine_wait"),
        (
            b'\x00\x00\x00r\x00\x00\x00\x00{"op":"error","id":7,"error":"Overloaded","message":"Too many requests.",'
            b'"retry_after_s":3,"reason":"engine_wait"}'
        ),
    ),
    "failed": (
        Failure(8, "EngineFailed", "inference internal error."),
        (
            b'\x00\x00\x00R\x00\x00\x00\x00{"op":"error","id":8,"error":"EngineFailed",'
            b'"message":"inference internal error."}'
        ),
    ),
}
"""Messages, and their frames as the version before this module's message classes wrote them."""


async def read(data: bytes) -> Message:
    """Return the message of the first frame in `data`."""
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    return await read_message(reader)


def frame(header: Any, payload: bytes = b"") -> bytes:
    """Return a frame with any header."""
    text = header if isinstance(header, bytes) else orjson.dumps(header)
    return struct.pack("!II", len(text), len(payload)) + text + payload


def header_of(data: bytes) -> dict[str, Any]:
    """Return the header of the frame `data`."""
    (length,) = struct.unpack("!I", data[:4])
    header: dict[str, Any] = orjson.loads(data[8 : 8 + length])
    return header


@pytest.mark.parametrize("kind", BEFORE)
async def test_a_frame_of_the_version_before_is_read(kind: str) -> None:
    """Every frame of the version before gives the message with the same content."""
    message, data = BEFORE[kind]
    assert await read(data) == message


@pytest.mark.parametrize("kind", BEFORE)
def test_the_version_before_can_read_every_frame(kind: str) -> None:
    """Every message is written as the same bytes that the version before wrote."""
    message, data = BEFORE[kind]
    assert b"".join(encode(message)) == data


@pytest.mark.parametrize("kind", BEFORE)
async def test_unknown_fields_are_ignored(kind: str) -> None:
    """A frame of a newer version, with further fields at every level that has names, gives the same message."""
    message, data = BEFORE[kind]
    header, payload = header_of(data), data[8 + struct.unpack("!I", data[:4])[0] :]
    for nested in ("sampling", "share", "load"):
        if nested in header:
            header[nested]["new"] = 1
    assert await read(frame(header | {"new": {"a": 1}}, payload)) == message


async def test_added_sampling_parameters_are_sent_where_they_are_set() -> None:
    """Parameters that were added arrive as they were sent; without them the frame is that of the version before."""
    added = Sampling(
        include_stop=True,
        min_p=0.5,
        min_tokens=3,
        logit_bias=((5, -1.5), (6, 2.0)),
        allowed_token_ids=(5, 6),
        bad_words=("d\u00f6g",),
    )
    data = b"".join(encode(Generate(7, "r-1", added, SchedulingClass(), 321, 2)))
    message = await read(data)
    assert isinstance(message, Generate)
    assert message.sampling == added
    assert header_of(data)["sampling"].keys() - header_of(BEFORE["generate"][1])["sampling"].keys() == {
        "include_stop",
        "min_p",
        "min_tokens",
        "logit_bias",
        "allowed_token_ids",
        "bad_words",
    }


@pytest.mark.parametrize(
    ("kind", "optional"),
    [
        ("generate", ("share", "trace")),
        ("state", ("ready", "draining")),
        ("deltas", ("queue_s", "own")),
    ],
)
async def test_fields_that_older_versions_do_not_send_have_defaults(kind: str, optional: tuple[str, ...]) -> None:
    """A frame without the fields that were added over time is read."""
    message, data = BEFORE[kind]
    header = {name: value for name, value in header_of(data).items() if name not in optional}
    assert type(await read(frame(header))) is type(message)


@pytest.mark.parametrize(
    "data",
    [
        frame({"op": "gossip", "id": 1}),
        frame({"op": "state"}),
        frame({"op": "generate", "id": 1}),
        frame({"op": "deltas", "deltas": [[1, "text"]]}),
        frame({"op": "deltas", "deltas": [[1, "text", 1, "tired"]]}),
        frame({"op": "deltas", "deltas": [[1, "text", 1, None]], "own": [[1]]}),
        frame([1]),
        frame(b"not JSON"),
        b"\xff" * 8,
    ],
)
async def test_a_frame_that_is_not_understood_is_an_error(data: bytes) -> None:
    """Unknown kinds, missing or wrong fields, headers that are not objects and oversized frames are `ProtocolError`."""
    with pytest.raises(ProtocolError):
        await read(data)


def test_an_exception_survives_the_wire() -> None:
    """An exception keeps its class, message, `retry_after_s` and `reason`; an unknown class becomes `Internal`."""
    overloaded = Failure.of(1, Overloaded("full", retry_after_s=7, reason="engine_queue")).exception()
    assert isinstance(overloaded, Overloaded)
    assert (str(overloaded), overloaded.retry_after_s, overloaded.reason) == ("full", 7, "engine_queue")
    failed = Failure.of(1, EngineFailed()).exception()
    assert (type(failed), str(failed)) == (EngineFailed, str(EngineFailed()))
    for unknown in ("Unheard", "annotations", "RateLimited"):
        assert type(Failure(1, unknown, "x").exception()) is Internal
    with pytest.raises(ProtocolError):
        Failure(1, "Overloaded", "x").exception()


async def test_a_stopped_loop_arrives_and_is_a_stop_to_the_version_before() -> None:
    """A delta that ends a loop keeps its mark, in a field that the version before ignores."""
    message = Deltas({7: EngineDelta("2 2", 2, FinishReason.STOP, looped=True), 8: EngineDelta("a", 1)})
    data = b"".join(encode(message))
    assert await read(data) == message
    assert header_of(data)["looped"] == [7]
    assert header_of(data)["deltas"] == [[7, "2 2", 2, "stop"], [8, "a", 1, None]]
    assert merge(EngineDelta("a", 1), EngineDelta("2 2", 2, FinishReason.STOP, looped=True)).looped


LIKELY = tuple(TokenLogprob(f"t{number}", -0.5, (("d\u00f6g", -0.5), ("cat", -9999.0))) for number in range(1200))


async def test_probabilities_arrive_and_the_version_before_ignores_them() -> None:
    """Probabilities are in a field of their own; without them no frame and no request has it."""
    message = Deltas({7: EngineDelta("a b", 2, None, logprobs=LIKELY[:2]), 8: EngineDelta("c", 1)})
    data = b"".join(encode(message))
    assert await read(data) == message
    header = header_of(data)
    assert header["deltas"] == [[7, "a b", 2, None], [8, "c", 1, None]]
    assert header["logprobs"][0] == [
        7,
        [["t0", -0.5, [["d\u00f6g", -0.5], ["cat", -9999.0]]], ["t1", -0.5, [["d\u00f6g", -0.5], ["cat", -9999.0]]]],
    ]
    request = b"".join(encode(Generate(7, "r-1", Sampling(logprobs=0), SchedulingClass(), 321, 2)))
    assert header_of(request)["sampling"]["logprobs"] == 0
    received = await read(request)
    assert isinstance(received, Generate)
    assert received.sampling == Sampling(logprobs=0)


async def test_many_probabilities_are_split_into_frames() -> None:
    """No frame has the probabilities of more than 512 tokens; together they are the delta."""
    deltas = {
        7: EngineDelta("a", 700, FinishReason.STOP, 0.5, 10, 1, looped=True, logprobs=LIKELY[:700]),
        8: EngineDelta("b", 500, logprobs=LIKELY[700:]),
        9: EngineDelta("c", 1),
    }
    messages = list(split(deltas, [7]))
    assert [sum(len(each.logprobs) for each in message.deltas.values()) for message in messages] == [512, 512, 176]
    assert [message.started for message in messages] == [[7], (), ()]
    together: dict[int, EngineDelta] = {}
    for message in messages:
        assert len(encode(message)[0]) < 256 * 1024
        for number, delta in message.deltas.items():
            assert not together.get(number, delta).finish_reason or number not in together
            together[number] = merge(together.get(number), delta)
    assert together == deltas


def test_a_message_without_probabilities_is_not_split() -> None:
    """Deltas without probabilities are one message, as before."""
    deltas = {7: EngineDelta("a", 1), 8: EngineDelta("b", 1)}
    assert list(split(deltas, [])) == [Deltas(deltas, [])]


def test_consecutive_deltas_merge_into_one() -> None:
    """Text and counts add up, the wait is that of the first delta, and the finish reason that of the last."""
    first, last = EngineDelta("a", 1, None, 0.5, 10, 0), EngineDelta("b", 2, FinishReason.LENGTH, 0.0, 0, 1)
    assert merge(None, first) is first
    assert merge(first, last) == EngineDelta("ab", 3, FinishReason.LENGTH, 0.5, 10, 1)
