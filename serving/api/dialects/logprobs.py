"""Probabilities of tokens in OpenAI's form: the parameters `logprobs` and `top_logprobs`, and the field of a choice."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from serving.api.dialects.json_codec import quote
from serving.api.dialects.parameters import boolean, integer
from serving.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from serving.types import Sampling, TokenLogprob

MAX_TOP_LOGPROBS = 20
"""Most alternatives of each token, as of OpenAI and of vLLM's default."""

MAX_REPORTED = 32_768
"""Most probabilities of one caption, its tokens and their alternatives together. vLLM and a response that is
not streamed keep all of them until the end, at some hundred bytes each."""

_LINE_TOKENS = 16
"""Most tokens whose alternatives are in one line of a stream, so that each line is short enough for every client."""


def requested_logprobs(values: Mapping[str, Any]) -> int | None:
    """Return the number of alternatives of each token, `None` without probabilities. Raises `InvalidRequest`."""
    number = integer(values, "top_logprobs")
    if number is not None and not 0 <= number <= MAX_TOP_LOGPROBS:
        raise InvalidRequest(f"Range of top_logprobs should be [0, {MAX_TOP_LOGPROBS}]", param="top_logprobs")
    switch = values.get("logprobs")
    if not (type(switch) is int and switch == 0) and boolean(values, "logprobs"):
        return number or 0
    if number:
        raise InvalidRequest("'top_logprobs' needs 'logprobs' to be true", param="top_logprobs")
    return None


def with_logprobs(sampling: Sampling, logprobs: int | None) -> Sampling:
    """Return `sampling` with probabilities, if requested, and `max_tokens` within what their memory allows."""
    if logprobs is None:
        return sampling
    return replace(sampling, logprobs=logprobs, max_tokens=min(sampling.max_tokens, MAX_REPORTED // (1 + logprobs)))


def render(tokens: Sequence[TokenLogprob]) -> str:
    """Return the field `logprobs` of a choice, as JSON."""
    content = ",".join(
        f'{{{_token(each.text, each.logprob)},"top_logprobs":['
        + ",".join(f"{{{_token(text, logprob)}}}" for text, logprob in each.top)
        + "]}"
        for each in tokens
    )
    return f'{{"content":[{content}],"refusal":null}}'


def render_list(tokens: Sequence[TokenLogprob]) -> str:
    """Return the field `logprobs` of a transcription, as JSON: tokens without alternatives."""
    return f"[{','.join(f'{{{_token(each.text, each.logprob)}}}' for each in tokens)}]"


def lines_of(tokens: Sequence[TokenLogprob]) -> Iterator[Sequence[TokenLogprob]]:
    """Split the tokens of a delta into parts that fit one line each."""
    for start in range(0, len(tokens), _LINE_TOKENS):
        yield tokens[start : start + _LINE_TOKENS]


def _token(text: str, logprob: float) -> str:
    encoded = ",".join(map(str, text.encode(errors="replace")))
    return f'"token":{quote(text)},"logprob":{logprob:.6g},"bytes":[{encoded}]'
