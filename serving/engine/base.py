"""What the path asks of an engine. It never knows a wire format; `vllm.py` and `fake.py` are interchangeable."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from serving.types import NO_TENANT, SAMPLE_RATE

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from serving.types import Features, FinishReason, Sampling, SchedulingClass


@dataclass(frozen=True, slots=True)
class EngineDelta:
    """Text that became final since the last delta, and how many tokens were generated since then.

    The end-of-turn token is not counted (PROTOCOL 10.1). The last delta carries the finish reason; the first one, how
    long the caption waited for its turn.
    """

    text: str
    tokens: int
    finish_reason: FinishReason | None = None
    queue_s: float = 0.0
    input_tokens: int = 0
    """What the engine itself counts as input; with the first delta."""
    uncounted_tokens: int = 0
    """Generated, but no part of the caption: the end of turn."""


@dataclass(frozen=True, slots=True)
class Load:
    """What an engine has taken on, in the units by which one engine compares with another.

    `audio_s`: audio of the captions that run or wait, in seconds; `waiting_audio_s`: of those that wait.
    `kv_tokens`: tokens of context that what runs takes, or has reserved. `kv_capacity_tokens`: how many fit at once,
    however they are divided among captions; 0 until the model is loaded.
    """

    running: int
    waiting: int
    audio_s: float
    kv_tokens: int
    kv_capacity_tokens: int
    waiting_audio_s: float = 0.0


class Tally:
    """Counts what an engine runs."""

    def __init__(self) -> None:
        self.running = self._samples = self._input_tokens = 0

    @contextmanager
    def count(self, features: Features) -> Iterator[None]:
        """Count one caption while the context lasts."""
        samples, input_tokens = features.samples, context_tokens(features)
        del features  # 123 MB for the longest clip, not needed here
        self._add(1, samples, input_tokens)
        try:
            yield
        finally:
            self._add(-1, -samples, -input_tokens)

    def load(self, kv_capacity_tokens: int) -> Load:
        """The load of an engine with that capacity and no queue; of the context only the input is known."""
        return Load(self.running, 0, self._samples / SAMPLE_RATE, self._input_tokens, kv_capacity_tokens)

    def _add(self, captions: int, samples: int, input_tokens: int) -> None:
        self.running += captions
        self._samples += samples
        self._input_tokens += input_tokens


def audio_tokens(frames: int) -> int:
    """Tokens that the audio tower makes of that many frames of 10 ms: 13 per second, and of the rest one per 80 ms."""
    seconds, rest = divmod(frames, 100)
    for _ in range(3):  # each of three convolutions halves it, rounding up
        rest = (rest + 1) // 2
    return seconds * 13 + rest


PROMPT_TOKENS = 16
"""The prompt around the audio takes no more tokens of context than this (10 by the captioner's tokenizer)."""


def context_tokens(features: Features) -> int:
    """Tokens of context that the input takes: the model's own count, not the one that is billed."""
    return audio_tokens(features.log_mel.shape[1]) + PROMPT_TOKENS


class Engine(Protocol):
    """One captioning model behind an asynchronous interface."""

    @property
    def load(self) -> Load:
        """What it has taken on."""
        ...

    @property
    def steps(self) -> int:
        """Grows with whatever it computes, prefill included: an engine that owes tokens and does not step is stuck."""
        ...

    async def start(self) -> None:
        """Load the model; return when it can generate. Raises `EngineFailed`."""
        ...

    def generate(
        self, request_id: str, features: Features, sampling: Sampling, scheduling_class: SchedulingClass = NO_TENANT
    ) -> AsyncGenerator[EngineDelta]:
        """Yield deltas until one has a finish reason. `share` says whose it is, for where work waits.

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
