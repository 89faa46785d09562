"""Captions before an engine counts as ready: numbers, lengths and kinds of sampling that callers will use."""

from __future__ import annotations

import asyncio
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from serving.config import Settings
from serving.engine.base import PROMPT_TOKENS, audio_tokens
from serving.engine.vllm.warm_up import SAMPLING, rounds, warm_up
from serving.errors import EngineFailed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from serving.types import Features, Sampling

DEPLOY = Path(__file__).parents[2] / "deploy"
PROFILES = sorted(path.stem for path in (DEPLOY / "profiles").glob("*.toml") if path.stem != "cpu-embedded")


class Model:
    """A model that counts, and fails at the caption with this number."""

    def __init__(self, gpus: int, fails_at: int | None = None) -> None:
        self.gpus = gpus
        self.running = self.most = self.captions = 0
        self.shapes: list[tuple[int, ...]] = []
        self.samplings: list[Sampling] = []
        self._fails_at = fails_at

    async def generate(self, name: str, features: Features, sampling: Sampling) -> AsyncIterator[Any]:
        """Generate nothing."""
        del name
        self.captions += 1
        if self.captions == self._fails_at:
            raise EngineFailed
        self.running += 1
        self.most = max(self.most, self.running)
        self.shapes.append(features.log_mel.shape)
        self.samplings.append(sampling)
        await asyncio.sleep(0)
        try:
            yield None
        finally:
            self.running -= 1


def settings(profile: str) -> Settings:
    """Return the settings of a profile."""
    return Settings(**tomllib.loads((DEPLOY / "profiles" / f"{profile}.toml").read_text()))


def test_one_caption_on_a_cpu() -> None:
    """Without a GPU there are no graphs, and the first caption is half a second of silence."""
    ((first),) = rounds(Settings(), on_gpu=False)
    assert first.frames == (50,)
    assert [sampling.max_tokens for sampling in first.sampling] == [2]


@pytest.mark.parametrize("profile", PROFILES)
def test_every_size_that_a_profile_uses(profile: str) -> None:
    """On a GPU: 1, 2, 4, … to `max_num_seqs` captions at a time, a full step of 30 s clips, and a long audio."""
    of = settings(profile)
    found = rounds(of, on_gpu=True)
    sizes = [len(each.frames) for each in found]
    expected = [1 << power for power in range(20) if 1 << power < of.max_num_seqs] + [of.max_num_seqs]
    assert [size for size in sizes if size > 1] >= [size for size in expected if size > 1]
    assert set(expected) <= set(sizes)
    full = max(len(each.frames) for each in found if each.frames[0] == 3000)
    step = audio_tokens(3000) + PROMPT_TOKENS
    assert full * step <= of.step_tokens < (full + 1) * step
    assert found[-1].frames == (30_000,)
    assert all(audio_tokens(max(each.frames)) + PROMPT_TOKENS <= of.max_input_tokens for each in found)


@pytest.mark.parametrize("profile", PROFILES)
def test_graphs_cover_every_number_of_captions(profile: str) -> None:
    """The largest CUDA graph that vLLM captures for a profile (the table that tests/cuda makes) holds all captions."""
    of = settings(profile)
    row = rf"\| {re.escape(profile)} \| {of.tensor_parallel} \| `\w+` \| \d+ \((\d+)\) \|"
    found = re.search(row, (DEPLOY / "cuda.md").read_text())
    assert found
    assert int(found[1]) >= of.max_num_seqs


def test_short_contexts_shorten_the_clips() -> None:
    """Nothing is longer than `max_input_tokens` admits."""
    of = Settings(max_input_tokens=100, max_model_len=1024)
    assert max(max(each.frames) for each in rounds(of, on_gpu=True)) == 600
    assert audio_tokens(600) + PROMPT_TOKENS <= 100


async def test_captions_of_a_round_run_at_the_same_time() -> None:
    """All captions of a round are in the engine at once, with every kind of sampling."""
    model = Model(gpus=1)
    await warm_up(model, Settings(max_num_seqs=12))  # type: ignore[arg-type]
    assert model.most == 12
    assert model.running == 0
    assert set(SAMPLING) <= set(model.samplings)
    assert {shape[0] for shape in model.shapes} == {128}


@pytest.mark.parametrize("at", [1, 5, 20])
async def test_an_engine_that_fails_is_not_ready(at: int) -> None:
    """A failure in any round ends the warm-up."""
    with pytest.raises((EngineFailed, ExceptionGroup)):
        await warm_up(Model(1, at), Settings(max_num_seqs=12))  # type: ignore[arg-type]
