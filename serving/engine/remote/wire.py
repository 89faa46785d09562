"""The wire between a frontend and an engine replica: one TCP connection, typed messages in both directions.

A frame is two lengths (big-endian, 32 bits each), a JSON header and a payload. `encode` and `read_message` are the only
writer and the only parser of frames. The frontend sends first:

    frontend ► engine replica
    Hello          {secret}
    Generate       generate {id, request_id, samples, frames, sampling, share, trace}
    FeaturesPiece  features {id} and a piece of the log-mel, repeated until all of it is sent
    Abort          abort {id}

    engine replica ► frontend
    State          state {ready, failed, draining, load, seen}, every `STATE_INTERVAL_S`
    Deltas         deltas {deltas: [[id, text, tokens, finish_reason], …], queue_s: [[id, seconds], …],
                           own: [[id, input tokens, tokens not counted], …], started: [id, …], looped: [id, …],
                           logprobs: [[id, [[token, logarithm, [[token, logarithm], …]], …]], …]}
    Failure        error {id, error, message, retry_after_s, reason}: an exception of `serving.errors`

Names in frames are fixed, whatever the Python classes are called: during a rolling update the version before reads
them, and the reverse. Headers only ever gain fields, and the lists within `deltas` keep their lengths: a parser ignores
fields that it does not know, and every field that an older version does not send has a default. A frame of an unknown
kind is an error. Fields of `sampling` that were added are sent only where they differ from their default. A replica of
the version before does not know them, and so does not honour them.

Reasons against Ray's own calls: deploy/adr/0005-frontends-and-engines.md. All content is data; nothing is unpickled.
"""

from __future__ import annotations

import struct
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import orjson

from serving import errors
from serving.engine.base import EngineDelta, Load
from serving.errors import CaptionerError, Internal, Overloaded
from serving.types import FinishReason, Sampling, SchedulingClass, TokenLogprob

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator, Mapping, Sequence

T = TypeVar("T")

PIECE_BYTES = 256 * 1024
"""Maximum bytes of a piece of features, so that a long clip does not hold up the deltas of other clips."""

STATE_INTERVAL_S = 0.25
"""Interval at which an engine replica sends its state."""

SILENCE_S = 10.0
"""A replica from which nothing has arrived for this time counts as dead: forty states were due."""

_FIRST_SAMPLING_FIELDS = frozenset({
    "temperature",
    "top_p",
    "top_k",
    "max_tokens",
    "seed",
    "stop",
    "stop_token_ids",
    "stop_token_sequences",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "ignore_eos",
})  # fmt: skip
"""Fields that every version sends: the first one fails without its three lists of stops."""

_FRAME_LOGPROBS = 512
"""Most tokens of one frame that have probabilities, each with up to 20 alternatives: some hundreds of KB of JSON."""

_LENGTHS = struct.Struct("!II")
_HEADER_BYTES = 4 * 1024 * 1024
"""Maximum bytes of a header. A text of 32,768 tokens in one delta is shorter."""


class ProtocolError(ConnectionError):
    """The peer does not speak this protocol."""


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of a frontend; without the cluster's secret the replica closes the connection."""

    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Generate:
    """Start of generation `number`. Its features, `frames` columns of log-mel, follow in pieces."""

    number: int
    request_id: str
    sampling: Sampling
    scheduling_class: SchedulingClass
    samples: int
    frames: int
    trace: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class FeaturesPiece:
    """The next bytes of the log-mel of generation `number`."""

    number: int
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class Abort:
    """End of the frontend's interest in generation `number`."""

    number: int


@dataclass(frozen=True, slots=True)
class State:
    """State of an engine replica. `seen`: the last generation that had arrived when `load` was taken."""

    seen: int
    ready: bool
    failed: bool
    draining: bool
    load: Load


