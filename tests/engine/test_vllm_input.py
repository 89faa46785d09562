"""The input of the real engine: prompt, features, cache keys, and the count of its tokens."""

from __future__ import annotations

import asyncio
import importlib
import weakref
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import pytest

from serving.engine.base import PROMPT_TOKENS, audio_tokens, context_tokens
from serving.types import Sampling
from tests.engine.conftest import sound, waveform
from tests.engine.started import model_of, module_of
from tests.support.lazy import Lazy

if TYPE_CHECKING:
    import torch

    from serving.engine.vllm.engine import VllmEngine

else:
    torch = Lazy("torch")

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]


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
