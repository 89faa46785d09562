"""The real engine: every parameter has its effect, nothing is mixed up, nothing keeps running."""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
import os
import signal
import subprocess
import sys
import time
import weakref
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest
import pytest_asyncio

from serving.config import EMBEDDED_CHECKPOINT, Settings
from serving.engine.base import PROMPT_TOKENS, audio_tokens, context_tokens
from serving.engine.vllm.engine import VllmEngine, _environment
from serving.errors import AudioTooLong, EngineFailed, InvalidRequest, NotReady
from serving.types import Features, FinishReason, Sampling
from tests.engine.conftest import Caption, caption, sound, start, token_ids, waveform
from tests.support.lazy import Lazy

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    import torch

    from serving.engine.vllm.async_llm import LoadedModel
else:
    torch = Lazy("torch")
transformers = Lazy("transformers")

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]


@pytest.fixture(scope="module")
def processor() -> Any:
    """Return the checkpoint's own preprocessing."""
    return transformers.AutoProcessor.from_pretrained(EMBEDDED_CHECKPOINT)


def model_of(engine: VllmEngine) -> LoadedModel:
    """Return the loaded model of a started engine."""
    assert engine._model is not None
    return engine._model


def module_of(engine: VllmEngine) -> Any:
    """Return the module that the engine imports when it starts, and no test before."""
    return sys.modules[type(model_of(engine)).__module__]


def files_of(engine: VllmEngine) -> list[Path]:
    """Return sockets, temporary files, and their directory."""
    scratch = Path(engine._scratch.name)
    return [scratch, *scratch.iterdir()] if scratch.exists() else []


async def idle(engine: VllmEngine) -> bool:
    """Return whether nothing waits or runs in the engine process."""
    return not await model_of(engine)._llm.engine_core.call_utility_async("has_work")


async def within(seconds: float, condition: Callable[[], Awaitable[bool]]) -> bool:
    """Return whether the condition becomes true in time."""
    deadline = time.monotonic() + seconds
    while not await condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True


# ---- the input


async def test_the_prompt_is_the_chat_templates(engine: VllmEngine, processor: Any) -> None:
    """Our prompt is the template's rendering of one user message with one audio."""
    prompt = module_of(engine).PROMPT
    message = {"role": "user", "content": [{"type": "audio", "audio": "clip"}]}
    assert processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False) == prompt


@pytest.mark.parametrize("seconds", [0.5, 6.0, 31.07])
async def test_the_input_equals_vllms_own_preprocessing(engine: VllmEngine, seconds: float) -> None:
    """Token ids, placeholders, fields and features equal those of vLLM's own preprocessing."""
    parse_model_prompt = importlib.import_module("vllm.renderers.inputs.preprocess").parse_model_prompt
    model = model_of(engine)
    renderer = model._llm.renderer
    prompt = {"prompt": module_of(engine).PROMPT, "multi_modal_data": {"audio": [(waveform(seconds), 16_000)]}}
    parsed = parse_model_prompt(model._llm.model_config, prompt)
    (theirs,) = renderer.render_cmpl([parsed], renderer.default_cmpl_tok_params)
    ours = model._input("request-1", sound(seconds))

    assert ours["prompt_token_ids"] == theirs["prompt_token_ids"]
    assert ours["mm_placeholders"] == theirs["mm_placeholders"]
    (our_item,), (their_item,) = ours["mm_kwargs"]["audio"], theirs["mm_kwargs"]["audio"]
    assert our_item.keys() == their_item.keys()
    for name, theirs_elem in their_item.items():
        ours_elem = our_item[name]
        assert type(ours_elem.field) is type(theirs_elem.field)
        assert ours_elem.field.keep_on_cpu == theirs_elem.field.keep_on_cpu
        assert ours_elem.data.shape == theirs_elem.data.shape
        torch.testing.assert_close(ours_elem.data.float(), theirs_elem.data.float(), atol=1e-4, rtol=0)


