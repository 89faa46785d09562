"""Long audios: in pieces that give the tokens of the undivided audio; and in steps that leave room for others."""

from __future__ import annotations

import asyncio
import importlib
import itertools
from contextlib import aclosing
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import numpy as np
import pytest

from serving.config import Settings
from serving.engine.base import audio_tokens
from serving.types import Features, Sampling
from tests.engine.conftest import sound, token_ids
from tests.support.lazy import Lazy

if TYPE_CHECKING:
    import torch

    from serving.engine.vllm.async_llm import LoadedModel
    from serving.engine.vllm.engine import VllmEngine
else:
    torch = Lazy("torch")

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]


def model_of(engine: VllmEngine) -> LoadedModel:
    """Return the loaded model of a started engine."""
    assert engine._model is not None
    return engine._model


def blank(frames: int) -> Features:
    """Return features of `frames` frames, each of which holds its own number."""
    return Features(np.tile(np.arange(frames, dtype=np.float32), (128, 1)), frames * 160)


# ---- pieces


@pytest.mark.parametrize("frames", [1, 99, 100, 801, 3200])
async def test_a_clip_of_thirty_seconds_is_one_item(engine: VllmEngine, frames: int) -> None:
    """A clip of at most 32 s is one item, as from vLLM's own preprocessing."""
    made = model_of(engine)._input("request-1", blank(frames))
    assert len(made["mm_kwargs"]["audio"]) == len(made["mm_placeholders"]["audio"]) == 1


@pytest.mark.parametrize("frames", [3201, 3299, 3300, 6400, 6499, 6500, 10_037, 240_000])
async def test_pieces_add_up_to_the_clip(engine: VllmEngine, frames: int) -> None:
    """Pieces are in order, without gap or overlap, cut at the ends of windows; the last has at least a second."""
    made = model_of(engine)._input("request-1", blank(frames))
    items, ranges = made["mm_kwargs"]["audio"], made["mm_placeholders"]["audio"]
    hashes = made["mm_hashes"]["audio"]
    assert len(items) == len(ranges) == len(set(hashes))
    assert len(items) > 1 or frames < 3300
    lengths = [int(item["audio_feature_lengths"].data) for item in items]
    together = torch.cat([item["input_audio_features"].data for item in items], dim=1)
    assert torch.equal(together[0], torch.arange(frames, dtype=torch.float32))
    assert all(length % 800 == 0 for length in lengths[:-1])
    assert lengths[-1] >= 100
    assert [placeholder.length for placeholder in ranges] == [audio_tokens(length) for length in lengths]
    assert all(a.offset + a.length == b.offset for a, b in itertools.pairwise(ranges))
    assert sum(placeholder.length for placeholder in ranges) == audio_tokens(frames)


async def test_no_piece_of_one_request_has_the_key_of_another(engine: VllmEngine) -> None:
    """No key is shared, even if a client chooses a request id that looks like the key of a piece."""
    model = model_of(engine)
    made = [model._input(own_id, blank(6400)) for own_id in ("a-1", "a-1-1", "a-1@800-1", "a-1-800")]
    keys = [key for one in made for key in one["mm_hashes"]["audio"]]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("seconds", [5.0, 32.5, 33.4, 64.0, 100.37, 300.0])
async def test_pieces_give_the_tokens_of_the_undivided_audio(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """Pieces of 8 s, of 32 s, and the largest that the engine takes (150 s here) give equal tokens."""
    model = model_of(engine)
    tokens = []
    for piece_frames in (800, 3200, 15_000):
        monkeypatch.setattr(model, "_piece_frames", piece_frames)
        tokens.append(await token_ids(engine, sound(seconds), max_tokens=32, ignore_eos=True))
    assert tokens[0] == tokens[1] == tokens[2]
    assert len(tokens[0]) == 32


# ---- steps


@pytest.fixture
def scheduler(engine: VllmEngine) -> Any:
    """Our scheduler as in the engine process, with statistics and 100,000 tokens of KV cache."""
    model = model_of(engine)
    kv = importlib.import_module("vllm.v1.kv_cache_interface")
    config = model._llm.vllm_config
    group = kv.KVCacheGroupSpec(
        ["layer"], kv.FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=16, dtype=torch.float32)
    )
    scheduler_class = config.scheduler_config.get_scheduler_cls()
    assert scheduler_class.__module__ == "serving.engine.vllm.scheduler"
    return scheduler_class(
        vllm_config=config,
        kv_cache_config=kv.KVCacheConfig(num_blocks=6251, kv_cache_tensors=[], kv_cache_groups=[group]),
        structured_output_manager=Mock(),
        block_size=16,
        log_stats=True,
    )


