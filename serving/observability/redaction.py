"""Redaction of log lines: keys, tokens, passwords, cookies, signatures of URLs, and audio.

A line is any text: JSON, or text with Python's representations of headers and dictionaries. Values stop before a
quote or a backslash, so that JSON stays JSON. Each rule runs only on a line that has one of its markers; few have one.
"""

from __future__ import annotations

import re
from typing import NamedTuple

HIDDEN = "[redacted]"

_NAMES = r"""(?i:
    (?:api|access|secret|private|subscription|account|shared|auth)[-_]?key(?:[-_]?id)?
    | (?:oss|aws|google)access(?:key)?id | key[-_]pair[-_]id
    | token | secret | password | passwd | passphrase | pwd | signature | sig | jwt | assertion | credential
)"""
"""Ends of names whose values are secrets wherever they are."""

_NAME_MARKERS = (
    *("key", "accessid", "pair", "secret", "passw", "passphrase", "pwd", "sig", "jwt", "assertion", "credential"),
    *(f"token{after}" for after in "\"'\\:=% "),  # not `tokens`, which most lines count
)

_QUERY_NAMES = r"""(?i:
    [\w-]*(?:key|auth|authorization|policy|session|cookie) | (?:auth[-_]?)?code | sid
)"""
"""Names whose values are secrets in the query of a URL; in a log line `code` is the code of an error."""

_EQUALS = r"(?:=|%3[Dd])"
_VALUE = r"(?!\[redacted\])[^\s\"'\\&;,)}\]]+?(?=%26|[\s\"'\\&;,)}\]]|$)"


class _Rule(NamedTuple):
    """A pattern, and the texts (lower case) of which a line has at least one if the pattern matches.

    The group of the pattern, if it has one, is kept.
    """

    markers: tuple[str, ...]
    pattern: re.Pattern[str]


def _rule(pattern: str, *markers: str) -> _Rule:
    return _Rule(markers, re.compile(pattern, re.VERBOSE))


_RULES = (
    _rule(r"\bsk-[\w-]{4,}", "sk-"),
    _rule(r"\beyJ[\w-]{8,}\.[\w-]+(?:\.[\w-]*)?", "eyj"),  # a JSON web token
    _rule(r"((?i:\bbearer)\s+)[^\s\"'\\,]+", "bearer"),
    # Base64 of user name and password. Words of prose have no upper case after their first letter.
    _rule(r"((?i:\bbasic)\s+)[\w+/-](?=[\w+/-]*[A-Z0-9+/=])[\w+/=-]{3,}", "basic"),
    # A header, up to the end of the line or string; in JSON, and in Python's dictionaries and tuples.
    _rule(
        r"""((?i:\b(?:proxy-)?authorization | \b(?:set-)?cookie2?)
            (?:["'\\]+\s*[:=,]\s*[\[(]?b?["'\\]+ | \s*[:=]\s*b?["'\\]*))(?!\[redacted\])[^\s"'\\][^"'\\\r\n]*""",
        "authorization",
        "cookie",
    ),
    # User name and password, or a token in their place; also in a URL within a URL.
    _rule(r"(?<=://)[^\s/?\#\"'\\<>]+(?=@)", "@"),
    _rule(r"(?i:(?<=%3A%2F%2F)(?:(?!%2F)[^\s&\"'\\])+(?=%40))", "%40"),
    # A name and its quoted value, which may have blanks; then a name and a plain value.
    _rule(
        rf"""({_NAMES}["'\\]+\s*[:=,]\s*[\[(]?b?["'\\]+)(?!\[redacted\])[^"'\\\r\n]+""",
        *_NAME_MARKERS,
    ),
    _rule(
        rf"({_NAMES}\s*(?:[:=]|%3[Dd])\s*){_VALUE}",
        *_NAME_MARKERS,
    ),
    _rule(
        rf"((?:[?&;\#]|%3[Ff]|%26|\\u0026)(?:amp;)?{_QUERY_NAMES}{_EQUALS}){_VALUE}",
        *("?", "&", "%3f", "%26", "\\u0026"),
    ),
    _rule(rf"((?<![\w-])(?i:auth)=){_VALUE}", "auth="),
    _rule(rf"((?<![\w-])(?i:code)=){_VALUE}(?=&)", "code="),
    _rule(r"\bdata:[^\s\"',]{0,99},[^\s\"'\\]{8,}", "data:"),  # audio in a URL
    _rule(r"(?<![A-Za-z0-9+/_-])[A-Za-z0-9+/_-]{256,}={0,2}", ""),  # bare audio in base64
)


def redact(text: str) -> str:
    """Return the text with secrets and audio replaced by `[redacted]`; names of parameters and headers stay."""
    lowered = text.lower()
    for markers, pattern in _RULES:
        if any(marker in lowered for marker in markers):
            text = pattern.sub(_hide, text)
    return text


def _hide(match: re.Match[str]) -> str:
    return f"{match[1]}{HIDDEN}" if match.re.groups else HIDDEN
