"""The fake engine: deterministic, honest about tokens, and faulty on demand."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.config import Settings
from serving.engine.fake import FakeEngine, Faults
from serving.errors import EngineFailed, NotReady
from serving.types import Features, FinishReason, Sampling

if TYPE_CHECKING:
    from pathlib import Path

    from serving.engine.base import Engine, EngineDelta


def clip(seconds: float = 1.0, seed: int = 0) -> Features:
    """Return random features of that length."""
    frames = int(seconds * 100)
    log_mel = np.random.default_rng(seed).random((128, frames), dtype=np.float32)
    return Features(log_mel, samples=frames * 160)


async def started(*, concurrency: int | None = None, faults: Faults | None = None, **settings: Any) -> FakeEngine:
    """Return a started engine."""
    engine = FakeEngine(Settings(engine="fake", **settings), concurrency=concurrency, faults=faults)
    await engine.start()
    return engine


async def everything(
    engine: Engine, sampling: Sampling | None = None, features: Features | None = None
) -> list[EngineDelta]:
    """Return every delta of one generation."""
    return [delta async for delta in engine.generate("id", features or clip(), sampling or Sampling())]


def text_of(deltas: list[EngineDelta]) -> str:
    """Return the caption's text."""
    return "".join(delta.text for delta in deltas)


async def test_same_features_same_caption() -> None:
    """The same clip always gets the same caption, another clip another caption."""
    engine = await started()
    first, again, other = [text_of(await everything(engine, features=clip(seed=seed))) for seed in (1, 1, 2)]
    assert first == again != other
    assert "1.00 seconds" in first


async def test_token_counts_are_honest() -> None:
    """One token is one word, and the end of turn is not counted."""
    engine = await started(fake_tokens=30)
    deltas = await everything(engine)
    assert sum(delta.tokens for delta in deltas) == len(text_of(deltas).split()) == 30
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + [FinishReason.STOP]


async def test_a_slow_consumer_gets_larger_deltas() -> None:
    """Tokens between two reads arrive as one delta, as from vLLM; the first token arrives alone."""
    engine = await started(fake_tokens=30, fake_tpot_s=0.01)
    sizes = []
    async with aclosing(engine.generate("id", clip(), Sampling())) as deltas:
        async for delta in deltas:
            sizes.append(delta.tokens)
            await asyncio.sleep(0.1)
    assert sizes[0] == 1
    assert sum(sizes) == 30
    assert len(sizes) <= 6


@pytest.mark.parametrize("max_tokens", [1, 29, 30])
async def test_max_tokens_ends_as_length(max_tokens: int) -> None:
    """A caption that leaves no room for its end of turn is cut as `length`."""
    engine = await started(fake_tokens=30)
    deltas = await everything(engine, Sampling(max_tokens=max_tokens))
    assert sum(delta.tokens for delta in deltas) == max_tokens
    assert deltas[-1].finish_reason is FinishReason.LENGTH


async def test_ignore_eos_runs_to_max_tokens() -> None:
    """With `ignore_eos` only `max_tokens` ends a caption."""
    engine = await started(fake_tokens=5)
    deltas = await everything(engine, Sampling(max_tokens=100, ignore_eos=True))
    assert sum(delta.tokens for delta in deltas) == len(text_of(deltas).split()) == 100
    assert deltas[-1].finish_reason is FinishReason.LENGTH


@given(start=st.integers(0, 150), length=st.integers(1, 20))
async def test_stop_text_never_appears(start: int, length: int) -> None:
    """For any part of the caption as the stop text, the caption ends right before its first occurrence."""
    engine = await started()
    full = text_of(await everything(engine))
    stop = full[start : start + length] or "never said"
    deltas = await everything(engine, Sampling(stop=(stop, "also never said")))
    assert text_of(deltas) == full.split(stop)[0]
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == [FinishReason.STOP]
    assert deltas[-1].finish_reason is FinishReason.STOP


async def test_first_of_several_stop_texts_counts() -> None:
    """The first of several stop texts to occur ends the caption."""
    engine = await started()
    deltas = await everything(engine, Sampling(stop=("seconds", "clip", "has")))
    assert text_of(deltas) == "This "
    assert sum(delta.tokens for delta in deltas) == 2


