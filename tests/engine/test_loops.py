"""Loops on the real engine: each ends within a stated number of tokens, and other captions are the same as before."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from serving.types import FinishReason, Sampling
from tests.engine.conftest import caption, sound, token_ids

if TYPE_CHECKING:
    from serving.engine.base import EngineDelta
    from serving.engine.vllm.engine import VllmEngine

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

REPEATS = 20


async def test_a_planted_loop_ends_after_twenty_repetitions(engine: VllmEngine) -> None:
    """A caption that can only repeat one token ends there, as a stop that is marked; without the guard it runs on."""
    clip = sound(2.0, seed=2)
    token = (await token_ids(engine, clip))[0]
    planted = Sampling(temperature=0.0, logit_bias=((token, 100.0),), max_tokens=64, stop_loops=True)
    deltas: list[EngineDelta] = [delta async for delta in engine.generate("loop", clip, planted)]
    assert sum(delta.tokens for delta in deltas) == REPEATS
    assert (deltas[-1].finish_reason, deltas[-1].looped) == (FinishReason.STOP, True)
    assert not any(delta.looped for delta in deltas[:-1])
    without = await caption(engine, clip, logit_bias=((token, 100.0),), max_tokens=64)
    assert (without.tokens, without.finish_reason) == (64, FinishReason.LENGTH)


async def test_other_captions_are_the_same(engine: VllmEngine) -> None:
    """The guard does not change a caption that has no loop."""
    clips = [sound(1.5 + seed % 5, seed) for seed in range(12)]
    plain = await asyncio.gather(*(caption(engine, clip, max_tokens=256) for clip in clips))
    guarded = await asyncio.gather(*(caption(engine, clip, max_tokens=256, stop_loops=True) for clip in clips))
    assert guarded == plain
