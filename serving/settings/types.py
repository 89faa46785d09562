"""Types and markers of settings: sizes in bytes, lists of words, examples."""

from __future__ import annotations

import ipaddress
import json
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, SecretStr
from pydantic_settings import NoDecode

METRICS_PORTS = 32
"""Number of ports from `metrics_port` on that are tried: processes that share a machine or a pod use one each."""

MIB = 1024 * 1024

_SIZE_UNITS = {"KiB": 1024, "MiB": MIB, "GiB": 1024 * MIB}


@dataclass(frozen=True, slots=True)
class Example:
    """Marker: a value for the example file, of a setting whose default is unset or depends on the machine."""

    value: str | int | bool | dict[str, str]


class Size:
    """Marker: a number of bytes that people write as `10MiB`."""


class Table:
    """Marker: a table of names and values, of which some may be secrets."""


def parse_size(value: object) -> object:
    """Convert `10MiB`, `512 KiB` or `1.5GiB` to bytes; return anything else unchanged. Raises `ValueError`."""
    if not isinstance(value, str) or not (found := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMG]iB)", value.strip())):
        return value
    number = Decimal(found[1]) * _SIZE_UNITS[found[2]]
    if number != int(number):
        raise ValueError(f"{value} is not a whole number of bytes")
    return int(number)


def size_text(number: int) -> str:
    """Format bytes in the largest unit that divides them: `10MiB`, or `10485759`."""
    for unit, factor in reversed(_SIZE_UNITS.items()):
        if number and number % factor == 0:
            return f"{number // factor}{unit}"
    return str(number)


def split(value: object) -> object:
    """Split `a,b c` into a tuple, as people write a list in a variable; return anything else unchanged."""
    return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value


def check_networks(words: tuple[str, ...]) -> tuple[str, ...]:
    """Return the words if each is an address or a network (`10.0.0.0/8`). Raises `ValueError`."""
    for word in words:
        ipaddress.ip_network(word, strict=False)
    return words


def check_origins(words: tuple[str, ...]) -> tuple[str, ...]:
    """Return the words if each is an origin (`https://app.example.com`), or `*`. Raises `ValueError`."""
    for word in words:
        if word != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s?#@A-Z]+", word):
            raise ValueError(f"{word} is not an origin such as https://app.example.com, without a path")
    return words


def read_table(value: object) -> object:
    """Return the table of a JSON text, as a variable or a flag has it; return anything else unchanged.

    Raises `ValueError`, without any part of the text.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise ValueError("not JSON") from None


Bytes = Annotated[int, BeforeValidator(parse_size), Size()]
Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(split)]
Networks = Annotated[Words, AfterValidator(check_networks)]
WebOrigins = Annotated[Words, AfterValidator(check_origins)]
Numbers = Annotated[tuple[int, ...], NoDecode, BeforeValidator(split)]
Secrets = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(split)]
AnyTable = Annotated[dict[str, Any], NoDecode, BeforeValidator(read_table), Table()]
