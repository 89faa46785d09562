"""Kinds of parameters of administration verbs: parsers of words, of JSON values, and their bounds."""

from __future__ import annotations

import datetime as dt
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serving.tenancy.billing import reports

if TYPE_CHECKING:
    from collections.abc import Callable

_LAST_DAY = dt.date(9998, 12, 31)
"""A year of room before the last day of Python's calendar, for what is added to a day."""

_END_MS = 253_370_764_800_000
"""The end of `_LAST_DAY`, in milliseconds since the epoch."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of values. Both parsers raise `ValueError` for a value that is not as `phrase` says.

    `from_words`: from one word of a command line or a query; `from_json`: from a field of a JSON object.
    """

    phrase: str
    from_words: Callable[[str], Any]
    from_json: Callable[[Any], Any]


def _accept(value: Any, *, valid: bool) -> Any:
    if not valid:
        raise ValueError(value)
    return value


def _text(value: Any) -> Any:
    return _accept(value, valid=isinstance(value, str) and "\0" not in value)


def _whole(value: Any) -> Any:
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        return int(value)
    return _accept(value, valid=isinstance(value, int) and not isinstance(value, bool))


def _seconds(value: Any) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return _accept(value, valid=number and math.isfinite(value))


def _amount(value: Any) -> Any:
    return _accept(value, valid=isinstance(value, (str, int, float)) and not isinstance(value, bool))


def _truth(value: Any) -> Any:
    return _accept(value, valid=isinstance(value, bool))


def _limits(value: Any) -> Any:
    return _accept(value, valid=isinstance(value, dict))


def _moment(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return _accept(value, valid=whole and 0 <= value < _END_MS)


def _day(word: str) -> dt.date:
    _accept(word, valid=re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", word) is not None)
    day = dt.date.fromisoformat(word)
    _accept(word, valid=day <= _LAST_DAY)
    return day


def _midnight(word: str) -> Any:
    """Return the first moment of a day (UTC), in milliseconds since the epoch."""
    return _moment(int(dt.datetime.combine(_day(word), dt.time(), dt.UTC).timestamp() * 1000))


def _month(word: str) -> str:
    _day(f"{word}-01")
    return word


def _groups(word: str) -> tuple[str, ...]:
    names = tuple(word.split(","))
    _accept(word, valid=set(names) <= set(reports.GROUPS) and len(set(names)) == len(names))
    return names


def _no_json(value: Any) -> Any:
    """Refuse: values of this kind are words of a query."""
    return _accept(value, valid=False)


TEXT = Kind("a text", _text, _text)
WHOLE = Kind("a whole number", int, _whole)
AMOUNT = Kind("a number", _text, _amount)
TRUTH = Kind("true or false", _text, _truth)
LIMITS = Kind("limits by name", _text, _limits)
HOURS = Kind("a number of seconds", lambda word: _seconds(float(word) * 3600), _seconds)
"""A duration: hours on the command line, seconds in JSON and in the function."""
MOMENT = Kind("milliseconds since the epoch, until the year 9998", _midnight, _moment)
"""A moment: its day (UTC) on the command line, milliseconds since the epoch in JSON and in the function."""
DAY = Kind("a day from 0001-01-01 to 9998-12-31, such as 2026-11-01", _day, _no_json)
MONTH = Kind("a month from 0001-01 to 9998-12, such as 2026-11", _month, _no_json)
GROUPS = Kind(f"some of {', '.join(reports.GROUPS)}", _groups, _no_json)
