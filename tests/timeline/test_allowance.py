"""Output tokens that captions side by side draw from one allowance."""

from __future__ import annotations

import asyncio

import pytest

from serving.timeline.allowance import Allowance


async def _write(allowance: Allowance, most: int, written: int, log: list[int]) -> None:
    async with allowance.draw(most) as draft:
        await asyncio.sleep(0)
        draft.written = min(written, draft.tokens)
        log.append(draft.tokens)


async def test_no_bound() -> None:
    """Without a bound each caption may write all it wants."""
    async with Allowance(None).draw(32_768) as draft:
        assert draft.tokens == 32_768


async def test_enough_for_all() -> None:
    """Captions that fit the allowance together do not wait for each other."""
    allowance = Allowance(30)
    async with allowance.draw(10) as one, allowance.draw(10) as two, allowance.draw(10) as three:
        assert [one.tokens, two.tokens, three.tokens] == [10, 10, 10]


async def test_end_of_the_budget() -> None:
    """Near the end captions wait for what others return; the last gets the rest, and those after it nothing."""
    allowance = Allowance(25)
    log: list[int] = []
    await asyncio.gather(*(_write(allowance, 20, 9, log) for _ in range(5)))
    assert log == [20, 16, 7, 0, 0]


@pytest.mark.parametrize("tokens", [1, 7, 100, 1000])
async def test_never_more_than_the_allowance(tokens: int) -> None:
    """However many captions draw, and whatever they write, the sum is within the allowance."""
    allowance, written = Allowance(tokens), []

    async def caption(number: int) -> None:
        async with allowance.draw(10 + number) as draft:
            await asyncio.sleep(0.001 * (number % 3))
            draft.written = draft.tokens - number % 2 if draft.tokens else 0
            written.append(draft.written)

    await asyncio.gather(*(caption(number) for number in range(20)))
    assert len(written) == 20
    assert sum(written) <= tokens


async def test_cancelled_caption() -> None:
    """A caption that is cancelled while it waits, or writes, returns its tokens."""
    allowance = Allowance(10)
    async with allowance.draw(10):
        waiting = asyncio.create_task(_write(allowance, 10, 1, []))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait((waiting,))
    log: list[int] = []
    await _write(allowance, 10, 1, log)
    assert log == [10]
