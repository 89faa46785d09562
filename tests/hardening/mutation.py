"""Damaged and odd inputs made from intact ones, by a random number generator: a seed makes the same input again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from random import Random

_ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    0.1,
    2**31,
    2**63 - 1,
    -(2**63),
    1e308,
    -0.0,
    "",
    " ",
    "\0",
    "\ufeff",
    "\u202e",
    "\U0001f600",
    "a" * 300,
    "1",
    "true",
    "stream",
    "http://[::1]/",
    "data:audio/wav;base64,",
    "data:,",
    "oss://",
    [],
    {},
    [None],
    [[]],
    [{}],
    {"": ""},
    {"type": "input_audio", "input_audio": {}},
    {"role": "user", "content": []},
)
"""Values that take the place of any part of a JSON document."""

_ODD_BYTES = (
    b"\0",
    b"\r\n",
    b"--",
    b'"',
    b"\\u",
    b"\\ud800",
    b"\xff",
    b"\xef\xbb\xbf",
    b"[[[[",
    b"{{",
    b"1e999",
    b"NaN",
    b"-",
)

_LARGEST = 1 << 20


def mutated(data: bytes, random: Random) -> bytes:
    """Return the data with one to four changes: by its structure where it is JSON, else by its bytes."""
    for _ in range(random.randint(1, 4)):
        if data[:1] in (b"{", b"[") and random.random() < 0.7:
            try:
                data = orjson.dumps(_changed(orjson.loads(data), random))
            except (orjson.JSONDecodeError, orjson.JSONEncodeError, RecursionError):
                data = _damaged(data, random)
        else:
            data = _damaged(data, random)
    return data[:_LARGEST]


def _changed(value: Any, random: Random) -> Any:
    """Return a JSON value of which one part is replaced, removed, repeated, renamed or nested."""
    if isinstance(value, dict | list) and value and random.random() < 0.85:
        return _changed_object(value, random) if isinstance(value, dict) else _changed_list(value, random)
    if isinstance(value, str) and value and random.random() < 0.5:
        return _damaged(value.encode(errors="replace"), random).decode(errors="replace")
    match random.randrange(4):
        case 0:
            return [value]
        case 1:
            return {random.choice(("text", "audio", "url", "data")): value}
        case _:
            return random.choice(_ODD_VALUES)


def _changed_object(value: dict[str, Any], random: Random) -> dict[str, Any]:
    key = random.choice(list(value))
    match random.randrange(8):
        case 0:
            return {name: each for name, each in value.items() if name != key}
        case 1:
            renamed = random.choice(("", key.upper(), key + " "))
            return {(renamed if name == key else name): each for name, each in value.items()}
        case 2:
            added = random.choice(("x", "stream", "stop", "parameters", "input", "audio"))
            return value | {added: random.choice(_ODD_VALUES)}
        case _:
            return value | {key: _changed(value[key], random)}


def _changed_list(value: list[Any], random: Random) -> list[Any]:
    index = random.randrange(len(value))
    match random.randrange(6):
        case 0:
            return value[:index] + value[index + 1 :]
        case 1:
            return value * random.choice((2, 50))
        case _:
            return [*value[:index], _changed(value[index], random), *value[index + 1 :]]


def _damaged(data: bytes, random: Random) -> bytes:
    """Return the data with bytes flipped, removed, repeated, inserted, blanked or exchanged."""
    if not data:
        return random.choice(_ODD_BYTES)
    begin = random.randrange(len(data))
    end = min(len(data), begin + random.choice((1, 2, 4, 16, 200, 5000)))
    match random.randrange(8):
        case 0:
            return data[:begin] + bytes([data[begin] ^ 1 << random.randrange(8)]) + data[begin + 1 :]
        case 1:
            return data[:begin] + data[end:]
        case 2:
            return data[:end] + data[begin:end] * random.choice((1, 3, 30)) + data[end:]
        case 3:
            return data[:begin] + random.choice(_ODD_BYTES) + data[begin:]
        case 4:
            return data[:begin] + bytes(end - begin) + data[end:]
        case 5:
            return data[:begin] + random.randbytes(end - begin) + data[end:]
        case 6:
            return data[:begin]
        case _:
            other = random.randrange(len(data))
            return data[:begin] + data[other : other + end - begin] + data[end:]
