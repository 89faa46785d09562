"""Parameters that both dialects share: decoding, ranges and the manual's texts (PROTOCOL 8).

A parameter that is absent or null has its default, except `top_k`, where null means off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from serving.errors import InvalidRequest
from serving.types import Sampling

if TYPE_CHECKING:
    from collections.abc import Mapping

    from serving.config import Settings

MAX_TOKENS = 32_768
MAX_TOP_K = 100
MAX_N = 4

MAX_STOPS = 16
MAX_STOP_LENGTH = 256
"""Longest stop, in characters or tokens. Every stop is searched at every token: number and length are bounded."""

REPETITION_PENALTY_RANGE = (1e-6, 1e6)
"""Range to which the penalty is clamped, not refused: values beyond it change nothing and overflow float32 in the
engine."""

DEFAULTS = Sampling()

STOP_TYPE = (
    'The "stop" parameter must be of type "str", "list[str]", "list[int]", or "list[list[int]]", and all elements '
    "within the list must be of the same type."
)


def boolean(values: Mapping[str, Any], name: str) -> bool:
    """Return the flag, `False` if absent. Raises `InvalidRequest`."""
    value = values.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise InvalidRequest(f"'{name}' must be Boolean", param=name)
    return value


def integer(values: Mapping[str, Any], name: str) -> int | None:
    """Return the integer, of any size, `None` if absent. Raises `InvalidRequest`."""
    value = values.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise InvalidRequest(f"'{name}' must be Integer", param=name)
    return value


def number(values: Mapping[str, Any], name: str) -> float | None:
    """Return the number, infinite if too large for a float, `None` if absent. Raises `InvalidRequest`."""
    value = values.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"'{name}' must be Float", param=name)
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def mapping(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the object, empty if absent. Raises `InvalidRequest`."""
    value = values.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidRequest(f"'{name}' must be Object", param=name)
    return value


def refuse_unsupported(values: Mapping[str, Any], model: str) -> None:
    """Raise `InvalidRequest` for parameters that request anything but one plain text.

    They are refused rather than ignored, since the caller would not receive what it requested.
    """
    n = integer(values, "n")
    if n is not None and not 1 <= n <= MAX_N:
        raise InvalidRequest(f"Range of n should be [1, {MAX_N}]", param="n")
    if n is not None and n > 1:
        raise InvalidRequest("This model only supports n=1.", param="n")
    for name in ("tools", "functions"):
        if values.get(name):
            raise InvalidRequest("The tool call is not supported.", param=name)
    if boolean(values, "enable_thinking"):
        raise InvalidRequest(f"The model {model} does not support enable_thinking.", param="enable_thinking")
    if boolean(values, "enable_search"):
        raise InvalidRequest("This model does not support enable_search.", param="enable_search")
    modalities = values.get("modalities")
    if modalities is not None and modalities != ["text"]:
        raise InvalidRequest('This model only supports modalities=["text"].', param="modalities")
    if mapping(values, "response_format").get("type", "text") != "text":
        raise InvalidRequest(
            "This model only supports the response_format of type text.",
            param="response_format",
        )


def sampling(
    values: Mapping[str, Any],
    settings: Settings,
    *,
    length_names: tuple[str, ...],
    seed: int | None,
    negative_top_k: bool = False,
) -> Sampling:
    """Return the sampling parameters.

    `length_names` are the dialect's names of `max_tokens`; if several are given, the smallest value counts. With
    `negative_top_k` a `top_k` of -1 means off, as in vLLM.

    Raises `InvalidRequest`.
    """
    stop, stop_token_ids, stop_token_sequences = _stops(values.get("stop"))
    ignore_eos = boolean(values, "ignore_eos")
    if ignore_eos and not settings.allow_ignore_eos:
        raise InvalidRequest("ignore_eos is not enabled on this server.", param="ignore_eos")
    return Sampling(
        temperature=_temperature(values, settings),
        top_p=_top_p(values),
        top_k=_top_k(values, least=-1 if negative_top_k else 0),
        max_tokens=_max_tokens(values, settings, length_names),
        seed=seed,
        stop=stop,
        stop_token_ids=stop_token_ids,
        stop_token_sequences=stop_token_sequences,
        presence_penalty=_penalty(values, "presence_penalty"),
        frequency_penalty=_penalty(values, "frequency_penalty"),
        repetition_penalty=_repetition_penalty(values),
        ignore_eos=ignore_eos,
    )


