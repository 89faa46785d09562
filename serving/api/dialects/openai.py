"""The OpenAI-compatible dialect: chat completions (PROTOCOL 5), its errors (9) and its model list (11)."""

from __future__ import annotations

import time
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from serving import errors
from serving.api.dialects.audio_reference import audio_source
from serving.api.dialects.base import STATUS, HttpError, error_headers, lines, nearest, requested_guard, stopped_field
from serving.api.dialects.engine_parameters import with_engine_parameters
from serving.api.dialects.json_codec import parse_object, quote
from serving.api.dialects.logprobs import lines_of, render, requested_logprobs, with_logprobs
from serving.api.dialects.messages import only_audio
from serving.api.dialects.model_card import CREATED, check_served, model_card, requested_model, served_names
from serving.api.dialects.parameter_table import refuse
from serving.api.dialects.parameters import boolean, integer, mapping, refuse_unsupported, sampling
from serving.api.dialects.timeline import stream_parts, timeline_member, timeline_options
from serving.errors import InvalidRequest
from serving.types import CaptionRequest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from serving.config import Settings
    from serving.types import CaptionDelta, Usage

MAX_SEED = 2**31 - 1

_TYPE_AND_CODE: dict[type[errors.CaptionerError], tuple[str, str | None]] = {
    errors.ClientError: ("invalid_request_error", "invalid_parameter_error"),
    errors.MissingModel: ("invalid_request_error", None),
    errors.BodyTooLarge: ("invalid_request_error", "request_too_large"),
    errors.ModelNotFound: ("invalid_request_error", "model_not_found"),
    errors.NotFound: ("invalid_request_error", "not_found"),
    errors.IdempotencyConflict: ("invalid_request_error", "idempotency_conflict"),
    errors.MethodNotAllowed: ("invalid_request_error", "method_not_allowed"),
    errors.AsyncNotSupported: ("access_denied", "access_denied"),
    errors.UnsupportedOperation: ("invalid_request_error", "unsupported_operation"),
    errors.Unauthenticated: ("invalid_request_error", "invalid_api_key"),
    errors.AccessDenied: ("access_denied", "access_denied"),
    errors.FreeTierExhausted: ("AllocationQuota.FreeTierOnly", "AllocationQuota.FreeTierOnly"),
    errors.Arrearage: ("Arrearage", "Arrearage"),
    errors.RateLimited: ("limit_requests", "limit_requests"),
    errors.BurstLimited: ("limit_burst_rate", "limit_burst_rate"),
    errors.TokensLimited: ("insufficient_quota", "insufficient_quota"),
    errors.BudgetExhausted: ("insufficient_quota", "insufficient_quota"),
    errors.SourceUnavailable: ("service_unavailable", "service_unavailable"),
    errors.CaptionerError: ("internal_error", "internal_error"),
    errors.NotReady: ("service_unavailable", "model_unavailable"),
    errors.Overloaded: ("service_unavailable", "service_unavailable"),
    errors.StorageUnavailable: ("service_unavailable", "service_unavailable"),
    errors.DeadlineExceeded: ("request_timeout", "request_timeout"),
}

_MESSAGE: dict[type[errors.CaptionerError], str | None] = {
    errors.MissingModel: "you must provide a model parameter.",
    errors.Unauthenticated: "Incorrect API key provided.",
    errors.CaptionerError: None,
}
"""Messages that differ in this dialect; `None` keeps the error's own."""


class OpenAICodec:
    """`Codec` of `/v1/chat/completions`."""

    dialect = "openai"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def decode_request(
        self, body: bytes, headers: Mapping[str, str], request_id: str
    ) -> tuple[CaptionRequest, OpenAIReply]:
        """See `Codec`."""
        values = parse_object(body)
        model = requested_model(values, self._settings, required=False)
        refuse_unsupported(values, model)
        refuse(values)
        stream = boolean(values, "stream")
        include_usage = stream and boolean(mapping(values, "stream_options"), "include_usage")
        lengths = ("max_completion_tokens", "max_tokens")
        logprobs, timeline = requested_logprobs(values), timeline_options(values)
        if logprobs is not None and timeline is not None:
            raise errors.InvalidRequest("logprobs cannot be combined with timeline: omit one.", param="logprobs")
        basic = sampling(values, self._settings, length_names=lengths, seed=requested_seed(values), negative_top_k=True)
        request = CaptionRequest(
            request_id=request_id,
            model=model,
            audio=audio_source(only_audio(_messages(values)), headers, self._settings, files=True),
            sampling=with_logprobs(with_engine_parameters(basic, values), logprobs),
            guard=requested_guard(headers),
            timeline=timeline,
        )
        return request, OpenAIReply(
            request_id, model, stream=stream, include_usage=include_usage, logprobs=logprobs is not None
        )

    def error(self, error: errors.CaptionerError, request_id: str) -> HttpError:
        """See `Codec`."""
        body = f'{{"error":{_error_object(error)},"request_id":{quote(request_id)}}}'
        return HttpError(nearest(STATUS, error), body.encode("ascii"), error_headers(error, request_id))


