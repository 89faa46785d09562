"""On the CPU the model takes a shorter way to the same tokens."""

from __future__ import annotations

import asyncio
import importlib
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from serving.config import EMBEDDED_CHECKPOINT

if TYPE_CHECKING:
    from serving.engine.vllm.engine import VllmEngine

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

VOCABULARY = 816

BOTH_WAYS = """
import sys
import numpy as np
from vllm import LLM, SamplingParams
from serving.engine.vllm.cpu_kernels import Layer, lighten
from serving.engine.vllm.executor import SoloExecutor
from serving.engine.vllm.async_llm import PROMPT

llm = LLM(
    sys.argv[1], dtype="float32", max_model_len=4096, max_num_batched_tokens=256, enforce_eager=True, seed=0,
    limit_mm_per_prompt={"audio": 1, "image": 0, "video": 0}, distributed_executor_backend=SoloExecutor,
)
layers = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.get_model()
layers = layers.language_model.model.layers
assert [type(layer.forward) for layer in layers] == [Layer] * 4
random = np.random.default_rng(0)
clips = [random.normal(0, 0.1, 16_000 * seconds).astype(np.float32) for seconds in (1, 5, 9, 30)]
prompts = [{"prompt": PROMPT, "multi_modal_data": {"audio": (clip, 16_000)}} for clip in clips]
greedy = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, logprobs=1)

def captions():
    told = [output.outputs[0] for output in llm.generate(prompts, greedy, use_tqdm=False)]
    return [of.token_ids for of in told], [of.cumulative_logprob for of in told]

light = captions()
for layer in layers:
    del layer.forward  # the class's own is left
whole = captions()
assert light[0] == whole[0], "other tokens"
assert np.allclose(light[1], whole[1], atol=1e-3), "other probabilities"
"""


@pytest.mark.timeout(600)
async def test_all_layers_take_the_short_way_to_the_same_tokens() -> None:
    """The short way is taken by every layer, and gives vLLM's own tokens and probabilities, in chunked prefill too."""
    ours = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    ours |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    command = (sys.executable, "-c", BOTH_WAYS, str(EMBEDDED_CHECKPOINT))
    done = await asyncio.to_thread(
        subprocess.run, command, env=os.environ | ours, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def candidates_first(engine: VllmEngine) -> Any:
    """Imported with what the engine imports when it starts."""
    del engine
    return importlib.import_module("serving.engine.vllm.cpu_kernels").candidates_first


def shares(sampler: Any, logits: torch.Tensor, k: torch.Tensor, p: torch.Tensor, times: int) -> torch.Tensor:
    """How often each token is drawn for each row."""
    counts = torch.zeros_like(logits)
    for _ in range(times):
        many = logits.repeat(100, 1)
        drawn, _ = sampler(many, {}, k.repeat(100), p.repeat(100))
        counts += torch.nn.functional.one_hot(drawn.view(100, -1), logits.shape[1]).sum(0)
    return counts / (100 * times)


async def test_candidates_are_drawn_as_often_as_by_vllm(candidates_first: Any) -> None:
    """Top k, then top p, row by row: the same tokens can come, and they come as often."""
    torch.manual_seed(0)
    logits = torch.randn(5, VOCABULARY) * 3
    k, p = torch.tensor([20, 1, 5, 100, 20], dtype=torch.int32), torch.tensor([0.95, 1.0, 0.5, 0.9, 1.0])
    module = importlib.import_module("vllm.v1.sample.ops.topk_topp_sampler")
    theirs = module.TopKTopPSampler().forward_native
    expected, found = (shares(of, logits, k, p, 200) for of in (theirs, candidates_first(theirs)))
    assert (expected - found).abs().max() < 0.02
    kept = theirs_kept(logits, k, p)
    assert not found[~kept].any(), "a token that vLLM would never draw"


def theirs_kept(logits: torch.Tensor, k: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """What can be drawn, computed another way."""
    kept = torch.zeros_like(logits, dtype=torch.bool)
    for row, (of, most, share) in enumerate(zip(logits, k.tolist(), p.tolist(), strict=True)):
        ids = of.argsort(descending=True)[:most]
        before = 0.0
        for token, chance in zip(ids.tolist(), of[ids].softmax(-1).tolist(), strict=True):
            if before < share:
                kept[row, token] = True
            before += chance
    return kept


@pytest.mark.parametrize("k", [None, torch.tensor([VOCABULARY]), torch.tensor([129])])
async def test_who_does_not_choose_among_few_gets_vllms_own(candidates_first: Any, k: torch.Tensor | None) -> None:
    """Without a small top k there are no candidates to look for first."""
    sentinel = object()
    sampler = candidates_first(lambda *_: sentinel)
    assert sampler(torch.zeros(1, VOCABULARY), {}, k, None) is sentinel


async def test_a_seed_gives_what_it_always_gave(candidates_first: Any) -> None:
    """A request with a seed is sampled by vLLM, so that its answer does not change."""
    sentinel = object()
    sampler = candidates_first(lambda *_: sentinel)
    seeded = {0: torch.Generator()}
    assert sampler(torch.zeros(1, VOCABULARY), seeded, torch.tensor([20]), None) is sentinel
