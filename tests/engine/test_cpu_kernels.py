"""The direct CPU kernels give vLLM's own tokens, and the setting `cpu_kernels` switches them."""

from __future__ import annotations

import asyncio
import importlib
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from serving.config import EMBEDDED_CHECKPOINT, Settings
from tests.support.lazy import Lazy

if TYPE_CHECKING:
    import torch

    from serving.engine.vllm.engine import VllmEngine
else:
    torch = Lazy("torch")

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

VOCABULARY = 816

BOTH_WAYS = """
import sys
import numpy as np
from vllm import LLM, SamplingParams
from serving.engine.vllm.cpu_kernels import Layer
from serving.engine.vllm.executor import InProcessExecutor
from serving.engine.vllm.async_llm import PROMPT

llm = LLM(
    sys.argv[1], dtype="float32", max_model_len=4096, max_num_batched_tokens=256, enforce_eager=True, seed=0,
    limit_mm_per_prompt={"audio": 1, "image": 0, "video": 0}, distributed_executor_backend=InProcessExecutor,
    additional_config={"cpu_kernels": True},
)
layers = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.get_model()
layers = layers.language_model.model.layers
assert [type(layer.forward) for layer in layers] == [Layer] * 4
random = np.random.default_rng(0)
clips = [random.normal(0, 0.1, 16_000 * seconds).astype(np.float32) for seconds in (1, 5, 9, 30)]
prompts = [{"prompt": PROMPT, "multi_modal_data": {"audio": (clip, 16_000)}} for clip in clips]
greedy = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, logprobs=1)

def captions():
    outputs = [output.outputs[0] for output in llm.generate(prompts, greedy, use_tqdm=False)]
    return [output.token_ids for output in outputs], [output.cumulative_logprob for output in outputs]

direct = captions()
for layer in layers:
    del layer.forward  # the class's own remains
vllms = captions()
assert direct[0] == vllms[0], "other tokens"
assert np.allclose(direct[1], vllms[1], atol=1e-3), "other probabilities"
"""