class OpenAIReply:
    """`Reply` in chunks of `chat.completion.chunk`, or one `chat.completion`."""

    content_type = "application/json"

    def __init__(
        self, request_id: str, model: str, *, stream: bool, include_usage: bool, logprobs: bool = False
    ) -> None:
        self._logprobs = logprobs
        self.stream = stream
        self.ended = False
        self._started = False
        self._include_usage = include_usage
        self._model = quote(model)
        self._id = quote(f"chatcmpl-{request_id}")
        self._created = int(time.time())
        self._after_text = f'}},"index":0,"logprobs":null,"finish_reason":null}}],{self._rest("null")}'
        self._end_of_text = f',"finish_reason":null}}],{self._rest("null")}'

    def full_body(self, text: str, last: CaptionDelta) -> bytes:
        """See `Reply`."""
        return (
            f'{{"choices":[{{"message":{{"content":{quote(text)},"role":"assistant"{timeline_member(last)}}},'
            f'"finish_reason":"{last.finish_reason}","index":0,'
            f'"logprobs":{render(last.logprobs) if self._logprobs else "null"}}}],"object":"chat.completion",'
            f'"created":{self._created},"model":{self._model},"system_fingerprint":null,"id":{self._id},'
            f'{stopped_field(last)}"usage":{_usage(last.usage)}}}'
        ).encode("ascii")

    def event(self, delta: CaptionDelta) -> bytes:
        """See `Reply`."""
        if self.ended:
            return b""
        chunks = []
        if not self._started:
            self._started = True
            chunks.append(f'data: {{"choices":[{{"delta":{{"content":"","role":"assistant"{self._after_text}')
        if self._logprobs:
            chunks += self._with_logprobs(delta)
        else:
            chunks += [
                f'data: {{"choices":[{{"delta":{{"content":{quote(text)}{timeline}{self._after_text}'
                for text, timeline in stream_parts(delta)
            ]
        if delta.finish_reason is not None:
            self.ended = True
            chunks.append(
                f'data: {{"choices":[{{"delta":{{"content":""}},"index":0,"logprobs":null,'
                f'"finish_reason":"{delta.finish_reason}"}}],{stopped_field(delta)}{self._rest("null")}'
            )
            if self._include_usage:
                chunks.append(f'data: {{"choices":[],{self._rest(_usage(delta.usage))}')
            chunks.append("data: [DONE]\n\n")
        return "".join(chunks).encode("ascii")

    def error_event(self, error: errors.CaptionerError) -> bytes:
        """See `Reply`."""
        self.ended = True
        return error_event(error)

    def _with_logprobs(self, delta: CaptionDelta) -> Iterator[str]:
        """Yield chunks with a delta's text, or its next line, and the probabilities of some of its tokens."""
        for text, tokens in zip_longest(lines(delta.text), lines_of(delta.logprobs)):
            yield (
                f'data: {{"choices":[{{"delta":{{"content":{quote(text or "")}}},"index":0,'
                f'"logprobs":{render(tokens or ())}{self._end_of_text}'
            )

    def _rest(self, usage: str) -> str:
        return (
            f'"object":"chat.completion.chunk","usage":{usage},"created":{self._created},"system_fingerprint":null,'
            f'"model":{self._model},"id":{self._id}}}\n\n'
        )


def error_event(error: errors.CaptionerError) -> bytes:
    """Render the SSE event that ends a stream with an error."""
    return f'data: {{"error":{_error_object(error)}}}\n\n'.encode("ascii")


def models_page(settings: Settings) -> bytes:
    """Render the response to `GET …/v1/models`."""
    models = ",".join(_model_object(settings, name) for name in served_names(settings))
    return f'{{"object":"list","data":[{models}]}}'.encode("ascii")


def model(settings: Settings, name: str) -> bytes:
    """Render the response to `GET …/v1/models/{name}`. Raises `ModelNotFound`."""
    check_served(settings, name)
    return _model_object(settings, name).encode("ascii")


def _model_object(settings: Settings, name: str) -> str:
    card = model_card(settings)
    description = f',"description":{quote(card.description)}' if card.owner else ""
    return (
        f'{{"id":{quote(name)},"object":"model","created":{CREATED},'
        f'"owned_by":{quote(card.owner or "system")}{description}}}'
    )


def _messages(values: Mapping[str, Any]) -> list[Any]:
    messages = values.get("messages")
    if messages is None or messages == []:
        raise InvalidRequest("[] is too short - 'messages'", param="messages")
    if not isinstance(messages, list):
        raise InvalidRequest("'messages' must be List", param="messages")
    return messages


def requested_seed(values: Mapping[str, Any]) -> int | None:
    """Return the seed, within this dialect's range. Raises `InvalidRequest`."""
    seed = integer(values, "seed")
    if seed is None or 0 <= seed <= MAX_SEED:
        return seed
    if seed < 0:
        raise InvalidRequest(f"{str(seed)[:32]} is lesser than the minimum of 0 - 'seed'", param="seed")  # sic
    raise InvalidRequest(f"{str(seed)[:32]} is greater than the maximum of {MAX_SEED} - 'seed'", param="seed")


def _usage(usage: Usage) -> str:
    return (
        f'{{"prompt_tokens":{usage.input_tokens},"completion_tokens":{usage.output_tokens},'
        f'"total_tokens":{usage.total_tokens},'
        f'"prompt_tokens_details":{{"audio_tokens":{usage.audio_tokens},"text_tokens":{usage.text_tokens},'
        f'"cached_tokens":0}},"completion_tokens_details":{{"text_tokens":{usage.output_tokens}}}}}'
    )


def _error_object(error: errors.CaptionerError) -> str:
    type_, code = nearest(_TYPE_AND_CODE, error)
    param = error.param if isinstance(error, InvalidRequest) else None
    return (
        f'{{"message":{quote(nearest(_MESSAGE, error) or str(error))},"type":"{type_}",'
        f'"param":{_optional(param)},"code":{_optional(code)}}}'
    )


def _optional(text: str | None) -> str:
    return "null" if text is None else quote(text)
