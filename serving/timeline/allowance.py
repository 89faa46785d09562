"""Output tokens that the captions of one timeline may have together, where a budget bounds them."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Allowance:
    """Tokens that captions side by side draw from, first come, first served: never more than `tokens` are written.

    A caption draws all that it may write, and returns what it has not written. Near the end of a budget captions
    therefore wait for each other.
    """

    def __init__(self, tokens: int | None) -> None:
        """Store the tokens; `None`: there is no bound."""
        self._tokens = tokens
        self._drawn_by = 0
        self._turn = asyncio.Lock()
        self._returned = asyncio.Event()

    @asynccontextmanager
    async def draw(self, most: int) -> AsyncIterator[Draft]:
        """Yield a draft of `most` tokens, or of what is left once no other caption can return any, maybe 0."""
        if self._tokens is None:
            yield Draft(most)
            return
        async with self._turn:
            while self._tokens < most and self._drawn_by:
                self._returned.clear()
                await self._returned.wait()
            draft = Draft(min(most, self._tokens))
            self._tokens -= draft.tokens
            self._drawn_by += 1
        try:
            yield draft
        finally:
            self._tokens += draft.tokens - draft.written
            self._drawn_by -= 1
            self._returned.set()


class Draft:
    """Tokens that one caption may write; its writer sets `written`."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.written = 0
