"""One line of progress on a terminal, which is erased before anything else is printed there."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import TextIO

_PERIOD_S = 0.2
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


class Progress:
    """A line such as `⠙ 2 of 5 done · b.wav · 3 s`. Does nothing if the stream is no terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._enabled = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._shown = False
        self._drawn_s = 0.0
        self._began_s = time.monotonic()

    def restart(self) -> None:
        """Count the seconds from now on."""
        self._began_s = time.monotonic()

    def show(self, text: str) -> None:
        """Draw the line, at most five times a second."""
        now_s = time.monotonic()
        if not self._enabled or now_s - self._drawn_s < _PERIOD_S:
            return
        self._drawn_s = now_s
        sign = _SPINNER[int(now_s / _PERIOD_S) % len(_SPINNER)]
        line = f"{sign} {text} · {now_s - self._began_s:.0f} s"
        try:
            width = os.get_terminal_size(self._stream.fileno()).columns or 80
        except OSError:
            width = 80
        self._stream.write(f"\r\033[K{line[: width - 1]}")
        self._stream.flush()
        self._shown = True

    def erase(self) -> None:
        """Erase the line if it is shown."""
        if self._shown:
            self._stream.write("\r\033[K")
            self._stream.flush()
            self._shown = False
            self._drawn_s = 0.0
