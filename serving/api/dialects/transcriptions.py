"""OpenAI's transcriptions and translations (PROTOCOL 18): a form with a file in, the caption out, in five formats.

The text is a caption: the model describes audio, and does not write down speech word by word. `json` and `text` have
that of the whole clip; the formats with times (`verbose_json`, `srt`, `vtt`) have a timeline's, one for each segment.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from serving.api.dialects.base import lines, requested_guard, stopped_field
from serving.api.dialects.engine_parameters import with_engine_parameters
from serving.api.dialects.json_codec import quote
from serving.api.dialects.logprobs import lines_of, render_list, with_logprobs
from serving.api.dialects.model_card import requested_model
from serving.api.dialects.openai import OpenAICodec, error_event, requested_seed
from serving.api.dialects.parameters import boolean, sampling
from serving.api.multipart_form import read_form
from serving.errors import AudioEmpty, BodyTooLarge, InvalidRequest
from serving.timeline.captions import TimelineDelta
from serving.timeline.subtitles import srt, webvtt
from serving.types import CaptionRequest, FileAudio, TimelineOptions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from serving import errors
    from serving.api.dialects.base import HttpError
    from serving.config import Settings
    from serving.timeline.segments import Segment
    from serving.types import CaptionDelta, TokenLogprob, Usage

CONTENT_TYPES = {
    "json": "application/json",
    "verbose_json": "application/json",
    "text": "text/plain; charset=utf-8",
    "srt": "application/x-subrip; charset=utf-8",
    "vtt": "text/vtt; charset=utf-8",
}
"""Content type of each `response_format`."""

_STREAMED = ("json", "text")
_TIMED = ("verbose_json", "srt", "vtt")

_TYPED = frozenset({
    "stream",
    *("temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "max_completion_tokens"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty"),
})  # fmt: skip
"""Fields whose text is a JSON number or a Boolean; vLLM's transcriptions know all of them."""

HARMLESS = frozenset((
    *("language", "languages", "to_language", "prompt", "keywords", "hotwords"),
    *("chunking_strategy", "user", "stream_include_usage", "stream_continuous_usage_stats"),
))  # fmt: skip
"""Fields that are accepted and change nothing: captions are in English, and the model takes no instructions."""

REFUSED = {
    "known_speaker_names": "speakers are not distinguished",
    "known_speaker_references": "speakers are not distinguished",
    "vllm_xargs": "the engine has no extensions",
}
"""Fields that would change the answer and are not done, and why."""

NO_FILE = (
    "The form has no part with the name file. Send the audio as a file of a form, as in "
    "curl -F file=@clip.wav; audio by URL or base64 goes to /v1/chat/completions."
)
NO_FORM = (
    "The request must be a form: multipart/form-data with a boundary, which HTTP clients set, as in "
    "curl -F file=@clip.wav; JSON goes to /v1/chat/completions."
)

_JSON_SCALAR = re.compile(r"-?[0-9.eE+-]+|true|false", re.IGNORECASE)


class TranscriptionCodec:
    """`Codec` of `…/audio/transcriptions`, and with `task` "translate" of `…/audio/translations`."""

    dialect = "transcriptions"

    def __init__(self, settings: Settings, task: str = "transcribe") -> None:
        self._settings = settings
        self._task = task
        self._openai = OpenAICodec(settings)

    def decode_request(
        self, body: bytes, headers: Mapping[str, str], request_id: str
    ) -> tuple[CaptionRequest, TranscriptionReply]:
        """See `Codec`. The body is a form."""
        try:
            fields, file = read_form(body, headers.get("content-type", ""))
        except InvalidRequest as error:
            no_form = "multipart/form-data" not in headers.get("content-type", "")
            raise (InvalidRequest(NO_FORM) if no_form else error) from None
        values = _values(fields)
        model = requested_model(values, self._settings, required=False)
        form = values.get("response_format", "json")
        _refuse(values, form)
        basic = sampling(
            values,
            self._settings,
            length_names=("max_completion_tokens", "max_tokens"),
            seed=requested_seed(values),
            negative_top_k=True,
        )
        reports_tokens = bool(_chosen(values, "include"))
        stream = boolean(values, "stream")
        if stream and form not in _STREAMED:
            raise InvalidRequest(
                f"'stream' is not supported with the response_format {form}; use json or text.", param="stream"
            )
        request = CaptionRequest(
            request_id=request_id,
            model=model,
            audio=FileAudio(self._checked(file)),
            sampling=with_logprobs(
                with_engine_parameters(basic, {"min_p": values.get("min_p")}), 0 if reports_tokens else None
            ),
            guard=requested_guard(headers),
            timeline=TimelineOptions() if form in _TIMED else None,
        )
        return request, TranscriptionReply(
            form, self._task, basic.temperature, stream=stream, reports_tokens=reports_tokens
        )

    def error(self, error: errors.CaptionerError, request_id: str) -> HttpError:
        """See `Codec`."""
        return self._openai.error(error, request_id)

    def _checked(self, file: bytes | None) -> bytes:
        if file is None:
            raise InvalidRequest(NO_FILE, param="file")
        if not file:
            raise AudioEmpty
        limit = self._settings.max_transcription_bytes
        if len(file) > limit:
            raise BodyTooLarge(
                f"{BodyTooLarge.message} The file has {len(file)} bytes, and the limit is {limit}; "
                "larger files go by URL to /v1/chat/completions."
            )
        return file


