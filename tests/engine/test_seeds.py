"""Seeded requests on the real engine: repeatable, and no danger to others, also where a prompt is read in steps."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
import torch

from serving.engine.vllm.cpu_generators import CpuGenerators
from tests.engine.conftest import sound, token_ids

if TYPE_CHECKING:
    from serving.engine.vllm.engine import VllmEngine

pytestmark = pytest.mark.engine

loop = pytest.mark.asyncio(loop_scope="session")


@loop
async def test_a_seeded_prompt_of_several_steps(engine: VllmEngine) -> None:
    """A clip of two minutes, read in several steps, has the same caption for the same seed, and another one else."""
    clip = sound(120.0, seed=3)
    first, again, other = [
        await token_ids(engine, clip, seed=seed, temperature=1.0, max_tokens=24, ignore_eos=True) for seed in (7, 7, 8)
    ]
    assert first == again != other
    assert len(first) == 24
    await engine.check_health()


@loop
async def test_many_seeded_clips_at_once(engine: VllmEngine) -> None:
    """Clips whose prompts share steps are all captioned, and the engine goes on."""
    clips = [sound(30.0, seed) for seed in range(12)]
    tokens = await asyncio.gather(
        *(token_ids(engine, clip, seed=5, temperature=1.0, max_tokens=8, ignore_eos=True) for clip in clips)
    )
    assert [len(each) for each in tokens] == [8] * 12
    await engine.check_health()


def test_a_generator_starts_again_where_it_is_set_back() -> None:
    """A sample that is discarded does not count: the next one is the first of the seed, as on a GPU."""
    generators, given = CpuGenerators(), torch.Generator()
    given.manual_seed(11)
    expected = torch.empty(3).exponential_(generator=given)
    given.manual_seed(11)
    generators[0] = given
    generator = generators[0]
    torch.empty(3).exponential_(generator=generator)
    generator.set_offset(generator.get_offset() - 4)
    assert torch.equal(torch.empty(3).exponential_(generator=generator), expected)
