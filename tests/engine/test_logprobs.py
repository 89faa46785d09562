"""Probabilities of tokens from the real engine: one for each counted token, the model's own, in order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from serving.types import Features, Sampling, TokenLogprob
from tests.engine.conftest import candidates, caption, sound

if TYPE_CHECKING:
    from serving.engine.vllm.engine import VllmEngine

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]


@pytest.fixture(scope="module")
def clip() -> Features:
    """Return a clip whose greedy caption finishes before the token limit."""
    return sound(2.0, seed=2)


async def likely(engine: VllmEngine, clip: Features, **sampling: Any) -> tuple[str, int, list[TokenLogprob]]:
    """Return text, number of tokens and probabilities of a caption; greedy unless `sampling` says otherwise."""
    text, tokens = "", 0
    found: list[TokenLogprob] = []
    async for delta in engine.generate("test", clip, Sampling(**{"temperature": 0.0, **sampling})):
        text, tokens = text + delta.text, tokens + delta.tokens
        found += delta.logprobs
    return text, tokens, found


async def test_each_counted_token_has_its_probability(engine: VllmEngine, clip: Features) -> None:
    """Tokens make the caption, without the end of turn, and their probabilities are vLLM's own."""
    text, tokens, found = await likely(engine, clip, logprobs=3)
    assert len(found) == tokens
    assert "".join(each.text for each in found) == text == (await caption(engine, clip)).text
    expected = (await candidates(engine, clip, 3))[:-1]
    assert [each.logprob for each in found] == pytest.approx([step[token] for token, step in expected], abs=1e-4)
    for each, (_, step) in zip(found, expected, strict=True):
        assert [logprob for _, logprob in each.top] == pytest.approx(sorted(step.values(), reverse=True)[:3], abs=1e-4)
        assert each.top[0] == (each.text, each.logprob), "a greedy token is the likeliest"


async def test_hot_tokens_are_reported_next_to_the_likeliest(engine: VllmEngine, clip: Features) -> None:
    """A sampled token has the model's own probability, which the temperature does not change."""
    _, tokens, found = await likely(
        engine, clip, logprobs=0, temperature=1.5, top_p=1.0, top_k=0, seed=1, max_tokens=20
    )
    assert len(found) == tokens == 20
    assert all(not each.top and each.logprob <= 0 for each in found)
    assert len({each.logprob for each in found}) > 10


async def test_none_without_a_request(engine: VllmEngine, clip: Features) -> None:
    """Deltas have no probabilities unless they are requested."""
    assert (await likely(engine, clip, max_tokens=5))[2] == []


async def test_probabilities_outlast_stops(engine: VllmEngine, clip: Features) -> None:
    """A caption that a text stops has the probabilities of all its counted tokens, those of the stop included."""
    text = (await caption(engine, clip)).text
    stopped, tokens, found = await likely(engine, clip, logprobs=1, stop=(text[12:20],))
    assert len(found) == tokens
    assert "".join(each.text for each in found).startswith(stopped)
