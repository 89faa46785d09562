"""JSON decoding with bounded work, and JSON encoding as ASCII.

Decoding accepts standard JSON only. Encoding escapes all other characters, so that a text with U+2028, U+2029 or U+0085
stays one line for every client's SSE parser (PROTOCOL 2.11).
"""

from __future__ import annotations

from json.encoder import encode_basestring_ascii
from typing import Any

from pydantic_core import from_json

from serving.errors import InvalidRequest, TooManyValues

MAX_VALUES = 50_000
"""Most `[`, `{`, `,` and `:` outside strings, which bounds containers, keys and values of every kind together. No real
request has more than some hundreds. The parser holds the interpreter for 6 ms with 50,000 nested lists; 1 MiB of them,
without the bound, for 0.2 s, and 16 MiB for several seconds."""

_CHUNK_BYTES = 64 * 1024
"""Bytes that one step of the count reads: about 0.1 ms, after which another thread may run."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_OTHER_KINDS = (
    (b"\x1f\x8b", "gzip; send the header content-encoding: gzip with it"),
    (b"\xff\xfe", "UTF-16; JSON is UTF-8"),
    (b"\xfe\xff", "UTF-16; JSON is UTF-8"),
    (b"--", "a form; forms with a file go to /v1/audio/transcriptions"),
    (b"RIFF", "a file; files go as a form to /v1/audio/transcriptions"),
    (b"ID3", "a file; files go as a form to /v1/audio/transcriptions"),
)
"""First bytes of what clients send in place of JSON."""

_QUOTE = b'"'
_OTHERS = bytes(set(range(256)) - set(b"[{,:" + _QUOTE))

quote = encode_basestring_ascii
"""Encode a text as a JSON string, quotes included; astral characters become surrogate pairs."""


def parse_object(body: bytes) -> dict[str, Any]:
    """Decode a JSON object, with or without a byte order mark. If a key is repeated, its last value counts.

    A 10 MB base64 string costs about a millisecond (`orjson.loads`: ten), 16 MiB of escapes, of non-ASCII text or of
    numbers of 4,000 digits about 0.1 s, during which no other thread runs. Raises `TooManyValues` for more than
    `MAX_VALUES`, before anything is parsed, and `InvalidRequest` if `body` is not JSON, not UTF-8, not an object, or
    nested too deeply.
    """
    body = body.removeprefix(_BYTE_ORDER_MARK)
    check_values(body)
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest.because(_reason(body, error)) from None
    if not isinstance(value, dict):
        raise InvalidRequest.because("It is not a JSON object.")
    return value


def _reason(body: bytes, error: ValueError) -> str:
    """Return the reason why a body is not JSON, with the position; the parser's texts quote nothing of the body."""
    if not body.strip():
        return "It is empty."
    for beginning, kind in _OTHER_KINDS:
        if body.startswith(beginning):
            return f"It is {kind}."
    return f"It is not JSON: {error}."


def check_values(body: bytes) -> None:
    """Raise `TooManyValues` if a JSON text has more than `MAX_VALUES` structural characters outside strings.

    Strings are skipped only if there are too many in all, so that base64 costs 1 ms for each MB, and a long text with
    commas, which is accepted, 3 to 10 ms. After each chunk another thread may run.
    """
    if _structure(body) > MAX_VALUES and _structure_outside_strings(body) > MAX_VALUES:
        raise TooManyValues.because(f"It has more than {MAX_VALUES} values.")


def _structure(body: bytes) -> int:
    """Count structural characters, those in strings included; stop above `MAX_VALUES`."""
    count = 0
    for start in range(0, len(body), _CHUNK_BYTES):
        count += len(body[start : start + _CHUNK_BYTES].translate(None, _OTHERS + _QUOTE))
        if count > MAX_VALUES:
            break
    return count


def _structure_outside_strings(body: bytes) -> int:
    """Count structural characters outside strings, or strings if there are more; stop above `MAX_VALUES`.

    Two strings have a structural character between them, or the text is not JSON.
    """
    count = strings = start = 0
    inside = False
    while start < len(body) and max(count, strings) <= MAX_VALUES:
        chunk = body[start : start + _CHUNK_BYTES]
        if (len(chunk) - len(chunk.rstrip(b"\\"))) % 2:
            chunk = body[start : start + _CHUNK_BYTES + 1]  # an escape is in one chunk
        start += len(chunk)
        pieces = chunk.replace(rb"\\", b"").replace(rb"\"", b"").translate(None, _OTHERS).split(_QUOTE)
        count += sum(map(len, pieces[inside::2]))
        strings += len(pieces) // 2
        inside ^= len(pieces) % 2 == 0
    return max(count, strings)