@dataclass(frozen=True, slots=True)
class Deltas:
    """Deltas by generation, one of each at most, and the generations that the engine has `started` on."""

    deltas: Mapping[int, EngineDelta]
    started: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Failure:
    """End of generation `number` by an exception of `serving.errors`.

    `retry_after_s` and `reason` belong to `Overloaded` alone.
    """

    number: int
    error: str
    message: str
    retry_after_s: int | None = None
    reason: str | None = None

    @classmethod
    def of(cls, number: int, error: CaptionerError) -> Failure:
        """Describe the exception that ended generation `number`."""
        name, message = type(error).__name__, str(error)
        if isinstance(error, Overloaded):
            return cls(number, name, message, error.retry_after_s, error.reason)
        return cls(number, name, message)

    def exception(self) -> CaptionerError:
        """Return the exception; `Internal` where this version does not know its class or cannot build it."""
        kind = getattr(errors, self.error, None)
        if not (isinstance(kind, type) and issubclass(kind, CaptionerError)):
            return Internal()
        if issubclass(kind, Overloaded):
            if self.retry_after_s is None or self.reason is None:
                raise ProtocolError("malformed frame: Overloaded without retry_after_s or reason")
            return kind(self.message, retry_after_s=self.retry_after_s, reason=self.reason)
        try:
            return kind(self.message)
        except TypeError:  # it has arguments that no frame carries
            return Internal()


Message = Hello | Generate | FeaturesPiece | Abort | State | Deltas | Failure


def encode(message: Message) -> tuple[bytes, bytes | memoryview]:
    """Return the frame of a message in two parts: lengths and header, then the payload, which is not copied."""
    header, payload = _header(message), message.data if isinstance(message, FeaturesPiece) else b""
    text = orjson.dumps(header)
    return _LENGTHS.pack(len(text), len(payload)) + text, payload


async def read_message(reader: asyncio.StreamReader) -> Message:
    """Read the next message. Raises `ProtocolError`, `IncompleteReadError` at the end of the stream, `OSError`."""
    header_bytes, payload_bytes = _LENGTHS.unpack(await reader.readexactly(_LENGTHS.size))
    if header_bytes > _HEADER_BYTES or payload_bytes > PIECE_BYTES:
        raise ProtocolError(f"frame too large: header of {header_bytes} bytes, payload of {payload_bytes} bytes")
    try:
        header = orjson.loads(await reader.readexactly(header_bytes))
    except orjson.JSONDecodeError as error:
        raise ProtocolError("the header is not JSON") from error
    if not isinstance(header, dict):
        raise ProtocolError("the header is not a JSON object")
    payload = await reader.readexactly(payload_bytes) if payload_bytes else b""
    try:
        return _message(header, payload)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ProtocolError(f"malformed frame: {error!r}") from error


def merge(before: EngineDelta | None, delta: EngineDelta) -> EngineDelta:
    """Return one delta for two consecutive deltas of a generation."""
    if before is None:
        return delta
    return EngineDelta(
        before.text + delta.text,
        before.tokens + delta.tokens,
        delta.finish_reason,
        before.queue_s or delta.queue_s,
        before.input_tokens + delta.input_tokens,
        before.uncounted_tokens + delta.uncounted_tokens,
        delta.looped,
        before.logprobs + delta.logprobs,
    )


def split(deltas: Mapping[int, EngineDelta], started: Sequence[int]) -> Iterator[Deltas]:
    """Yield messages of the deltas, more than one where a frame would get too many probabilities."""
    batch: dict[int, EngineDelta] = {}
    room = _FRAME_LOGPROBS
    for number, delta in deltas.items():
        rest = delta
        while len(rest.logprobs) > room:
            batch[number] = replace(rest, finish_reason=None, looped=False, logprobs=rest.logprobs[:room])
            rest = EngineDelta("", 0, delta.finish_reason, looped=delta.looped, logprobs=rest.logprobs[room:])
            yield Deltas(batch, started)
            batch, started, room = {}, (), _FRAME_LOGPROBS
        batch[number] = rest
        room -= len(rest.logprobs)
    yield Deltas(batch, started)


def known_fields(kind: type[T], values: Mapping[str, Any]) -> T:
    """Build a dataclass from the values whose names it has; ignore all others, which a newer version may send."""
    return kind(**{each.name: values[each.name] for each in fields(kind) if each.name in values})  # type: ignore[arg-type]


