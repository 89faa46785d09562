"""The real engine: every parameter has its effect, nothing is mixed up, nothing keeps running."""

from __future__ import annotations

import asyncio
import importlib
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import pytest_asyncio

from serving.config import Settings
from serving.errors import AudioTooLong, InvalidRequest
from serving.types import Features, FinishReason, Sampling
from tests.engine.conftest import Caption, candidates, caption, sound, token_ids
from tests.engine.started import idle, model_of, within

if TYPE_CHECKING:
    from serving.engine.vllm.engine import VllmEngine


pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]


@pytest.fixture(scope="module")
def clip() -> Features:
    """Return a clip whose greedy caption finishes before the token limit."""
    return sound(2.0, seed=2)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def tokens(engine: VllmEngine, clip: Features) -> list[int]:
    """Return the clip's greedy tokens without the end of turn."""
    return (await token_ids(engine, clip))[:-1]


async def test_only_the_engines_allocator_keeps_memory(engine: VllmEngine) -> None:
    """Without a GPU the allocator of the engine's processes, and no other, keeps the memory of a step."""
    module = importlib.import_module(type(model_of(engine)).__module__)
    with module._allocator_keeps_memory():
        assert os.environ["MALLOC_MMAP_MAX_"] == "0"
    assert not [name for name in os.environ if name.startswith("MALLOC_")]


@pytest.mark.parametrize(("setting", "eager"), [(None, True), (True, True), (False, False)])
async def test_compilation_needs_a_setting_without_a_gpu(engine: VllmEngine, setting: bool | None, eager: bool) -> None:  # noqa: FBT001
    """Without a GPU nothing is compiled unless the settings say so: the first caption comes minutes sooner."""
    module = importlib.import_module(type(model_of(engine)).__module__)
    assert module.engine_config(Settings(enforce_eager=setting)).model_config.enforce_eager is eager


async def test_nothing_is_cached_across_requests(engine: VllmEngine, clip: Features) -> None:
    """No prefix and no preprocessed audio is cached, and the same clip has another key in each request."""
    model = model_of(engine)
    config = model._llm.vllm_config
    assert config.cache_config.enable_prefix_caching is False
    assert config.model_config.multimodal_config.mm_processor_cache_gb == 0
    keys = [set(model._input(own_id, clip)["mm_hashes"]["audio"]) for own_id in ("one", "two")]
    assert all(keys)
    assert keys[0].isdisjoint(keys[1])


async def test_the_engines_own_counts(engine: VllmEngine, clip: Features, tokens: list[int]) -> None:
    """Deltas also carry the engine's own counts: the full prompt, and the end of turn, which is not billed."""
    deltas = [delta async for delta in engine.generate("counted", clip, Sampling(temperature=0.0))]
    assert sum(delta.input_tokens for delta in deltas) == len(model_of(engine)._input("id", clip)["prompt_token_ids"])
    assert sum(delta.uncounted_tokens for delta in deltas) == 1
    assert sum(delta.tokens for delta in deltas) == len(tokens)


async def test_the_end_of_turn_is_not_counted(
    engine: VllmEngine, clip: Features, tokens: list[int], processor: Any
) -> None:
    """A full caption has the text, count and finish reason of its tokens, without control tokens."""
    text = processor.tokenizer.decode(tokens)
    assert await caption(engine, clip) == Caption(text, len(tokens), FinishReason.STOP)
    assert "<|" not in text


async def test_max_tokens_ends_a_caption_as_length(engine: VllmEngine, clip: Features) -> None:
    """A caption has `max_tokens` tokens and no more."""
    got = await caption(engine, clip, max_tokens=5)
    assert (got.tokens, got.finish_reason) == (5, FinishReason.LENGTH)


async def test_ignore_eos_continues_to_max_tokens(engine: VllmEngine, clip: Features, tokens: list[int]) -> None:
    """With `ignore_eos` every token counts, the end of turn too."""
    got = await caption(engine, clip, ignore_eos=True, max_tokens=len(tokens) + 10)
    assert (got.tokens, got.finish_reason) == (len(tokens) + 10, FinishReason.LENGTH)