def _temperature(values: Mapping[str, Any], settings: Settings) -> float:
    value = number(values, "temperature")
    if value is None:
        return settings.default_temperature
    if not 0 <= value < 2:  # noqa: PLR2004
        raise InvalidRequest("Temperature should be in [0.0, 2.0)", param="temperature")
    return value


def _top_p(values: Mapping[str, Any]) -> float:
    value = number(values, "top_p")
    if value is None:
        return DEFAULTS.top_p
    if not 0 < value <= 1:
        raise InvalidRequest("Range of top_p should be (0.0, 1.0]", param="top_p")
    return value


def _top_k(values: Mapping[str, Any], *, least: int) -> int:
    if "top_k" not in values:
        return DEFAULTS.top_k
    value = integer(values, "top_k")
    if value is None:
        return 0
    if value < least:
        raise InvalidRequest("Parameter top_k be greater than or equal to 0", param="top_k")  # sic
    return value if 0 <= value <= MAX_TOP_K else 0


def _max_tokens(values: Mapping[str, Any], settings: Settings, names: tuple[str, ...]) -> int:
    limit = settings.max_output_tokens
    for name in names:
        value = integer(values, name)
        if value is None:
            continue
        if not 1 <= value <= MAX_TOKENS:
            raise InvalidRequest(f"Range of {name} should be [1, {MAX_TOKENS}]", param=name)
        limit = min(limit, value)
    return limit


def _penalty(values: Mapping[str, Any], name: str) -> float:
    value = number(values, name)
    if value is None:
        return 0.0
    if not -2 <= value <= 2:  # noqa: PLR2004
        raise InvalidRequest(f"{name.capitalize()} should be in [-2.0, 2.0]", param=name)
    return value


def _repetition_penalty(values: Mapping[str, Any]) -> float:
    value = number(values, "repetition_penalty")
    if value is None:
        return DEFAULTS.repetition_penalty
    if not value > 0:
        raise InvalidRequest("Repetition_penalty should be greater than 0.0", param="repetition_penalty")
    lowest, highest = REPETITION_PENALTY_RANGE
    return min(max(value, lowest), highest)


def _stops(value: object) -> tuple[tuple[str, ...], tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Return the texts, tokens and sequences of tokens that end a caption."""
    if isinstance(value, str):
        value = [value]
    if value is None or value == []:
        return (), (), ()
    if not isinstance(value, list):
        raise InvalidRequest(STOP_TYPE, param="stop")
    if len(value) > MAX_STOPS:
        raise InvalidRequest(f"At most {MAX_STOPS} stop sequences are supported.", param="stop")
    if all(isinstance(item, str) for item in value):
        for item in value:
            _check_stop_length(item)
        return tuple(value), (), ()
    if all(_is_token(item) for item in value):
        return (), tuple(value), ()
    if all(isinstance(item, list) and all(_is_token(token) for token in item) for item in value):
        for item in value:
            _check_stop_length(item)
        return (), (), tuple(tuple(item) for item in value)
    raise InvalidRequest(STOP_TYPE, param="stop")


def _is_token(item: object) -> bool:
    if isinstance(item, bool) or not isinstance(item, int):
        return False
    if not 0 <= item < 2**31:
        raise InvalidRequest("A token of stop should be in [0, 2147483647]", param="stop")
    return True


def _check_stop_length(item: str | list[int]) -> None:
    if not 1 <= len(item) <= MAX_STOP_LENGTH:
        raise InvalidRequest(f"The length of a stop sequence should be in [1, {MAX_STOP_LENGTH}]", param="stop")
