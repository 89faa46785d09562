"""The number of lines that run at the same time: as many as find the engine free, and no more.

Additive increase and multiplicative decrease (Chiu and Jain, "Analysis of the increase and decrease algorithms for
congestion avoidance in computer networks", 1989): each line that had not to wait for the engine raises the limit, one
that had to wait lowers it. So lines fill what other captions leave, and one line at a time finds out where that ends.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_FIRST = 4.0
_FREE_S = 0.05
"""Wait for the engine up to which it counts as free."""
_DECREASE = 0.75
_DECREASE_EVERY_S = 1.0
"""Time in which several lines that waited count as one: they waited for the same reason."""
_LOOK_EVERY_S = 0.05


class Pace:
    """A limit of running lines, at most `most`. `captions_wait` returns whether captions wait for the engine now."""

    def __init__(self, most: int, captions_wait: Callable[[], bool]) -> None:
        self._most = most
        self._captions_wait = captions_wait
        self._limit = min(_FIRST, float(most))
        self._rising = True
        self._decreased_s = 0.0
        self._turns: deque[object] = deque()
        self._freed = asyncio.Event()
        self.running = 0
        """Lines that run."""

    @property
    def limit(self) -> int:
        """Lines that may run now."""
        return max(1, int(self._limit))

    async def turn(self, stops: Callable[[], bool]) -> bool:
        """Wait until a line may start; return whether it may: not if `stops` becomes true.

        Batches get their turns in the order in which they asked.
        """
        turn = object()
        self._turns.append(turn)
        try:
            while self._turns[0] is not turn or self.running >= self.limit or self._captions_wait():
                if stops():
                    return False
                self._freed.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._freed.wait(), _LOOK_EVERY_S)
            self.running += 1
        finally:
            self._turns.remove(turn)
        return True

    def end(self) -> None:
        """Count a line that has had its turn as ended."""
        self.running -= 1
        self._freed.set()

    def waited(self, wait_s: float) -> None:
        """Follow the time that a line has waited for the engine."""
        if wait_s > _FREE_S:
            self.overloaded()
        else:
            # Doubles with each round of lines until the first wait, then grows by one with each round.
            self._limit = min(self._limit + (1 if self._rising else 1 / self._limit), float(self._most))

    def overloaded(self) -> None:
        """Lower the limit: a line had to wait, or was refused."""
        now_s = asyncio.get_running_loop().time()
        self._rising = False
        if now_s - self._decreased_s >= _DECREASE_EVERY_S:
            self._decreased_s = now_s
            self._limit = max(1.0, self._limit * _DECREASE)