@pytest.mark.timeout(600)
async def test_direct_kernels_give_the_same_tokens() -> None:
    """Switched on, every layer is patched and gives vLLM's own tokens and probabilities, in chunked prefill too."""
    ours = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    ours |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    command = (sys.executable, "-c", BOTH_WAYS, str(EMBEDDED_CHECKPOINT))
    done = await asyncio.to_thread(
        subprocess.run, command, env=os.environ | ours, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("setting", "model", "expected"),
    [
        (None, str(EMBEDDED_CHECKPOINT), True),
        (None, "another/checkpoint", False),
        (True, "another/checkpoint", True),
        (False, str(EMBEDDED_CHECKPOINT), False),
    ],
)
async def test_the_setting_and_its_default(
    engine: VllmEngine,
    monkeypatch: pytest.MonkeyPatch,
    setting: bool | None,  # noqa: FBT001 - a parameter of the test
    model: str,
    expected: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    """By default the embedded checkpoint on a CPU has the direct kernels, and nothing else; a GPU never has them."""
    module = importlib.import_module("serving.engine.vllm.async_llm")
    settings = Settings(model=model, cpu_kernels=setting)
    assert module._cpu_kernels(settings) is expected
    if settings.is_embedded:
        assert module.engine_config(settings).additional_config["cpu_kernels"] is expected
    monkeypatch.setattr(module, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    assert module._cpu_kernels(settings) is False


@pytest.mark.parametrize(
    ("additional_config", "patched"), [({"cpu_kernels": True}, 1), ({"cpu_kernels": False}, 0), ({}, 0)]
)
async def test_the_executor_patches_only_on_request(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch, additional_config: dict[str, bool], patched: int
) -> None:
    """The executor patches the layers of the loaded model if vLLM's `additional_config` says so, and else does not."""
    del engine
    module = importlib.import_module("serving.engine.vllm.executor")
    kernels = importlib.import_module("serving.engine.vllm.cpu_kernels")
    runners: list[str] = []
    monkeypatch.setattr(kernels, "patch_decoder_layers", runners.append)
    monkeypatch.setattr(module, "_stop_with_service", lambda: None)
    monkeypatch.setattr(module.atexit, "register", lambda _: None)
    monkeypatch.setattr(module.UniProcExecutor, "_init_executor", lambda _: None)
    executor = module.InProcessExecutor.__new__(module.InProcessExecutor)
    executor.vllm_config = SimpleNamespace(additional_config=additional_config)
    executor.driver_worker = SimpleNamespace(worker=SimpleNamespace(model_runner="runner"))
    executor._init_executor()
    assert runners == ["runner"] * patched


@pytest.fixture
def topk_first_sampler(engine: VllmEngine) -> Any:
    """The function, imported after the engine has imported vLLM with the right environment."""
    del engine
    return importlib.import_module("serving.engine.vllm.cpu_kernels").topk_first_sampler


def shares(sampler: Any, logits: torch.Tensor, k: torch.Tensor, p: torch.Tensor, times: int) -> torch.Tensor:
    """Return the frequency of each token for each row."""
    counts = torch.zeros_like(logits)
    for _ in range(times):
        many = logits.repeat(100, 1)
        drawn, _ = sampler(many, {}, k.repeat(100), p.repeat(100))
        counts += torch.nn.functional.one_hot(drawn.view(100, -1), logits.shape[1]).sum(0)
    return counts / (100 * times)


async def test_candidates_are_drawn_as_often_as_by_vllm(topk_first_sampler: Any) -> None:
    """With top k and top p per row, the same tokens are drawn as by vLLM, with the same frequencies."""
    torch.manual_seed(0)
    logits = torch.randn(5, VOCABULARY) * 3
    k, p = torch.tensor([20, 1, 5, 100, 20], dtype=torch.int32), torch.tensor([0.95, 1.0, 0.5, 0.9, 1.0])
    module = importlib.import_module("vllm.v1.sample.ops.topk_topp_sampler")
    vllms = module.TopKTopPSampler().forward_native
    expected, found = (shares(sampler, logits, k, p, 200) for sampler in (vllms, topk_first_sampler(vllms)))
    assert (expected - found).abs().max() < 0.02
    kept = reachable(logits, k, p)
    assert not found[~kept].any(), "a token that vLLM would never draw"


def reachable(logits: torch.Tensor, k: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Return the tokens that can be drawn, computed another way."""
    kept = torch.zeros_like(logits, dtype=torch.bool)
    for row, (row_logits, most, share) in enumerate(zip(logits, k.tolist(), p.tolist(), strict=True)):
        ids = row_logits.argsort(descending=True)[:most]
        before = 0.0
        for token, chance in zip(ids.tolist(), row_logits[ids].softmax(-1).tolist(), strict=True):
            if before < share:
                kept[row, token] = True
            before += chance
    return kept


@pytest.mark.parametrize("k", [None, [VOCABULARY], [129]])
async def test_without_a_small_top_k_vllm_samples(topk_first_sampler: Any, k: list[int] | None) -> None:
    """Without a top k of at most 128, vLLM's own sampler is called."""
    sentinel = object()
    sampler = topk_first_sampler(lambda *_: sentinel)
    assert sampler(torch.zeros(1, VOCABULARY), {}, None if k is None else torch.tensor(k), None) is sentinel


async def test_a_seeded_request_is_sampled_by_vllm(topk_first_sampler: Any) -> None:
    """A request with a seed is sampled by vLLM, so that its answer does not change."""
    sentinel = object()
    sampler = topk_first_sampler(lambda *_: sentinel)
    seeded = {0: torch.Generator()}
    assert sampler(torch.zeros(1, VOCABULARY), seeded, torch.tensor([20]), None) is sentinel