async def test_speed_is_as_set() -> None:
    """The first token takes `fake_ttft_s`, each further one `fake_tpot_s`."""
    engine = await started(fake_ttft_s=0.1, fake_tpot_s=0.002, fake_tokens=50)
    began = time.perf_counter()
    times = [time.perf_counter() - began async for _ in engine.generate("id", clip(), Sampling())]
    assert times[0] >= 0.1
    assert 0.2 <= times[-1] < 3


async def test_thousands_of_tokens_per_second() -> None:
    """Without configured times the engine is far faster than any client."""
    engine = await started()
    began = time.perf_counter()
    await everything(engine, Sampling(max_tokens=20_000, ignore_eos=True))
    assert time.perf_counter() - began < 5


async def test_closing_aborts() -> None:
    """A closed generator counts as aborted and leaves nothing running."""
    engine = await started()
    async with aclosing(engine.generate("id", clip(), Sampling())) as deltas:
        await anext(deltas)
        assert engine.load.running == 1
    assert (engine.load.running, engine.aborted, engine.finished) == (0, 1, 0)


async def test_cancelling_aborts() -> None:
    """A consumer that is cancelled while it waits for the first token counts as aborted."""
    engine = await started(fake_ttft_s=100)
    task = asyncio.create_task(everything(engine))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (engine.load.running, engine.aborted) == (0, 1)


async def test_closing_after_the_last_delta_is_finished() -> None:
    """A consumer that closes on the finish reason has not aborted."""
    engine = await started(fake_tokens=1)
    async with aclosing(engine.generate("id", clip(), Sampling(max_tokens=1))) as deltas:
        assert (await anext(deltas)).finish_reason is FinishReason.LENGTH
    assert (engine.load.running, engine.aborted, engine.finished) == (0, 0, 1)


@pytest.mark.parametrize("tokens", [0, 1, 7])
async def test_fails_after_tokens(tokens: int) -> None:
    """A generation fails after exactly the configured number of tokens."""
    engine = await started(faults=Faults(fail_after_tokens=tokens))
    deltas = engine.generate("id", clip(), Sampling())
    received = 0
    with pytest.raises(EngineFailed):  # noqa: PT012
        async for delta in deltas:
            received += delta.tokens
    assert received == tokens
    assert (engine.load.running, engine.failed) == (0, 1)


async def test_some_fail_and_all_is_logged(tmp_path: Path) -> None:
    """A share of the captions fails, always the same captions, and the log has the tokens that each has sent."""
    log = tmp_path / "sent"
    engine = await started(fake_fail_share=0.5, fake_tokens=5, fake_log=log, stream_flush_interval_s=0)
    counted: dict[str, int] = {}
    failed: list[list[str]] = [[], []]
    for round_ in failed:
        for number in range(40):
            try:
                async for delta in engine.generate(f"id{number}", clip(), Sampling()):
                    counted[f"id{number}"] = counted.get(f"id{number}", 0) + delta.tokens
            except EngineFailed:
                round_.append(f"id{number}")
    assert failed[0] == failed[1]
    assert 10 < len(failed[0]) < 30
    logged: dict[str, int] = {}
    for request_id, tokens in map(str.split, log.read_text().splitlines()):
        logged[request_id] = logged.get(request_id, 0) + int(tokens)
    assert logged == counted


async def test_hangs_until_it_dies() -> None:
    """A hanging generation fails when the engine dies, and so does the health check."""
    engine = await started(faults=Faults(hang_after_tokens=2))
    task = asyncio.create_task(everything(engine))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(task), 0.05)
    await engine.check_health()
    engine.die()
    with pytest.raises(EngineFailed):
        await task
    with pytest.raises(EngineFailed):
        await engine.check_health()
    with pytest.raises(EngineFailed):
        await everything(engine)
    assert (engine.load.running, engine.failed) == (0, 2)


async def test_is_not_ready_before_start_and_after_stop() -> None:
    """The health check raises `NotReady` before the start and after the (idempotent) stop."""
    engine = FakeEngine(Settings(engine="fake"))
    with pytest.raises(NotReady):
        await engine.check_health()
    await engine.start()
    await engine.check_health()
    await engine.stop()
    await engine.stop()
    with pytest.raises(NotReady):
        await everything(engine)


async def test_concurrency_is_limited() -> None:
    """With a concurrency of 1, two generations take the time of two."""
    engine = await started(concurrency=1, fake_ttft_s=0.05)
    began = time.perf_counter()
    await asyncio.gather(everything(engine), everything(engine))
    assert time.perf_counter() - began >= 0.1
    assert engine.finished == 2
