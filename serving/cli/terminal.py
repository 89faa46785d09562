"""Lines for a person at a terminal: errors, similar words, and colours where there is a terminal."""

from __future__ import annotations

import difflib
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import TextIO

RED, YELLOW, BOLD, DIM = "31", "33", "1", "2"
"""Styles as parameters of the terminal's sequence "select graphic rendition"."""


def coloured(stream: TextIO) -> bool:
    """Return whether the stream is a terminal with colours, and NO_COLOR (no-color.org) is not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, style: str, stream: TextIO) -> str:
    """Return the text in a style if the stream shows colours, else as it is."""
    return f"\033[{style}m{text}\033[0m" if coloured(stream) else text


def fail(message: str, status: int = 2) -> int:
    """Print one line on standard error; return the exit status."""
    print(f"{paint('captioner:', RED, sys.stderr)} {message}", file=sys.stderr)  # noqa: T201
    return status


def note(message: str) -> None:
    """Print one line on standard error that reports no error."""
    print(f"{paint('captioner:', DIM, sys.stderr)} {message}", file=sys.stderr, flush=True)  # noqa: T201


def similar(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return ` (did you mean X?)` with the most similar of the known words, or nothing if none is similar.

    `prefix`: beginning of all words, which does not make them similar.
    """
    rest = [word.removeprefix(prefix) for word in known]
    found = difflib.get_close_matches(name.removeprefix(prefix), rest, n=1)
    return f" (did you mean {prefix}{found[0]}?)" if found else ""