async def test_temperature_varies_and_a_seed_repeats(engine: VllmEngine, clip: Features) -> None:
    """Without a seed captions differ; with one they are equal; seeds differ, up to the largest."""
    hot = {"temperature": 1.5, "max_tokens": 24}
    assert len({(await caption(engine, clip, **hot)).text for _ in range(3)}) > 1
    seeds = (0, 1, 2**63 - 1)
    once = [(await caption(engine, clip, **hot, seed=seed)).text for seed in seeds]
    assert once == [(await caption(engine, clip, **hot, seed=seed)).text for seed in seeds]
    assert len(set(once)) == len(seeds)


@pytest.mark.parametrize("narrow", [{"top_k": 1, "top_p": 1.0}, {"top_k": 0, "top_p": 1e-6}, {"temperature": 1e-9}])
async def test_top_k_top_p_and_temperature_narrow_the_choice(
    engine: VllmEngine, clip: Features, narrow: dict[str, float]
) -> None:
    """With one token to choose from, even a hot caption is the greedy one."""
    assert await caption(engine, clip, **{"temperature": 1.9, **narrow}) == await caption(engine, clip)


@pytest.mark.parametrize(
    "penalty", [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 1.5}], ids=str
)
async def test_penalties_make_words_rarer(engine: VllmEngine, clip: Features, penalty: dict[str, float]) -> None:
    """With a penalty, 64 tokens contain more different tokens."""
    long = {"ignore_eos": True, "max_tokens": 64}
    assert len(set(await token_ids(engine, clip, **long, **penalty))) > len(set(await token_ids(engine, clip, **long)))


# ---- stopping


async def test_a_stop_text_ends_the_caption_before_it(engine: VllmEngine, clip: Features) -> None:
    """A stop text ends the caption before it, also where it spans tokens; of several stop texts the first counts."""
    text = (await caption(engine, clip)).text
    first, second = text[12:20], text[30:36]
    got = await caption(engine, clip, stop=(second, first))
    assert (got.text, got.finish_reason) == (text[: text.index(first)], FinishReason.STOP)


async def test_a_stop_token_ends_the_caption_before_it(
    engine: VllmEngine, clip: Features, tokens: list[int], processor: Any
) -> None:
    """The stop token is not part of the text."""
    end = tokens.index(tokens[7])
    got = await caption(engine, clip, stop_token_ids=(tokens[7],))
    assert (got.text, got.finish_reason) == (processor.tokenizer.decode(tokens[:end]), FinishReason.STOP)


async def test_a_stop_sequence_ends_the_caption_before_it(
    engine: VllmEngine, clip: Features, tokens: list[int], processor: Any
) -> None:
    """A sequence stops as one condition: its parts alone do not stop, nor does a sequence that never completes."""
    other = next(token for token in range(100) if token not in tokens)
    sequences = ((other, tokens[1]), tuple(tokens[5:8]), (tokens[-1], other))
    got = await caption(engine, clip, stop_token_sequences=sequences)
    assert (got.text, got.finish_reason) == (processor.tokenizer.decode(tokens[:5]), FinishReason.STOP)
    assert await within(1.0, lambda: idle(engine))
    never = ((tokens[2], tokens[3], other), (tokens[-1], other))
    assert await caption(engine, clip, stop_token_sequences=never) == await caption(engine, clip)


@pytest.mark.parametrize(
    "sampling",
    [
        {"stop_token_ids": (-1,)},
        {"stop_token_ids": (10**6,)},
        {"stop_token_ids": (2**70,)},
        {"stop_token_sequences": ((1, 10**6),)},
        {"stop_token_sequences": ((),)},
        {"stop": ("",)},
        {"top_p": 2.0},
        {"max_tokens": 0},
    ],
    ids=str,
)
async def test_invalid_parameters_are_rejected(engine: VllmEngine, clip: Features, sampling: dict[str, Any]) -> None:
    """Invalid parameters raise `InvalidRequest`, and the engine continues."""
    with pytest.raises(InvalidRequest):
        await caption(engine, clip, **sampling)
    await engine.check_health()


# ---- length


