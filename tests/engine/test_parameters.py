"""Each parameter of vLLM's `SamplingParams` that the service honours changes the caption of the real engine."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from serving.api.dialects.parameter_table import HARMLESS, REFUSED
from serving.errors import InvalidRequest
from serving.types import Features, FinishReason
from tests.engine.conftest import Caption, caption, sound, token_ids

if TYPE_CHECKING:
    from serving.engine.vllm.engine import VllmEngine

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

VOCABULARY = 816
"""Tokens of the embedded checkpoint."""

END_OF_TURN = 806

SHORT: dict[str, Any] = {"max_tokens": 48}

BY_TEMPERATURE: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.9, "seed": 1},
    "top_p": {"top_p": 1e-6},
    "top_k": {"top_k": 1, "top_p": 1.0},
    "min_p": {"min_p": 1.0},
    "seed": {"seed": 2},
}
"""Parameters of sampling, which greedy captions do not have: with each, a hot caption differs from the one without."""

ELSEWHERE = {
    "n": "1 only",
    "output_kind": "deltas",
    "skip_clone": "no copy",
    "output_text_buffer_length": "vLLM's own",
    "logprobs": "reported with a caption that it does not change: test_logprobs.py",
}
"""Fields that change no caption."""


@pytest.fixture(scope="module")
def clip() -> Features:
    """Return a clip whose greedy caption finishes before the token limit."""
    return sound(2.0, seed=2)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def greedy(engine: VllmEngine, clip: Features) -> Caption:
    """Return the clip's greedy caption."""
    return await caption(engine, clip)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def tokens(engine: VllmEngine, clip: Features) -> list[int]:
    """Return the clip's greedy tokens without the end of turn."""
    return (await token_ids(engine, clip))[:-1]


def greedy_changes(text: str, tokens: list[int]) -> dict[str, dict[str, Any]]:
    """Return a value for each honoured field that changes the greedy caption."""
    return {
        "presence_penalty": {"presence_penalty": 2.0},
        "frequency_penalty": {"frequency_penalty": 2.0},
        "repetition_penalty": {"repetition_penalty": 1.5},
        "stop": {"stop": (text[12:20],)},
        "stop_token_ids": {"stop_token_ids": (tokens[7],)},
        "include_stop_str_in_output": {"include_stop": True, "stop": (text[12:20],)},
        "ignore_eos": {"ignore_eos": True, "max_tokens": len(tokens) + 10},
        "max_tokens": {"max_tokens": 5},
        "min_tokens": {"min_tokens": len(tokens) + 5, "max_tokens": len(tokens) + 10},
        "logit_bias": {"logit_bias": ((tokens[0], -100.0),)},
        "allowed_token_ids": {"allowed_token_ids": tuple(sorted({*tokens[1:], END_OF_TURN} - {tokens[0]}))},
        "bad_words": {"bad_words": (text.split()[1],)},
    }


async def test_every_field_is_tried_refused_or_harmless(greedy: Caption, tokens: list[int]) -> None:
    """A field that vLLM adds fails here until it has a place."""
    params = importlib.import_module("vllm.sampling_params").SamplingParams
    fields = {name for name in params.__struct_fields__ if not name.startswith("_")}
    tried = {*greedy_changes(greedy.text, tokens), *BY_TEMPERATURE}
    assert fields - tried - REFUSED.keys() - HARMLESS.keys() - ELSEWHERE.keys() == set()
    assert not tried & (REFUSED.keys() | HARMLESS.keys())


async def test_each_honoured_field_changes_the_greedy_caption(
    engine: VllmEngine, clip: Features, greedy: Caption, tokens: list[int]
) -> None:
    """At temperature 0 each honoured field alone makes another caption."""
    for name, sampling in greedy_changes(greedy.text, tokens).items():
        assert await caption(engine, clip, **sampling) != greedy, name