class Steps:
    """A driver of a scheduler: adds requests, and stands in for the model that computes its steps."""

    def __init__(self, engine: VllmEngine, scheduler: Any) -> None:
        self._model = model_of(engine)
        self._scheduler = scheduler
        self._outputs = importlib.import_module("vllm.v1.outputs")
        self._request = importlib.import_module("vllm.v1.request").Request
        self.counted = self.answered = 0

    def add(self, name: str, seconds: int, max_tokens: int = 1000) -> None:
        """Add a request."""
        params = self._model._params(Sampling(max_tokens=max_tokens, ignore_eos=True))
        made = self._model._input(f"{name}-0", blank(seconds * 100))
        core = self._model._llm.input_processor.process_inputs(name, made, params, supported_tasks=("generate",))
        self._scheduler.add_request(self._request.from_engine_core_request(core, None))

    def request(self, name: str) -> Any:
        """Return the scheduler's state of a request."""
        return self._scheduler.requests[name]

    def run(self) -> tuple[dict[str, int], dict[str, int]]:
        """Run one step; return the computed tokens and the encoded audio tokens by request."""
        output = self._scheduler.schedule()
        computed = dict(output.num_scheduled_tokens)
        encoded = {
            name: sum(self._scheduler.requests[name].mm_features[i].mm_position.length for i in inputs)
            for name, inputs in output.scheduled_encoder_inputs.items()
        }
        names = list(computed)
        done = [self._scheduler.requests[name] for name in names]
        sampled = [[7] if not one.is_prefill_chunk else [] for one in done]
        (message,) = self._scheduler.update_from_output(
            output,
            self._outputs.ModelRunnerOutput(
                req_ids=names, req_id_to_index={name: i for i, name in enumerate(names)}, sampled_token_ids=sampled
            ),
        ).values()
        self.counted = message.scheduler_stats.step_counter
        self.answered = len(message.outputs)
        return computed, encoded


@pytest.fixture
def steps(engine: VllmEngine, scheduler: Any) -> Steps:
    """Return steps of an idle engine."""
    return Steps(engine, scheduler)


async def test_a_long_clip_takes_a_bounded_share_of_each_step(steps: Steps) -> None:
    """Long clips share a bound, also a single one; pieces are encoded when reached; the share falls along a clip."""
    steps.add("one", 2400)
    steps.add("two", 2400)
    shares: list[int] = []
    others: list[int] = []
    encoded_tokens: list[int] = []
    while sum(shares) < 31_200:
        computed, encoded = steps.run()
        others.append(computed.get("two", 0))
        shares.append(computed["one"])
        encoded_tokens.append(encoded.get("one", 0))
    assert shares[0] == 416
    # The second starts at once, and then gets the remainder that is too little for the first, until the first is done.
    assert others[0] == 1
    assert max(others[:-1]) <= 32
    assert shares[:-1] == sorted(shares[:-1], reverse=True)
    assert 11 <= shares[-2] <= 15
    assert max(encoded_tokens) == 416
    assert sum(encoded_tokens) == 31_200


async def test_the_shorter_of_long_clips_overtakes(steps: Steps) -> None:
    """A later, shorter clip is read before the rest of 40 minutes, unless that has waited for a tenth of its length."""
    steps.add("forty minutes", 2400)
    for _ in range(20):
        steps.run()
    steps.add("one minute", 60)
    steps.run()
    computed, _ = steps.run()
    assert computed["one minute"] > 100
    assert computed.get("forty minutes", 0) <= 1
    steps.request("forty minutes").arrival_time -= 300
    computed, _ = steps.run()
    assert computed["forty minutes"] > 50


async def test_a_long_clip_proceeds_however_far_it_is(steps: Steps, scheduler: Any) -> None:
    """A long clip gets a token in a step even where a single token exceeds the bound."""
    scheduler._long_tokens_per_step, scheduler._long_tokens_halve = 16, 20
    steps.add("long", 60)
    shares = [steps.run()[0]["long"] for _ in range(200)]
    assert shares[0] == 16
    assert shares[-1] == 1


async def test_running_captions_keep_half_of_each_step() -> None:
    """Long audios come first in a step, and take at most half of it."""
    module = importlib.import_module("serving.engine.vllm.async_llm")
    assert module._long_tokens_per_step(Settings(max_num_batched_tokens=512)) == 256
    assert module._long_tokens_per_step(Settings(max_num_batched_tokens=512, long_tokens_per_step=100)) == 100


