"""JSON as it comes in and as it goes out.

In: the standard, strictly, with bounded work. Out: ASCII only, so that a text with U+2028, U+2029 or U+0085 stays one
line for every client's event parser (PROTOCOL 2.11).
"""

from __future__ import annotations

from json.encoder import encode_basestring_ascii
from typing import Any

from pydantic_core import from_json

from serving.errors import InvalidRequest

MAX_COMMAS = 100_000
"""More than any request needs; fewer than it takes to stall the event loop with millions of tiny values."""

quote = encode_basestring_ascii
"""A text as a JSON string, quotes included; astral characters become surrogate pairs."""


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object that `body` is. Of repeated keys the last counts.

    A 10 MB base64 string costs about a millisecond (`orjson.loads`: ten). Raises `InvalidRequest` for anything else:
    not JSON, not UTF-8, not an object, nested or crowded past reason.
    """
    if body.count(b",") > MAX_COMMAS:
        raise InvalidRequest
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError:
        raise InvalidRequest from None
    if not isinstance(value, dict):
        raise InvalidRequest
    return value