async def test_each_field_of_sampling_changes_a_hot_caption(engine: VllmEngine, clip: Features) -> None:
    """At a high temperature, with a seed, each field of sampling makes another caption."""
    hot: dict[str, Any] = {"temperature": 1.5, "top_p": 1.0, "top_k": 0, "seed": 1, **SHORT}
    without = await caption(engine, clip, **hot)
    for name, sampling in BY_TEMPERATURE.items():
        assert await caption(engine, clip, **{**hot, **sampling}) != without, name


async def test_min_p_of_one_leaves_the_most_likely_token(engine: VllmEngine, clip: Features) -> None:
    """With `min_p` 1 even a hot caption is the greedy one."""
    hot = await caption(engine, clip, temperature=1.9, top_p=1.0, top_k=0, min_p=1.0, **SHORT)
    assert hot == await caption(engine, clip, **SHORT)


async def test_a_bad_word_is_absent(engine: VllmEngine, clip: Features, greedy: Caption) -> None:
    """The word that the caption had is not in it."""
    word = greedy.text.split()[1]
    assert word not in (await caption(engine, clip, bad_words=(word,), **SHORT)).text.split()


async def test_only_allowed_tokens_are_generated(engine: VllmEngine, clip: Features, tokens: list[int]) -> None:
    """All tokens are among the allowed ones."""
    allowed = tuple(sorted(set(tokens[3:9])))
    assert set(await token_ids(engine, clip, allowed_token_ids=allowed, **SHORT)) <= set(allowed)


async def test_min_tokens_are_generated_and_counted(engine: VllmEngine, clip: Features, tokens: list[int]) -> None:
    """The caption has at least `min_tokens` tokens, or as many as a smaller `max_tokens` allows."""
    least = len(tokens) + 5
    assert (await caption(engine, clip, min_tokens=least, max_tokens=least + 40)).tokens >= least
    got = await caption(engine, clip, min_tokens=least, max_tokens=3)
    assert (got.tokens, got.finish_reason) == (3, FinishReason.LENGTH)


async def test_what_stops_a_caption_may_be_part_of_it(
    engine: VllmEngine, clip: Features, greedy: Caption, tokens: list[int]
) -> None:
    """With `include_stop` the caption ends with the text, the token or the sequence that stopped it."""
    stop = greedy.text[12:20]
    end = greedy.text.index(stop) + len(stop)
    for stops in ({"stop": (stop,)}, {"stop_token_ids": (tokens[7],)}, {"stop_token_sequences": (tuple(tokens[5:8]),)}):
        without = await caption(engine, clip, **stops)
        included = await caption(engine, clip, include_stop=True, **stops)
        assert included.finish_reason is FinishReason.STOP
        assert greedy.text.startswith(included.text)
        assert len(included.text) > len(without.text)
        if "stop" in stops:
            assert included.text == greedy.text[:end]


@pytest.mark.parametrize(
    "sampling",
    [
        {"logit_bias": ((VOCABULARY, 1.0),)},
        {"allowed_token_ids": (VOCABULARY,)},
        {"stop_token_ids": (VOCABULARY,)},
        {"allowed_token_ids": (-1,)},
        {"min_p": 1.5},
    ],
    ids=str,
)
async def test_values_that_the_engine_cannot_honour_are_rejected(
    engine: VllmEngine, clip: Features, sampling: dict[str, Any]
) -> None:
    """Token ids beyond the vocabulary and wrong values raise `InvalidRequest`, and the engine continues."""
    with pytest.raises(InvalidRequest):
        await caption(engine, clip, **sampling, **SHORT)
    await engine.check_health()


@pytest.mark.parametrize("temperature", [0.0, 1.5])
async def test_contradictions_leave_the_engine_alive(
    engine: VllmEngine, clip: Features, greedy: Caption, temperature: float
) -> None:
    """Parameters that together allow no token at all end within `max_tokens`; other captions are not affected."""
    nothing = {"allowed_token_ids": (END_OF_TURN,), "min_tokens": 8, "max_tokens": 8}
    got = await caption(engine, clip, temperature=temperature, **nothing)
    assert got.tokens <= 8
    assert await caption(engine, clip) == greedy