async def test_a_step_without_a_token_is_counted(steps: Steps) -> None:
    """A step of prefill alone, in which no caption gets a token, adds one to the count that vLLM's statistics carry."""
    steps.add("long", 300)
    for number in range(1, 6):
        steps.run()
        assert (steps.counted, steps.answered) == (number, 0)


async def test_a_step_without_work_is_no_progress(scheduler: Any) -> None:
    """A step that computes nothing is not counted, so that the watchdog notices an engine that runs in vain."""
    outputs = importlib.import_module("vllm.v1.outputs")
    for _ in range(3):
        (message,) = scheduler.update_from_output(scheduler.schedule(), outputs.EMPTY_MODEL_RUNNER_OUTPUT).values()
        assert message.scheduler_stats.step_counter == 0


async def test_a_short_clip_starts_before_a_long_clip_proceeds(steps: Steps) -> None:
    """A short clip is read completely in the step after its arrival, without the long clips that came before it."""
    steps.add("long", 2400)
    for _ in range(20):
        steps.run()
    steps.add("later", 2400)
    steps.add("short", 5)
    computed, _ = steps.run()
    assert computed == {"later": 1, "short": 65 + 10}
    computed, _ = steps.run()
    assert computed["short"] == 1
    assert computed["long"] > 60


async def test_a_long_clip_proceeds_under_any_load(steps: Steps) -> None:
    """A long clip gets every fifth step even if a short clip arrives in every step."""
    steps.add("long", 600)
    proceeded = []
    for i in range(20):
        steps.add(f"short-{i}", 5, max_tokens=1)
        computed, _ = steps.run()
        proceeded.append(computed.get("long", 0) > 1)
    assert proceeded == [False, False, False, False, True] * 4


async def test_clips_up_to_thirty_seconds_are_not_held_back(steps: Steps) -> None:
    """Five clips of 30 s fill a step of 2048 tokens, as with vLLM's scheduler."""
    for i in range(5):
        steps.add(f"clip-{i}", 30)
    computed, encoded = steps.run()
    assert set(computed.values()) == {390 + 10}
    assert sum(encoded.values()) == 5 * 390


async def test_a_running_caption_proceeds_during_a_long_clip(engine: VllmEngine) -> None:
    """A running caption gets a token in each of the many steps of a 10-minute clip; a new short clip overtakes it."""

    async def count(features: Features, max_tokens: int) -> int:
        return len(await token_ids(engine, features, max_tokens=max_tokens, ignore_eos=True))

    running: list[int] = []

    async def keep_running() -> None:
        async for delta in engine.generate("running", sound(2), Sampling(max_tokens=30_000, ignore_eos=True)):
            running.append(delta.tokens)
            started.set()

    started = asyncio.Event()
    task = asyncio.create_task(keep_running())
    await started.wait()
    before = len(running)
    long = asyncio.create_task(count(sound(600), 1))
    await asyncio.sleep(0)
    assert await count(sound(5), 1) == 1
    assert not long.done()
    assert await long == 1
    assert len(running) - before > 40
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_steps_of_a_long_prefill_are_progress(engine: VllmEngine) -> None:
    """Steps are counted long before the clip's first token, so that no watchdog takes the prefill for a stall."""
    async with aclosing(engine.generate("long", sound(300), Sampling(max_tokens=1, ignore_eos=True))) as deltas:
        before = engine.steps
        await anext(deltas)
        assert engine.steps - before > 10


# ---- processes


@pytest.mark.parametrize("tensor_parallel", [1, 2])
async def test_ray_never_takes_over_the_workers(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch, tensor_parallel: int
) -> None:
    """Workers are processes of the engine, also in a placement group, where vLLM would choose Ray's workers."""
    module = importlib.import_module(type(model_of(engine)).__module__)
    ray = importlib.import_module("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(runtime_env=None))
    monkeypatch.setattr(ray.util, "get_current_placement_group", object)
    if tensor_parallel > 1:  # our executor prevents this
        plain = importlib.import_module("vllm.config").ParallelConfig(tensor_parallel_size=tensor_parallel)
        assert plain.distributed_executor_backend == "ray"
    parallel = module.engine_config(Settings(tensor_parallel=tensor_parallel)).parallel_config
    assert parallel.distributed_executor_backend.__module__ == "serving.engine.vllm.executor"
    assert not parallel.use_ray
