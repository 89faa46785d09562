"""The insides of a started engine: its model, its files, and its state."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from serving.engine.vllm.async_llm import LoadedModel
    from serving.engine.vllm.engine import VllmEngine


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
