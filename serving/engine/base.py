"""What the path asks of an engine. It never knows a wire format; `vllm.py` and `fake.py` are interchangeable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from serving.types import Features, FinishReason, Sampling


@dataclass(frozen=True, slots=True)
class EngineDelta:
    """Text that became final since the last delta, and how many tokens were generated since then.

    The end-of-turn token is not counted (PROTOCOL 10.1). The last delta carries the finish reason.
    """

    text: str
    tokens: int
    finish_reason: FinishReason | None = None


class Engine(Protocol):
    """One captioning model behind an asynchronous interface."""

    @property
    def running(self) -> int:
        """Generations under way."""
        ...

    async def start(self) -> None:
        """Load the model; return when it can generate. Raises `EngineFailed`."""
        ...

    def generate(self, request_id: str, features: Features, sampling: Sampling) -> AsyncGenerator[EngineDelta]:
        """Yield deltas until one has a finish reason.

        Closing the generator aborts the request in the engine at once. Raises `EngineFailed` when the engine dies and
        `InvalidRequest` when the parameters cannot be honoured.
        """
        ...

    async def check_health(self) -> None:
        """Return if the engine can generate; raise `NotReady` or `EngineFailed` if not."""
        ...

    async def stop(self) -> None:
        """Free everything. Idempotent."""
        ...
