"""The real engine with little room for context: overrun it preempts, behind the gate it does not."""

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
"""Of 128 tokens: room for five of the captions below, where the engine would run eight."""


class Preemptions:
    """Counts them, as one of vLLM's own loggers of statistics."""

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
    """The engine, and how often it has preempted."""
    scratch: Path = tmp_path_factory.mktemp("vllm")
    with warnings.catch_warnings(), _environment(SETTINGS, scratch):
        warnings.simplefilter("ignore")
        module: Any = importlib.import_module("serving.engine.vllm.async_llm")
    preemptions, llm = Preemptions(), module.AsyncLLM

    def from_vllm_config(config: Any, **_: Any) -> Any:
        return llm.from_vllm_config(config, stat_loggers=[preemptions])

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


async def test_the_gate_keeps_the_engine_from_preempting(cramped: tuple[VllmEngine, Preemptions]) -> None:
    """Of 8 captions that come at once, the bare engine preempts some; behind the gate it preempts none."""
    engine, preemptions = cramped
    await _overload(engine)
    assert preemptions.count > 0
    preemptions.count = 0
    await _overload(AdmissionControl(engine, SETTINGS))
    assert preemptions.count == 0
