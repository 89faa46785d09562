"""Admission control over a fake engine in simulated time."""

from __future__ import annotations

import asyncio
import contextlib
import selectors
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from serving.config import Settings
from serving.engine.admission_control import AdmissionControl
from serving.engine.base import EngineDelta, ignore_start
from serving.engine.fake import FakeEngine, Faults
from serving.types import NO_TENANT, Features, Sampling

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine

    from serving.types import SchedulingClass


class SimulatedLoop(asyncio.SelectorEventLoop):
    """A loop whose clock jumps to the next timer instead of waiting for it."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        loop = self

        class Skip(selectors.DefaultSelector):
            def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
                if timeout:
                    loop.now_s += timeout
                return super().select(0 if timeout is not None else None)

        super().__init__(Skip())

    def time(self) -> float:
        return self.now_s


def simulate(main: Coroutine[Any, Any, None]) -> None:
    """Run `main` to its end in simulated time."""
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        runner.run(main)


def clip(seconds: float) -> Features:
    """Return features of silence."""
    return Features(np.broadcast_to(np.float32(0), (128, max(1, round(seconds * 100)))), round(seconds * 16_000))


@dataclass
class Seen:
    """Captions that reached the engine: their order, and the most at once."""

    order: list[str]
    most: int = 0


class Watched(FakeEngine):
    """A fake engine that records the captions it gets."""

    def __init__(self, settings: Settings, **options: Any) -> None:
        super().__init__(settings, **options)
        self.seen = Seen([])

    async def generate(
        self,
        request_id: str,
        features: Features,
        sampling: Sampling,
        scheduling_class: SchedulingClass = NO_TENANT,
        on_started: Callable[[], None] = ignore_start,
    ) -> AsyncGenerator[EngineDelta]:
        """See `Engine`."""
        del on_started  # admission control is the one that knows
        self.seen.order.append(request_id)
        async with aclosing(super().generate(request_id, features, sampling, scheduling_class)) as deltas:
            async for delta in deltas:
                self.seen.most = max(self.seen.most, self.load.running)
                yield delta


@contextlib.asynccontextmanager
async def admission(faults: Faults | None = None, **changes: Any) -> AsyncGenerator[tuple[AdmissionControl, Watched]]:
    """Start admission control with a watched engine behind it; yield both."""
    chosen = Settings(engine="fake", **{"fake_tpot_s": 0.01, "fake_ttft_s": 0.1, **changes})
    engine = Watched(chosen, faults=faults)
    control = AdmissionControl(engine, chosen)
    await control.start()
    try:
        yield control, engine
    finally:
        await control.stop()


async def run(
    control: AdmissionControl,
    name: str = "id",
    seconds: float = 5,
    scheduling_class: SchedulingClass = NO_TENANT,
    **sampling: Any,
) -> int:
    """Run one caption to its end; return its number of tokens."""
    return sum(
        [delta.tokens async for delta in control.generate(name, clip(seconds), Sampling(**sampling), scheduling_class)]
    )


def assert_empty(control: AdmissionControl) -> None:
    """Assert that nothing runs, waits or is reserved."""
    assert (control.load.running, control.load.waiting, control.load.kv_tokens, control.load.audio_s) == (0, 0, 0, 0)
    assert not control._awaited
    assert control._long_prefill is None