async def test_no_two_requests_share_a_cache_key(engine: VllmEngine) -> None:
    """The same clip twice gets two keys; a client's request id cannot make them equal."""
    model = model_of(engine)
    async with (
        aclosing(engine.generate("same", sound(1), Sampling(ignore_eos=True))) as one,
        aclosing(engine.generate("same", sound(1), Sampling(ignore_eos=True))) as two,
    ):
        await asyncio.gather(anext(one), anext(two))
        ids = [own_id for own_id in model._llm.output_processor.external_req_ids if own_id.startswith("same")]
    assert len(ids) == 2
    hashes = [model._input(own_id, sound(1))["mm_hashes"]["audio"] for own_id in ids]
    assert hashes == [[f"{own_id}@0"] for own_id in ids]


async def test_features_reach_vllm_without_a_copy(engine: VllmEngine) -> None:
    """The tensor that is sent is the memory that the audio worker wrote."""
    features = sound(10)
    item = model_of(engine)._input("request-1", features)["mm_kwargs"]["audio"][0]
    assert item["input_audio_features"].data.data_ptr() == features.log_mel.ctypes.data


async def test_features_are_released_once_sent(engine: VllmEngine) -> None:
    """A caption in generation keeps no features: they are 123 MB for the longest audio."""
    features = sound(60)
    log_mel = weakref.ref(features.log_mel)
    async with aclosing(engine.generate("long", features, Sampling(max_tokens=1000, ignore_eos=True))) as deltas:
        del features
        await anext(deltas)
        assert log_mel() is None


async def test_audio_tokens_are_the_models_own_count(engine: VllmEngine) -> None:
    """`audio_tokens` is the model's formula for every length up to 30 s: 13 per second; 40 minutes fit the input."""
    theirs = importlib.import_module("vllm.model_executor.models.qwen3_omni_moe_thinker")
    frames = torch.arange(1, 3001)
    assert [audio_tokens(n) for n in frames.tolist()] == theirs._get_feat_extract_output_lengths(frames).tolist()
    assert audio_tokens(100) == 13
    assert audio_tokens(240_000) == 31_200


async def test_context_is_not_underestimated(engine: VllmEngine) -> None:
    """`context_tokens` of a clip covers its prompt, and all captions together fit the cache."""
    features, model = sound(6.0), model_of(engine)
    prompt = model._input("request-1", features)["prompt_token_ids"]
    assert len(prompt) <= context_tokens(features) <= len(prompt) + PROMPT_TOKENS
    cache = model._llm.vllm_config.cache_config
    assert cache.num_gpu_blocks is not None
    assert 0 < engine.load.kv_capacity_tokens < cache.num_gpu_blocks * cache.block_size


# ---- sampling


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


async def test_each_of_many_gets_its_own_caption(engine: VllmEngine) -> None:
    """32 different clips at once get the captions that each gets alone.

    All have at least a second: a shorter clip is encoded a little differently in a step with others (test_parity.py).
    """
    clips = [sound(1.5 + seed % 7, seed) for seed in range(32)]
    alone = [await caption(engine, features, max_tokens=16) for features in clips]
    assert len({one.text for one in alone}) > len(clips) / 2, "the captions must differ for this test to be significant"
    assert await asyncio.gather(*(caption(engine, features, max_tokens=16) for features in clips)) == alone


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


# ---- start and stop


@pytest.fixture
def dropped_sockets() -> Iterator[None]:
    """Collect the ZeroMQ context that vLLM leaves when loading fails; the collector warns of it."""
    yield
    gc.collect()


async def test_before_its_start_the_engine_is_not_ready() -> None:
    """Before the start, the health check and captions raise `NotReady`, and stopping does nothing."""
    engine = VllmEngine(Settings())
    with pytest.raises(NotReady):
        await engine.check_health()
    with pytest.raises(NotReady):
        await caption(engine, sound(1))
    await engine.stop()


@pytest.mark.usefixtures("dropped_sockets")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_checkpoint_that_cannot_be_loaded_fails_the_start(tmp_path: Path) -> None:
    """The start raises `EngineFailed`, and the engine can be stopped."""
    (tmp_path / "config.json").write_text("{}")
    engine = VllmEngine(Settings(model=str(tmp_path)))
    with pytest.raises(EngineFailed):
        await start(engine)
    await engine.stop()