async def test_forty_minutes_fit(engine: VllmEngine) -> None:
    """The longest audio the service takes gets its caption, in one request."""
    log_mel = np.random.default_rng(0).normal(0, 0.5, (128, 240_000)).astype(np.float32)
    got = await caption(engine, Features(log_mel, 240_000 * 160), max_tokens=3, ignore_eos=True)
    assert got.tokens == 3


async def test_longer_than_the_input_limit_is_rejected(engine: VllmEngine) -> None:
    """42 minutes are 32,760 audio tokens; with the prompt around them they exceed 32,768."""
    with pytest.raises(AudioTooLong):
        await caption(engine, Features(np.zeros((128, 252_000), np.float32), 252_000 * 160))


# ---- many at once


NEAR_TIE = 0.01
"""Difference of the logarithms of two probabilities below which the other captions of a step may decide."""


async def test_each_of_many_gets_its_own_caption(engine: VllmEngine, processor: Any) -> None:
    """32 different clips at once get the captions that each gets alone, or ones that part from them at a near tie.

    All have at least a second: a shorter clip is encoded a little differently in a step with others (test_parity.py).
    """
    clips = [sound(1.5 + seed % 7, seed) for seed in range(32)]
    alone = [await caption(engine, features, max_tokens=16) for features in clips]
    assert len({one.text for one in alone}) > len(clips) / 2, "the captions must differ for this test to be significant"
    together = await asyncio.gather(*(caption(engine, features, max_tokens=16) for features in clips))
    different = [number for number in range(32) if together[number] != alone[number]]
    assert len(different) <= 4
    for number in different:
        likely = await candidates(engine, clips[number], max_tokens=16)
        assert parts_at_a_near_tie(processor.tokenizer, likely, together[number].text), number


def parts_at_a_near_tie(tokenizer: Any, likely: list[tuple[int, dict[int, float]]], text: str) -> bool:
    """Return whether a text begins as these tokens do, up to one whose alternative in the text is as likely."""
    tokens = [token for token, _ in likely]
    return any(
        token != tokens[at]
        and probabilities[tokens[at]] - probability < NEAR_TIE
        and text.startswith(tokenizer.decode([*tokens[:at], token], skip_special_tokens=True))
        for at, (_, probabilities) in enumerate(likely)
        for token, probability in probabilities.items()
    )


async def test_a_wrong_caption_is_no_near_tie(engine: VllmEngine, clip: Features, processor: Any) -> None:
    """A caption of another clip does not part at a near tie; one with another token as likely does."""
    likely = await candidates(engine, clip, max_tokens=16)
    tokens = [token for token, _ in likely]
    other = (await caption(engine, sound(2.5, 1), max_tokens=16)).text
    assert other != processor.tokenizer.decode(tokens, skip_special_tokens=True)
    assert not parts_at_a_near_tie(processor.tokenizer, likely, other)
    at, second = next(
        (at, token)
        for at, (_, probabilities) in enumerate(likely)
        for token in probabilities
        if token != tokens[at] and processor.tokenizer.decode([token], skip_special_tokens=True)
    )
    likely[at][1][second] = likely[at][1][tokens[at]] - 0.001
    tied = processor.tokenizer.decode([*tokens[:at], second]) + " and so on"
    assert parts_at_a_near_tie(processor.tokenizer, likely, tied)


async def test_closing_stops_generation_at_once(engine: VllmEngine) -> None:
    """200 captions that are closed while they stream, wait, or are being sent leave nothing running."""
    endless = Sampling(max_tokens=30_000, ignore_eos=True)
    clips = [sound(2.0, seed) for seed in range(4)]
    generators = [engine.generate(f"closed-{i}", clips[i % 4], endless) for i in range(200)]
    await asyncio.gather(*(anext(generator) for generator in generators[:50]))
    waiting = [asyncio.create_task(anext(generator)) for generator in generators[50:]]
    for task in waiting[100:]:  # these are cancelled at every stage of being sent
        await asyncio.sleep(0)
        task.cancel()
    assert not await idle(engine)
    assert engine.load.running > 50
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await asyncio.gather(*(generator.aclose() for generator in generators))
    assert await within(1.0, lambda: idle(engine))
    assert engine.load.running == 0
    assert not model_of(engine)._llm.output_processor.has_unfinished_requests()
    assert (await caption(engine, clips[0], max_tokens=2)).tokens == 2
