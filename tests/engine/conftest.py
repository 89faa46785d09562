"""The real engine, started once for all tests, and sounds as its input."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import pytest_asyncio

from serving.audio.features import log_mel
from serving.config import EMBEDDED_CHECKPOINT, Settings
from serving.engine.vllm.engine import VllmEngine
from serving.types import SAMPLE_RATE, Features, FinishReason, Sampling
from tests.support.lazy import Lazy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    import numpy.typing as npt

transformers = Lazy("transformers")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engine() -> AsyncIterator[VllmEngine]:
    """The real engine with the embedded checkpoint and default settings."""
    engine = VllmEngine(Settings())
    try:
        await start(engine)
        yield engine
    finally:
        await engine.stop()


@pytest.fixture(scope="session")
def processor() -> Any:
    """The checkpoint's own preprocessing: chat template, feature extractor and placeholders."""
    return transformers.AutoProcessor.from_pretrained(EMBEDDED_CHECKPOINT)


@pytest.fixture
def no_stray_tasks(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    """Assert that no warning, as of a stray task, was raised."""
    yield
    assert not recwarn.list


async def start(engine: VllmEngine) -> None:
    """Start the engine, without the warnings that libraries raise on import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        await engine.start()


def waveform(seconds: float, seed: int = 0) -> npt.NDArray[np.float32]:
    """Return a gliding, pulsing tone in noise at 16 kHz; each seed sounds different."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    tone = np.sin(2 * np.pi * rng.uniform(100, 2000) * t * (1 + 0.05 * np.sin(t)))
    pulses = np.sin(2 * np.pi * rng.uniform(0.3, 6) * t) > rng.uniform(-0.5, 0.5)
    return (0.3 * tone * pulses + rng.normal(0, rng.uniform(0.001, 0.05), t.size)).astype(np.float32)


def sound(seconds: float, seed: int = 0) -> Features:
    """Return features of `waveform`, computed as the service does."""
    samples = waveform(seconds, seed)
    return Features(log_mel(samples), samples.size)


@dataclass(frozen=True)
class Caption:
    """The deltas of a caption, joined."""

    text: str
    tokens: int
    finish_reason: FinishReason | None


async def caption(engine: VllmEngine, features: Features, **sampling: Any) -> Caption:
    """Return the full caption; greedy unless `sampling` says otherwise."""
    text, tokens, finish_reason = "", 0, None
    async for delta in engine.generate("test", features, Sampling(**{"temperature": 0.0, **sampling})):
        assert finish_reason is None, "nothing comes after the finish reason"
        text, tokens, finish_reason = text + delta.text, tokens + delta.tokens, delta.finish_reason
    return Caption(text, tokens, finish_reason)


async def token_ids(engine: VllmEngine, features: Features, **sampling: Any) -> list[int]:
    """Return the tokens of the deltas, end of turn included; greedy unless `sampling` says otherwise."""
    return [token for token, _ in await candidates(engine, features, 0, **sampling)]


async def candidates(
    engine: VllmEngine, features: Features, count: int = 20, **sampling: Any
) -> list[tuple[int, dict[int, float]]]:
    """Return as `token_ids` each token, with the logarithms of the probabilities of the `count` likeliest."""
    model = engine._model
    assert model is not None
    own_id = f"tokens-{next(model._ids)}"
    params = model._params(Sampling(**{"temperature": 0.0, **sampling}))
    params.logprobs = count or None
    queue = await model._llm.add_request(own_id, model._input(own_id, features), params)
    found: list[tuple[int, dict[int, float]]] = []
    while True:
        output = await queue.get()
        (delta,) = output.outputs
        likely = [{token: each.logprob for token, each in step.items()} for step in delta.logprobs or ()]
        found += zip(delta.token_ids, likely or [{}] * len(delta.token_ids), strict=True)
        if output.finished:
            return found
