"""Parameters of vLLM's chat completions that are passed on to the engine, checked and within bounds.

The bounds keep one request's part in a step of the engine small, since the step generates for all tenants. The engine
alone knows the vocabulary, and checks token ids against it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from serving.api.dialects.parameters import boolean, integer, mapping, number
from serving.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from serving.types import Sampling

MAX_STOP_TOKENS = 16
"""Most `stop_token_ids`, as of `stop`."""

MAX_LOGIT_BIASES = 300
"""Most entries of `logit_bias`."""

MAX_ALLOWED_TOKENS = 1024
"""Most `allowed_token_ids`."""

MAX_BAD_WORDS = 32
"""Most `bad_words`. vLLM compares each with the end of the caption in Python, in every step."""

MAX_BAD_WORD_LENGTH = 64
"""Longest bad word in characters."""

MAX_BIAS = 100.0
_TOKEN_IDS = range(2**31)
_LONGEST_TOKEN_ID = len(str(_TOKEN_IDS[-1]))


def with_engine_parameters(sampling: Sampling, values: Mapping[str, Any]) -> Sampling:
    """Return `sampling` with the parameters of this module. Raises `InvalidRequest`."""
    stops = _token_ids(values, "stop_token_ids", MAX_STOP_TOKENS)
    return replace(
        sampling,
        stop_token_ids=tuple(dict.fromkeys((*sampling.stop_token_ids, *stops))),
        include_stop=boolean(values, "include_stop_str_in_output"),
        min_p=_min_p(values),
        min_tokens=_min_tokens(values, sampling.max_tokens),
        logit_bias=_logit_bias(values),
        allowed_token_ids=_allowed_token_ids(values),
        bad_words=_bad_words(values),
    )


def _min_p(values: Mapping[str, Any]) -> float:
    value = number(values, "min_p")
    if value is None:
        return 0.0
    if not 0 <= value <= 1:
        raise InvalidRequest("Range of min_p should be [0.0, 1.0]", param="min_p")
    return value


def _min_tokens(values: Mapping[str, Any], max_tokens: int) -> int:
    value = integer(values, "min_tokens")
    if value is None:
        return 0
    if not 0 <= value <= max_tokens:
        raise InvalidRequest(f"Range of min_tokens should be [0, {max_tokens}], up to max_tokens", param="min_tokens")
    return value


def _logit_bias(values: Mapping[str, Any]) -> tuple[tuple[int, float], ...]:
    biases = mapping(values, "logit_bias")
    if len(biases) > MAX_LOGIT_BIASES:
        raise InvalidRequest(f"At most {MAX_LOGIT_BIASES} entries of logit_bias are supported.", param="logit_bias")
    checked: dict[int, float] = {}
    for token, bias in biases.items():
        is_id = token.isascii() and token.isdigit() and len(token) <= _LONGEST_TOKEN_ID and int(token) in _TOKEN_IDS
        if not is_id:
            raise InvalidRequest("The keys of logit_bias should be token ids", param="logit_bias")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise InvalidRequest("The values of logit_bias should be numbers in [-100, 100]", param="logit_bias")
        checked[int(token)] = float(bias)
    return tuple(checked.items())


def _allowed_token_ids(values: Mapping[str, Any]) -> tuple[int, ...]:
    if values.get("allowed_token_ids") == []:
        raise InvalidRequest("'allowed_token_ids' must not be empty", param="allowed_token_ids")
    return _token_ids(values, "allowed_token_ids", MAX_ALLOWED_TOKENS)


def _token_ids(values: Mapping[str, Any], name: str, most: int) -> tuple[int, ...]:
    ids = _list(values, name, most)
    if any(isinstance(token, bool) or not isinstance(token, int) or token not in _TOKEN_IDS for token in ids):
        raise InvalidRequest(f"The elements of {name} should be token ids", param=name)
    return tuple(dict.fromkeys(ids))


def _bad_words(values: Mapping[str, Any]) -> tuple[str, ...]:
    words = _list(values, "bad_words", MAX_BAD_WORDS)
    # vLLM removes blanks at the beginning of a word, and fails on one of which nothing is left.
    if not all(isinstance(word, str) and word.strip() and len(word) <= MAX_BAD_WORD_LENGTH for word in words):
        raise InvalidRequest(
            f"The elements of bad_words should be words of 1 to {MAX_BAD_WORD_LENGTH} characters", param="bad_words"
        )
    return tuple(dict.fromkeys(words))


def _list(values: Mapping[str, Any], name: str, most: int) -> list[Any]:
    value = values.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise InvalidRequest(f"'{name}' must be List", param=name)
    if len(value) > most:
        raise InvalidRequest(f"At most {most} elements of {name} are supported.", param=name)
    return value
