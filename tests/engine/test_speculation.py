"""Speculative decoding, an engine argument that changes what a step computes, with the service's own scheduler."""

from __future__ import annotations

import pytest

from serving.config import Settings
from serving.engine.vllm.engine import VllmEngine
from tests.engine.conftest import caption, sound, start

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]


async def test_guessed_tokens_change_no_caption(engine: VllmEngine) -> None:
    """Greedy captions of a clip and of a long audio are those of the engine that guesses nothing."""
    table = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}}
    guessing = VllmEngine(Settings(engine_args=table))
    try:
        await start(guessing)
        for seconds in (3, 40):
            expected = await caption(engine, sound(seconds), max_tokens=24)
            assert expected.tokens == 24
            assert await caption(guessing, sound(seconds), max_tokens=24) == expected
    finally:
        await guessing.stop()
