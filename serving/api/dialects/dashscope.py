"""The native DashScope dialect: multimodal generation (PROTOCOL 3, 4), its errors (9) and its model list (11)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from serving import errors
from serving.api.dialects import base
from serving.api.dialects.audio_reference import audio_source
from serving.api.dialects.base import (
    MAX_TEXT_BYTES,
    HttpError,
    error_headers,
    nearest,
    requested_guard,
    stopped_field,
)
from serving.api.dialects.json_codec import parse_object, quote
from serving.api.dialects.messages import MISSING_AUDIO, only_audio
from serving.api.dialects.model_card import check_served, model_card, requested_model, served_names
from serving.api.dialects.parameters import boolean, integer, mapping, refuse_unsupported, sampling
from serving.api.dialects.timeline import stream_parts, timeline_member, timeline_options
from serving.errors import AsyncNotSupported, InvalidRequest, MissingInput, UnsupportedOperation
from serving.types import CaptionRequest, FinishReason

if TYPE_CHECKING:
    from collections.abc import Mapping

    from serving.config import Settings
    from serving.types import CaptionDelta, Usage

MAX_SEED = 2**63 - 1
MAX_PAGE_SIZE = 100

_STATUS = base.STATUS | {errors.ModelNotFound: 400, errors.MethodNotAllowed: 400}

_CODE: dict[type[errors.CaptionerError], str] = {
    errors.ClientError: "InvalidParameter",
    errors.MissingModel: "BadRequest.EmptyModel",
    errors.MissingInput: "BadRequest.EmptyInput",
    errors.InlineTooLarge: "BadRequest.TooLarge",
    errors.BodyTooLarge: "BadRequest.TooLarge",
    errors.NotFound: "NotFound",
    errors.AsyncNotSupported: "AccessDenied",
    errors.UnsupportedOperation: "UnsupportedOperation",
    errors.Unauthenticated: "InvalidApiKey",
    errors.AccessDenied: "AccessDenied",
    errors.FreeTierExhausted: "AllocationQuota.FreeTierOnly",
    errors.Arrearage: "Arrearage",
    errors.RateLimited: "Throttling",
    errors.RequestsLimited: "Throttling.RateQuota",
    errors.BurstLimited: "Throttling.BurstRate",
    errors.TokensLimited: "Throttling.AllocationQuota",
    errors.BudgetExhausted: "Throttling.AllocationQuota",
    errors.DownloadTimeout: "InvalidParameter.DataInspection",
    errors.SourceUnavailable: "ServiceUnavailable",
    errors.CaptionerError: "InternalError",
    errors.EngineFailed: "InternalError.Algo",
    errors.NotReady: "ModelUnavailable",
    errors.Overloaded: "ModelServingError",
    errors.StorageUnavailable: "ServiceUnavailable",
    errors.DeadlineExceeded: "RequestTimeOut",
}


class DashScopeCodec:
    """`Codec` of `/api/v1/services/aigc/multimodal-generation/generation`."""

    dialect = "dashscope"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def decode_request(
        self, body: bytes, headers: Mapping[str, str], request_id: str
    ) -> tuple[CaptionRequest, DashScopeReply]:
        """See `Codec`."""
        if headers.get("x-dashscope-async", "").lower() == "enable":
            raise AsyncNotSupported
        if headers.get("x-dashscope-encryptionkey"):
            raise UnsupportedOperation
        values = parse_object(body)
        model = requested_model(values, self._settings)
        messages = _messages(values)
        parameters = mapping(values, "parameters")
        refuse_unsupported(parameters, model)
        request = CaptionRequest(
            request_id=request_id,
            model=model,
            audio=audio_source(only_audio(messages), headers, self._settings),
            sampling=sampling(
                parameters,
                self._settings,
                length_names=("max_tokens", "max_length"),
                seed=_seed(parameters),
            ),
            guard=requested_guard(headers),
            timeline=timeline_options(parameters),
        )
        incremental = boolean(parameters, "incremental_output")
        return request, DashScopeReply(request_id, stream=_asks_for_stream(headers), incremental=incremental)

    def error(self, error: errors.CaptionerError, request_id: str) -> HttpError:
        """See `Codec`."""
        body = _error_object(error, request_id).encode("ascii")
        return HttpError(nearest(_STATUS, error), body, error_headers(error, request_id))


class DashScopeReply:
    """`Reply` in `result` events, each with all text so far or (`incremental`) with the new text only.

    A cumulative stream ends as `length`, truncated after the last character that fits the longest line that clients
    read (`MAX_LINE_BYTES`): the text sent stays valid and correctly billed; an error would discard a good caption.
    """

    content_type = "application/json"

    def __init__(self, request_id: str, *, stream: bool, incremental: bool) -> None:
        self.stream = stream
        self.ended = False
        self._incremental = incremental
        self._request_id = request_id
        self._end = f',"request_id":{quote(request_id)}}}\n\n'
        self._events = 0
        self._text = ""  # all text so far, JSON-escaped without quotes; cumulative streams only

    def full_body(self, text: str, last: CaptionDelta) -> bytes:
        """See `Reply`."""
        usage = last.usage
        return (
            f'{{"output":{{"choices":[{{"finish_reason":"{last.finish_reason}",'
            f'"message":{{"role":"assistant","content":[{{"text":{quote(text)}}}]}}}}]{timeline_member(last)}}},'
            f'{stopped_field(last)}"usage":{{"input_tokens":{usage.input_tokens},"output_tokens":{usage.output_tokens},'
            f'"total_tokens":{usage.total_tokens},'
            f'"input_tokens_details":{{"audio_tokens":{usage.audio_tokens},"text_tokens":{usage.text_tokens}}},'
            f'"output_tokens_details":{{"text_tokens":{usage.output_tokens}}}}},'
            f'"request_id":{quote(self._request_id)}}}'
        ).encode("ascii")

    def event(self, delta: CaptionDelta) -> bytes:
        """See `Reply`."""
        if self.ended:
            return b""
        events = self._new_text(delta) if self._incremental else self._all_text(delta)
        return events.encode("ascii")

    def error_event(self, error: errors.CaptionerError) -> bytes:
        """See `Reply`. `event:error` has no space and `status:` precedes the data: 1.x clients require both."""
        self.ended = True
        self._events += 1
        status = nearest(_STATUS, error)
        return (
            f"id:{self._events}\nevent:error\nstatus:{status}\n:HTTP_STATUS/{status}\n"
            f"data:{_error_object(error, self._request_id)}\n\n"
        ).encode("ascii")

    def _new_text(self, delta: CaptionDelta) -> str:
        events = [
            self._result_event(quote(text), "null", delta.usage, timeline=timeline)
            for text, timeline in stream_parts(delta)
        ]
        if delta.finish_reason is not None:
            self.ended = True
            events.append(self._result_event('""', delta.finish_reason, delta.usage, stopped_field(delta)))
        return "".join(events)

    def _all_text(self, delta: CaptionDelta) -> str:
        if not delta.text and delta.finish_reason is None:
            return ""
        finish_reason = delta.finish_reason
        added = quote(delta.text)[1:-1]
        timeline = timeline_member(delta)
        free_bytes = MAX_TEXT_BYTES - len(self._text) - len(timeline)
        if len(added) > free_bytes:
            added, timeline = _truncate(delta.text, free_bytes + len(timeline)), ""
            finish_reason = FinishReason.LENGTH
        self._text += added
        self.ended = finish_reason is not None
        return self._result_event(
            f'"{self._text}"', finish_reason or "null", delta.usage, stopped_field(delta), timeline=timeline
        )

    def _result_event(
        self, text: str, finish_reason: str, usage: Usage, stopped: str = "", *, timeline: str = ""
    ) -> str:
        self._events += 1
        return (
            f"id:{self._events}\nevent:result\n:HTTP_STATUS/200\n"
            f'data:{{"output":{{"choices":[{{"message":{{"content":[{{"text":{text}}}],"role":"assistant"}},'
            f'"finish_reason":"{finish_reason}"}}]{timeline}}},'
            f'{stopped}"usage":{{"input_tokens_details":{{"audio_tokens":{usage.audio_tokens},'
            f'"text_tokens":{usage.text_tokens}}},"total_tokens":{usage.total_tokens},'
            f'"output_tokens":{usage.output_tokens},"input_tokens":{usage.input_tokens},'
            f'"output_tokens_details":{{"text_tokens":{usage.output_tokens}}}}}{self._end}'
        )


def models_page(settings: Settings, query: Mapping[str, str], request_id: str) -> bytes:
    """Render the response to `GET /api/v1/models?page_no&page_size[&model]`. Raises `InvalidRequest`."""
    page_no, page_size = _page(query, "page_no", 1, 2**31), _page(query, "page_size", 10, MAX_PAGE_SIZE)
    names = [name for name in served_names(settings) if query.get("model", name) == name]
    models = ",".join(_model_object(settings, name) for name in names[(page_no - 1) * page_size :][:page_size])
    return (
        f'{{"request_id":{quote(request_id)},"output":{{"total":{len(names)},"page_no":{page_no},'
        f'"page_size":{page_size},"models":[{models}]}}}}'
    ).encode("ascii")


def model(settings: Settings, name: str, request_id: str) -> bytes:
    """Render the response to `GET /api/v1/models/{name}`. Raises `ModelNotFound`."""
    check_served(settings, name)
    return f'{{"request_id":{quote(request_id)},"output":{_model_object(settings, name)}}}'.encode("ascii")


def _asks_for_stream(headers: Mapping[str, str]) -> bool:
    return (
        headers.get("x-dashscope-sse", "").lower() == "enable"
        or "text/event-stream" in headers.get("accept", "").lower()
    )


def _messages(values: Mapping[str, Any]) -> list[Any]:
    if values.get("input") is None:
        raise MissingInput(param="input")
    inputs = mapping(values, "input")
    messages = inputs.get("messages")
    if messages is None or messages == []:
        if inputs.get("prompt"):
            raise InvalidRequest(MISSING_AUDIO, param="messages")
        raise InvalidRequest('Either "prompt" or "messages" must exist and cannot both be none', param="messages")
    if not isinstance(messages, list):
        raise InvalidRequest("'messages' must be List", param="messages")
    return messages


def _seed(parameters: Mapping[str, Any]) -> int | None:
    seed = integer(parameters, "seed")
    if seed is not None and not 0 <= seed <= MAX_SEED:
        raise InvalidRequest(f"Range of seed should be [0, {MAX_SEED}]", param="seed")
    return seed


def _page(query: Mapping[str, str], name: str, default: int, maximum: int) -> int:
    text = query.get(name) or str(default)
    value = int(text) if text.isascii() and text.isdigit() and len(text) <= len(str(maximum)) else 0
    if not 1 <= value <= maximum:
        raise InvalidRequest(f"Range of {name} should be [1, {maximum}]", param=name)
    return value


def _model_object(settings: Settings, name: str) -> str:
    card = model_card(settings)
    return (
        f'{{"model":{quote(name)},"name":{quote(card.title)},"provider":{quote(card.owner or "qwen")},'
        f'"description":{quote(card.description)}}}'
    )


def _error_object(error: errors.CaptionerError, request_id: str) -> str:
    message = str(error)
    if isinstance(error, errors.ModelNotFound):
        message = f"Model not exist. {error.hint}".strip()  # sic
    return f'{{"code":"{nearest(_CODE, error)}","message":{quote(message)},"request_id":{quote(request_id)}}}'


def _truncate(text: str, max_bytes: int) -> str:
    """Return the longest prefix of the text that takes at most `max_bytes` inside a JSON string, JSON-escaped."""
    pieces: list[str] = []
    for character in text:
        piece = quote(character)[1:-1]
        max_bytes -= len(piece)
        if max_bytes < 0:
            break
        pieces.append(piece)
    return "".join(pieces)