@pytest.mark.usefixtures("dropped_sockets")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_stop_ends_a_start_under_way(engine: VllmEngine) -> None:
    """Stopping during the start ends the loading process and deletes its files; another engine is not affected."""
    before = set(psutil.Process().children(recursive=True))
    late = VllmEngine(Settings())
    starting = asyncio.create_task(start(late))

    async def spawned() -> bool:
        return bool(set(psutil.Process().children(recursive=True)) - before)

    assert await within(60, spawned)
    await late.stop()
    with pytest.raises(EngineFailed):
        await starting
    assert set(psutil.Process().children(recursive=True)) <= before
    assert not files_of(late)
    await engine.check_health()


async def test_an_engine_process_gets_none_of_the_services_variables(tmp_path: Path) -> None:
    """Variables of the service, which may be secrets, are kept out of processes started meanwhile and not lost here.

    vLLM's own processes overwrite the memory from which `/proc` shows their variables, so another process is started.
    """
    assert "CAPTIONER_DATA_DIR" in os.environ
    before = dict(os.environ)
    with _environment(Settings(), tmp_path):
        process = await asyncio.create_subprocess_exec("env", "-0", stdout=subprocess.PIPE)
        printed, _ = await process.communicate()
    variables = dict(line.split("=", 1) for line in printed.decode().split("\0") if line)
    assert variables["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert not [name for name in variables if name.startswith("CAPTIONER_")]
    assert dict(os.environ) == before


async def test_the_death_of_the_engine_is_noticed() -> None:
    """Ctrl-C does not reach the engine process; once it is dead, captions and the health check raise `EngineFailed`.

    Before that, steps are counted, although vLLM's own metrics are off.
    """
    engine = VllmEngine(Settings(vllm_metrics=False))
    await start(engine)
    (process,) = model_of(engine)._llm.engine_core.resources.engine_manager.processes
    async with aclosing(engine.generate("dies", sound(1), Sampling(max_tokens=30_000, ignore_eos=True))) as deltas:
        os.kill(process.pid, signal.SIGINT)
        steps = engine.steps
        for _ in range(20):
            await anext(deltas)
        assert engine.steps - steps > 10
        await engine.check_health()
        process.kill()
        with pytest.raises(EngineFailed):
            async for _ in deltas:
                pass
    with pytest.raises(EngineFailed):
        await engine.check_health()
    with pytest.raises(EngineFailed):
        await caption(engine, sound(1))
    await engine.stop()
    assert not psutil.pid_exists(process.pid)
    assert not files_of(engine)


async def test_stopping_fails_running_captions(caplog: pytest.LogCaptureFixture) -> None:
    """A caption in generation raises instead of waiting for ever, and nothing is logged as a failure."""
    engine = VllmEngine(Settings())
    await start(engine)
    logging.getLogger("vllm").addHandler(caplog.handler)
    (process,) = model_of(engine)._llm.engine_core.resources.engine_manager.processes
    async with aclosing(engine.generate("cut", sound(1), Sampling(max_tokens=30_000, ignore_eos=True))) as deltas:
        await anext(deltas)
        stopping = asyncio.create_task(engine.stop())
        with pytest.raises(EngineFailed):
            async for _ in deltas:
                pass
        await stopping
    logging.getLogger("vllm").removeHandler(caplog.handler)
    assert not caplog.records
    assert process.exitcode is not None


async def test_the_engine_ends_with_the_service() -> None:
    """A service that is killed (SIGKILL) leaves no engine process behind."""
    program = """
import asyncio
from serving.config import Settings
from serving.engine.vllm.engine import VllmEngine, _environment

async def main():
    engine = VllmEngine(Settings())
    await engine.start()
    print("ready", flush=True)
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""
    service = await asyncio.create_subprocess_exec(
        sys.executable, "-W", "ignore", "-c", program, stdout=asyncio.subprocess.PIPE
    )
    assert service.stdout is not None
    assert await service.stdout.readline() == b"ready\n"
    children = psutil.Process(service.pid).children(recursive=True)
    service.kill()
    await service.wait()
    assert children
    _, alive = await asyncio.to_thread(psutil.wait_procs, children, timeout=20)
    assert not alive
