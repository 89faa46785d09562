"""The real engine with little KV cache: overloaded it preempts, behind admission control it does not."""

from __future__ import annotations

import asyncio
import importlib
import warnings
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from serving.config import Settings
from serving.engine.admission_control import AdmissionControl
from serving.engine.vllm.engine import VllmEngine, _environment
from serving.types import Sampling
from tests.engine.conftest import sound, start

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from serving.engine.base import Engine

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

SETTINGS = Settings(max_num_seqs=8, max_model_len=2048, max_input_tokens=1024, max_output_tokens=1024)
BLOCKS = 24
"""KV cache in blocks of 128 tokens: enough for five of the captions below, where the engine would run eight."""


class Preemptions:
    """A stat logger of vLLM that counts preemptions."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *_: Any, **__: Any) -> Preemptions:
        return self

    def record(self, _scheduler: Any, iteration: Any, *_: Any, **__: Any) -> None:
        """See `StatLoggerBase`."""
        self.count += iteration.num_preempted_reqs if iteration else 0

    def log_engine_initialized(self) -> None:
        """See `StatLoggerBase`."""

    def log(self) -> None:
        """See `StatLoggerBase`."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cramped(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[VllmEngine, Preemptions]]:
    """Start the engine; yield it and its count of preemptions."""
    scratch: Path = tmp_path_factory.mktemp("vllm")
    with warnings.catch_warnings(), _environment(SETTINGS, scratch):
        warnings.simplefilter("ignore")
        module: Any = importlib.import_module("serving.engine.vllm.async_llm")
    preemptions, llm = Preemptions(), module.AsyncLLM

    def from_vllm_config(config: Any, *, stat_loggers: list[Any], **options: Any) -> Any:
        return llm.from_vllm_config(config, stat_loggers=[*stat_loggers, preemptions], **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "AsyncEngineArgs", partial(module.AsyncEngineArgs, num_gpu_blocks_override=BLOCKS))
        patch.setattr(module, "AsyncLLM", SimpleNamespace(from_vllm_config=from_vllm_config))
        engine = VllmEngine(SETTINGS)
        try:
            await start(engine)
            yield engine, preemptions
        finally:
            await engine.stop()


async def _overload(engine: Engine) -> None:
    async def one(seed: int) -> None:
        sampling = Sampling(temperature=0.0, ignore_eos=True, max_tokens=300)
        deltas = engine.generate(f"{seed}", sound(10.0, seed), sampling)
        assert sum([delta.tokens async for delta in deltas]) == 300

    await asyncio.gather(*(one(seed) for seed in range(8)))


async def test_admission_control_prevents_preemption(cramped: tuple[VllmEngine, Preemptions]) -> None:
    """The bare engine preempts some of 8 simultaneous captions; behind admission control it preempts none."""
    engine, preemptions = cramped
    await _overload(engine)
    assert preemptions.count > 0
    preemptions.count = 0
    await _overload(AdmissionControl(engine, SETTINGS))
    assert preemptions.count == 0