def _header(message: Message) -> dict[str, Any]:
    """Return the JSON header of a message. The only place that names the fields to write."""
    match message:
        case Hello():
            return {"secret": message.secret}
        case Generate(number=number, scheduling_class=of):
            return {
                "op": "generate",
                "id": number,
                "request_id": message.request_id,
                "sampling": _sampling_fields(message.sampling),
                "share": {"flow": of.tenant, "weight": of.weight, "priority": of.priority},
                "samples": message.samples,
                "frames": message.frames,
            } | ({"trace": dict(message.trace)} if message.trace else {})
        case FeaturesPiece(number=number):
            return {"op": "features", "id": number}
        case Abort(number=number):
            return {"op": "abort", "id": number}
        case State():
            state = {"seen": message.seen, "ready": message.ready, "failed": message.failed}
            return {"op": "state", **state, "draining": message.draining, "load": asdict(message.load)}
        case Deltas(deltas=deltas, started=started):
            looped = [number for number, each in deltas.items() if each.looped]
            added: dict[str, Any] = ({"started": [*started]} if started else {}) | (
                {"looped": looped} if looped else {}
            )
            logprobs = [
                [number, [[token.text, token.logprob, token.top] for token in each.logprobs]]
                for number, each in deltas.items()
                if each.logprobs
            ]
            added |= {"logprobs": logprobs} if logprobs else {}
            return {
                "op": "deltas",
                "deltas": [[number, each.text, each.tokens, each.finish_reason] for number, each in deltas.items()],
                "queue_s": [[number, each.queue_s] for number, each in deltas.items() if each.queue_s],
                "own": [
                    [number, each.input_tokens, each.uncounted_tokens]
                    for number, each in deltas.items()
                    if each.input_tokens or each.uncounted_tokens
                ],
            } | added
        case Failure(number=number):
            failure = {"op": "error", "id": number, "error": message.error, "message": message.message}
            overloaded = {"retry_after_s": message.retry_after_s, "reason": message.reason}
            return failure | (overloaded if message.reason is not None else {})


def _message(header: Mapping[str, Any], payload: bytes) -> Message:
    """Return the message of a header and a payload. The only place that names the fields to read."""
    if "op" not in header:
        return Hello(str(header.get("secret", "")))
    match header["op"]:
        case "generate":
            return Generate(
                number=int(header["id"]),
                request_id=str(header["request_id"]),
                sampling=_sampling(header["sampling"]),
                scheduling_class=_scheduling_class(header.get("share", {})),
                samples=int(header["samples"]),
                frames=int(header["frames"]),
                trace=header.get("trace"),
            )
        case "features":
            return FeaturesPiece(int(header["id"]), payload)
        case "abort":
            return Abort(int(header["id"]))
        case "state":
            return State(
                seen=int(header["seen"]),
                ready=bool(header.get("ready", False)),
                failed=bool(header["failed"]),
                draining=bool(header.get("draining", False)),
                load=known_fields(Load, header["load"]),
            )
        case "deltas":
            queue_s = {number: float(seconds) for number, seconds, *_ in header.get("queue_s", ())}
            counts = {each[0]: (int(each[1]), int(each[2])) for each in header.get("own", ())}
            looped = frozenset(header.get("looped", ()))
            logprobs = {number: tuple(map(_token, tokens)) for number, tokens, *_ in header.get("logprobs", ())}
            return Deltas(
                {
                    int(number): EngineDelta(
                        str(text),
                        int(tokens),
                        FinishReason(finish_reason) if finish_reason else None,
                        queue_s.get(number, 0.0),
                        *counts.get(number, (0, 0)),
                        looped=number in looped,
                        logprobs=logprobs.get(number, ()),
                    )
                    for number, text, tokens, finish_reason, *_ in header["deltas"]
                },
                tuple(int(number) for number in header.get("started", ())),
            )
        case "error":
            return Failure(
                int(header["id"]),
                str(header["error"]),
                header["message"],
                header.get("retry_after_s"),
                header.get("reason"),
            )
        case other:
            raise ProtocolError(f"unknown kind of frame: {other!r}")


def _token(values: Sequence[Any]) -> TokenLogprob:
    text, logprob, top, *_ = values
    return TokenLogprob(str(text), float(logprob), tuple((str(each), float(number)) for each, number, *_ in top))


def _sampling_fields(sampling: Sampling) -> dict[str, Any]:
    """Return the fields of the first version, and those added since that differ from their default."""
    return {
        each.name: value
        for each in fields(Sampling)
        if (value := getattr(sampling, each.name)) != each.default or each.name in _FIRST_SAMPLING_FIELDS
    }


def _sampling(values: Mapping[str, Any]) -> Sampling:
    """Return the sampling parameters of a header, in which tuples have become lists."""
    return known_fields(Sampling, {name: _frozen(value) for name, value in values.items()})


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _scheduling_class(values: Mapping[str, Any]) -> SchedulingClass:
    names = {"flow": "tenant", "weight": "weight", "priority": "priority"}
    return SchedulingClass(**{names[name]: value for name, value in values.items() if name in names})
