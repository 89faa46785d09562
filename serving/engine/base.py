"""The engine protocol: features in, deltas out, no wire format. vLLM, the remote and the fake engine implement it."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from serving.types import NO_TENANT, SAMPLE_RATE

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator

    from serving.types import Features, FinishReason, Sampling, SchedulingClass, TokenLogprob


@dataclass(frozen=True, slots=True)
class EngineDelta:
    """Text that became final since the last delta, and the number of tokens generated since then.

    The end-of-turn token is not counted (PROTOCOL 10.1). The last delta carries the finish reason; the first delta, the
    caption's wait for admission (`queue_s`).
    """

    text: str
    tokens: int
    finish_reason: FinishReason | None = None
    queue_s: float = 0.0
    input_tokens: int = 0
    """Input tokens by the engine's own count; in the first delta."""
    uncounted_tokens: int = 0
    """Generated tokens that are no part of the caption: the end of turn."""
    looped: bool = False
    """The engine ends the caption because it repeats itself; in the last delta, whose finish reason is a stop."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Probabilities of the counted tokens, if requested."""


@dataclass(frozen=True, slots=True)
class Load:
    """The load of an engine, in units that compare between engines.

    `audio_s`: audio of running and waiting captions, in seconds; `waiting_audio_s`: of the waiting captions alone.
    `kv_tokens`: tokens of context that running captions take, or have reserved. `kv_capacity_tokens`: tokens of context
    that fit at once, however they are divided among captions; 0 until the model is loaded.
    """

    running: int
    waiting: int
    audio_s: float
    kv_tokens: int
    kv_capacity_tokens: int
    waiting_audio_s: float = 0.0


class Tally:
    """A count of an engine's running captions."""

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
        """Return the load of an engine with that capacity and no queue; `kv_tokens` counts the input alone."""
        return Load(self.running, 0, self._samples / SAMPLE_RATE, self._input_tokens, kv_capacity_tokens)

    def _add(self, captions: int, samples: int, input_tokens: int) -> None:
        self.running += captions
        self._samples += samples
        self._input_tokens += input_tokens


def audio_tokens(frames: int) -> int:
    """Return the audio tower's tokens for `frames` of 10 ms: 13 per second, and for the rest one per 80 ms."""
    seconds, rest = divmod(frames, 100)
    for _ in range(3):  # each of three convolutions halves the frames, rounding up
        rest = (rest + 1) // 2
    return seconds * 13 + rest


PROMPT_TOKENS = 16
"""Upper bound of the context of the prompt around the audio, in tokens (10 by the captioner's tokenizer)."""


def context_tokens(features: Features) -> int:
    """Return the input's tokens of context: the model's own count, not the billed one."""
    return audio_tokens(features.log_mel.shape[1]) + PROMPT_TOKENS


def ignore_start() -> None:
    """Do nothing when the engine starts on a caption."""


class Engine(Protocol):
    """One captioning model behind an asynchronous interface."""

    @property
    def load(self) -> Load:
        """Current load."""
        ...

    @property
    def steps(self) -> int:
        """Number of steps, prefill included: an engine whose count stands still while captions run is stalled."""
        ...

    async def start(self) -> None:
        """Load the model; return when it can generate. Raises `EngineFailed`."""
        ...

    def generate(
        self,
        request_id: str,
        features: Features,
        sampling: Sampling,
        scheduling_class: SchedulingClass = NO_TENANT,
        on_started: Callable[[], None] = ignore_start,
    ) -> AsyncGenerator[EngineDelta]:
        """Yield deltas until one has a finish reason. `scheduling_class` orders the caption where captions wait.

        `on_started` is called when the engine starts on the caption, which waits no longer: from then on it costs work.
        Closing the generator aborts the request in the engine at once. Raises `EngineFailed` when the engine dies and
        `InvalidRequest` when the parameters cannot be honoured.
        """
        ...

    async def check_health(self) -> None:
        """Return if the engine can generate. Raises `NotReady` or `EngineFailed` if not."""
        ...

    async def stop(self) -> None:
        """Release everything. Idempotent."""
        ...