@dataclass(slots=True)
class TranscriptionReply:
    """`Reply` in one of the formats of `CONTENT_TYPES`, or in `transcript.text.…` events."""

    form: str
    task: str
    temperature: float
    stream: bool
    reports_tokens: bool = False
    ended: bool = False
    _texts: list[str] = field(default_factory=list)
    _tokens: list[TokenLogprob] = field(default_factory=list)

    @property
    def content_type(self) -> str:
        """See `Reply`."""
        return CONTENT_TYPES[self.form]

    def full_body(self, text: str, last: CaptionDelta) -> bytes:
        """See `Reply`."""
        match self.form:
            case "text":
                return f"{text}\n".encode()
            case "srt":
                return srt(_segments(last)).encode()
            case "vtt":
                return webvtt(_segments(last)).encode()
            case "verbose_json":
                return self._verbose(last)
        return (
            f'{{"text":{quote(text)},{self._logprobs(last.logprobs)}{stopped_field(last)}"usage":{_usage(last.usage)}}}'
        ).encode("ascii")

    def event(self, delta: CaptionDelta) -> bytes:
        """See `Reply`."""
        if self.ended:
            return b""
        self._texts.append(delta.text)
        self._tokens += delta.logprobs
        events = [
            f'data: {{"type":"transcript.text.delta",{self._logprobs(tokens or ())}"delta":{quote(text or "")}}}\n\n'
            for text, tokens in zip_longest(lines(delta.text), lines_of(delta.logprobs))
        ]
        if delta.finish_reason is not None:
            self.ended = True
            events.append(
                f'data: {{"type":"transcript.text.done","text":{quote("".join(self._texts))},'
                f'{self._logprobs(self._tokens)}{stopped_field(delta)}"usage":{_usage(delta.usage)}}}\n\n'
                "data: [DONE]\n\n"
            )
        return "".join(events).encode("ascii")

    def error_event(self, error: errors.CaptionerError) -> bytes:
        """See `Reply`."""
        self.ended = True
        return error_event(error)

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> str:
        """Return the JSON member with the probabilities of tokens; empty unless they are requested."""
        return f'"logprobs":{render_list(tokens)},' if self.reports_tokens else ""

    def _verbose(self, last: CaptionDelta) -> bytes:
        """Render `verbose_json`. What no captioner knows of a segment has the value that readers take for good."""
        found = _segments(last)
        segments = ",".join(
            f'{{"id":{segment.index},"seek":0,"start":{segment.start_s:.3f},"end":{segment.end_s:.3f},'
            f'"text":{quote(segment.caption)},"tokens":[],"temperature":{self.temperature},"avg_logprob":0.0,'
            f'"compression_ratio":{_compression_ratio(segment.caption):.3f},"no_speech_prob":0.0}}'
            for segment in found
        )
        text = " ".join(segment.caption for segment in found if segment.caption)
        seconds = f"{found[-1].end_s if found else 0.0:.3f}"
        return (
            f'{{"task":"{self.task}","language":"english","duration":{seconds},"text":{quote(text)},'
            f'"segments":[{segments}],{stopped_field(last)}'
            f'"usage":{{"type":"duration","seconds":{seconds},{_tokens(last.usage)}}}}}'
        ).encode("ascii")


def _segments(last: CaptionDelta) -> Sequence[Segment]:
    """Return the segments of a timeline's last delta."""
    return last.segments if isinstance(last, TimelineDelta) else ()


def _values(fields: Mapping[str, list[str]]) -> dict[str, Any]:
    """Return the fields by name: the last value of each, numbers and Booleans as such, lists by names with `[]`."""
    values: dict[str, Any] = {}
    for key, texts in fields.items():
        name, bracket, _ = key.partition("[")
        if bracket:
            values[name] = [*values.get(name, ()), *filter(None, texts)]
        elif texts[-1]:
            values[name] = _scalar(texts[-1]) if name in _TYPED else texts[-1]
    return values


def _scalar(text: str) -> object:
    """Return the number or Boolean of a text; any other text unchanged, for the check of its type."""
    if not _JSON_SCALAR.fullmatch(text):
        return text
    try:
        return from_json(text.lower())
    except ValueError:
        return text


def _refuse(values: Mapping[str, Any], form: object) -> None:
    """Raise `InvalidRequest` for fields whose effect the caller would miss."""
    if not isinstance(form, str) or form not in CONTENT_TYPES:
        raise InvalidRequest(
            f"The response_format should be one of {', '.join(CONTENT_TYPES)}.", param="response_format"
        )
    for name, reason in REFUSED.items():
        if values.get(name):
            raise InvalidRequest(f"'{name}' is not supported: {reason}.", param=name)
    for name, known, reason in (
        ("timestamp_granularities", ("segment",), "captions have times of segments, and none of words"),
        ("include", ("logprobs",) if form == "json" else (), "it has logprobs alone, with the response_format json"),
    ):
        if any(item not in known for item in _chosen(values, name)):
            raise InvalidRequest(f"'{name}' is not supported with this value: {reason}.", param=name)


def _chosen(values: Mapping[str, Any], name: str) -> Sequence[str]:
    """Return the items of a list, which some clients write as one field without brackets."""
    chosen = values.get(name) or ()
    return (chosen,) if isinstance(chosen, str) else chosen


def _tokens(usage: Usage) -> str:
    return (
        f'"input_tokens":{usage.input_tokens},"output_tokens":{usage.output_tokens},'
        f'"total_tokens":{usage.total_tokens},'
        f'"input_token_details":{{"audio_tokens":{usage.audio_tokens},"text_tokens":{usage.text_tokens}}}'
    )


def _usage(usage: Usage) -> str:
    return f'{{"type":"tokens",{_tokens(usage)}}}'


def _compression_ratio(text: str) -> float:
    """Return the ratio by which readers of transcriptions recognise repetitions (above 2.4)."""
    data = text.encode()
    return len(data) / len(zlib.compress(data)) if data else 0.0
