"""Admission control's accounts: nothing over budget, nothing lost. Time is simulated."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.engine.base import Load, context_tokens
from serving.engine.fake import Faults
from serving.errors import AudioTooLong, EngineFailed
from serving.scheduling.output_estimate import OutputEstimate
from serving.types import NO_TENANT, Sampling
from tests.engine.simulated import admission, assert_empty, clip, run, simulate

pytestmark = pytest.mark.usefixtures("no_stray_tasks")


async def test_a_clients_stops_teach_no_length() -> None:
    """A caption whose length the client's stops or choice of tokens may decide teaches only if it is long."""
    async with admission(fake_tokens=20, fake_tpot_s=0.0, fake_ttft_s=0.0) as (control, _):
        before = control._outputs.tokens
        for _ in range(5):
            assert await run(control, stop=(" ",)) <= 2
            await run(control, stop_token_ids=(1,))
            await run(control, stop_token_sequences=((1, 2),))
            await run(control, logit_bias=((1, 100.0),))
            await run(control, allowed_token_ids=(1,))
            await run(control, bad_words=("a",))
            await run(control, min_tokens=1)
        assert control._outputs.tokens == before
        await run(control)
        assert control._outputs.tokens != before


async def test_the_start_of_a_caption_is_reported_when_it_is_admitted() -> None:
    """A caption that waits for a slot has not started; one that is admitted has, before its first token."""
    async with admission(max_num_seqs=1, fake_ttft_s=0.2) as (control, _):
        started: list[str] = []

        async def one(name: str) -> None:
            async for _ in control.generate(name, clip(5), Sampling(), NO_TENANT, lambda: started.append(name)):
                pass

        tasks = [asyncio.create_task(one(name)) for name in ("a", "b", "c")]
        await asyncio.sleep(0.05)
        assert started == ["a", "b"], "one slot, and one caption more"
        tasks[2].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert started == ["a", "b"]


captions = st.lists(
    st.tuples(
        st.floats(0.01, 900),  # seconds of audio
        st.floats(0, 3),  # arrival
        st.one_of(st.none(), st.floats(0, 4)),  # it leaves then, if it is still there
        st.integers(1, 1500),  # max_tokens
        st.booleans(),  # ignore_eos
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(captions, st.integers(1, 8), st.integers(13_000, 60_000), st.sampled_from([None, 0, 5]))
def test_the_budget_holds_and_everything_is_released(
    arrivals: list[tuple[float, float, float | None, int, bool]], slots: int, capacity: int, fails_after: int | None
) -> None:
    """Captions that finish, fail or are cancelled leave nothing behind; none is admitted beyond slots or context."""

    async def main() -> None:
        faults = Faults(fail_after_tokens=fails_after)
        async with admission(faults, max_num_seqs=slots, fake_kv_tokens=capacity, fake_tokens=300) as (control, engine):
            results: list[BaseException | int] = []

            async def one(seconds: float, arrives: float, leaves: float | None, sampling: dict[str, Any]) -> None:
                await asyncio.sleep(arrives)
                try:
                    async with asyncio.timeout(leaves):
                        results.append(await run(control, seconds=seconds, **sampling))
                except (TimeoutError, EngineFailed) as error:
                    results.append(error)

            admitted = control._reserve

            def reserve(caption: Any, tokens: int) -> None:
                first = caption.reserved_tokens == 0 and tokens > 0
                admitted(caption, tokens)
                assert control._kv_tokens == sum(each.reserved_tokens for each in control._running | {caption})
                if first:
                    assert control._kv_tokens <= capacity
                    assert len(control._running) <= slots + 1

            control._reserve = reserve  # type: ignore[method-assign]
            async with asyncio.TaskGroup() as group:
                for seconds, arrives, leaves, max_tokens, ignore_eos in arrivals:
                    sampling = {"max_tokens": max_tokens, "ignore_eos": ignore_eos}
                    group.create_task(one(seconds, arrives, leaves, sampling))
            assert len(results) == len(arrivals)
            assert_empty(control)
            assert engine.load.running == 0
            assert engine.seen.most <= slots + 1

    simulate(main())


def test_tokens_in_use_stay_within_what_is_reserved() -> None:
    """A caption that exceeds its estimate reserves more context before another caption is admitted."""

    async def main() -> None:
        async with admission(fake_kv_tokens=6000, fake_tokens=2500, max_num_seqs=8) as (control, _):
            deltas = control.generate("long-winded", clip(5), Sampling())
            tokens = 0
            async with aclosing(deltas):
                async for delta in deltas:
                    tokens += delta.tokens
                    if delta.finish_reason is None:
                        # 5 s of audio with 13 tokens each, and at most 16 of the prompt
                        assert control.load.kv_tokens >= 5 * 13 + 16 + tokens
            assert tokens == 2500
            assert_empty(control)

    simulate(main())


def test_the_default_of_max_tokens_does_not_serialise() -> None:
    """Context is reserved for the estimated output, not for `max_tokens`."""

    async def main() -> None:
        async with admission(fake_kv_tokens=20_000, max_num_seqs=16) as (control, engine):
            async with asyncio.TaskGroup() as group:
                for _ in range(32):
                    group.create_task(run(control, seconds=10))
            assert engine.seen.most == 17

    simulate(main())


def test_a_forced_length_is_reserved_in_full() -> None:
    """With `ignore_eos` the length is known, so captions that do not fit together run one after the other."""

    async def main() -> None:
        async with admission(fake_kv_tokens=5000, max_num_seqs=16, fake_tpot_s=0.001) as (control, engine):
            async with asyncio.TaskGroup() as group:
                for _ in range(4):
                    group.create_task(run(control, seconds=1, ignore_eos=True, max_tokens=4000))
            assert engine.seen.most == 1

    simulate(main())


@given(st.integers(20, 2000), st.integers(0, 1000))
def test_the_estimate_follows_the_captions(tokens: int, seed: int) -> None:
    """After 200 captions of about equal length the estimate is little more than that length; before, the model's."""
    estimate, rng = OutputEstimate(), np.random.default_rng(seed)
    assert estimate.tokens == 600
    lengths = rng.normal(tokens, tokens / 10, 200).astype(int)
    for length in lengths:
        estimate.update(int(length))
    assert tokens < estimate.tokens < 1.5 * tokens + 5


def test_a_clip_that_never_fits_is_rejected() -> None:
    """A clip that is too long for the engine even alone raises `AudioTooLong` at once."""

    async def main() -> None:
        async with admission(fake_kv_tokens=1000) as (control, engine):
            with pytest.raises(AudioTooLong, match="1316 tokens of the engine's context of 1000"):
                await run(control, seconds=100)
            assert await run(control, seconds=60) == 24
            assert engine.seen.order == ["id"]
            assert_empty(control)

    simulate(main())


def test_load_adds_up() -> None:
    """The load counts running and waiting captions, their seconds and their tokens."""

    async def main() -> None:
        async with admission(max_num_seqs=1, fake_kv_tokens=50_000) as (control, _):
            tasks = [asyncio.create_task(run(control, seconds=10)) for _ in range(3)]
            await asyncio.sleep(0.01)
            tokens = 2 * (context_tokens(clip(10)) + 600)
            assert control.load == Load(2, 1, 30.0, tokens, 50_000, waiting_audio_s=10.0)
            await asyncio.gather(*tasks)
            assert_empty(control)

    simulate(main())
