"""An engine without a model: set text at a set speed, deterministic, with faults on demand.

For tests, load generators and client development. A token is a word with the space before it; which words, depends on
the features alone. Token ids mean nothing here, so stop tokens never match, and there is nothing to sample.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import TYPE_CHECKING, Any

from serving.engine.base import EngineDelta, Tally
from serving.errors import EngineFailed, NotReady
from serving.types import NO_TENANT, FinishReason

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator
    from pathlib import Path

    from serving.config import Settings
    from serving.engine.base import Load
    from serving.types import Features, Sampling, SchedulingClass

_STORY = (
    "A quiet room opens the clip, then a steady hum rises, a distant voice says something brief, and the hum fades."
)

_FINGERPRINT_FRAMES = 64
"""Frames that the fingerprint looks at, so that a long clip costs no more than a short one."""


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong with every generation, and after how many tokens (0: before the first)."""

    fail_after_tokens: int | None = None
    hang_after_tokens: int | None = None

    @property
    def tokens(self) -> frozenset[int | None]:
        """After how many tokens something goes wrong."""
        return frozenset((self.fail_after_tokens, self.hang_after_tokens))


class FakeEngine:
    """An `Engine` that says `fake_tokens` words: the first after `fake_ttft_s`, then one every `fake_tpot_s`.

    At most `concurrency` generations are under way at once; others wait for their turn, and count as running.
    `finished`, `failed` and `aborted` count generations: each ends as exactly one of them, as `aborted` if it was
    closed or cancelled.
    """

    def __init__(self, settings: Settings, *, concurrency: int | None = None, faults: Faults | None = None) -> None:
        self.faults = faults or Faults()
        self.finished = self.failed = self.aborted = self.steps = 0
        self._tally = Tally()
        self._kv_capacity_tokens = settings.fake_kv_tokens
        self._ttft_s = settings.fake_ttft_s
        self._tpot_s = settings.fake_tpot_s
        self._tokens = settings.fake_tokens
        self._text = settings.fake_text
        self._stall_file = settings.fake_stall_file
        self._merges = settings.stream_flush_interval_s > 0
        self._fail_share = settings.fake_fail_share
        self._log = _Log(settings.fake_log) if settings.fake_log else None
        self._turns: contextlib.AbstractAsyncContextManager[Any] = (
            asyncio.Semaphore(concurrency) if concurrency else contextlib.nullcontext()
        )
        self._ready = False
        self._dead = asyncio.Event()

    @property
    def load(self) -> Load:
        """See `Engine`."""
        return self._tally.load(self._kv_capacity_tokens if self._ready else 0)

    async def start(self) -> None:
        """See `Engine`."""
        self._ready = True

    async def check_health(self) -> None:
        """See `Engine`."""
        if self._dead.is_set():
            raise EngineFailed
        if not self._ready:
            raise NotReady

    async def stop(self) -> None:
        """See `Engine`."""
        self._ready = False

    def die(self) -> None:
        """Crash: what runs (hanging or not) and what comes raises `EngineFailed`."""
        self._dead.set()

    async def generate(
        self, request_id: str, features: Features, sampling: Sampling, scheduling_class: SchedulingClass = NO_TENANT
    ) -> AsyncGenerator[EngineDelta]:
        """See `Engine`."""
        del scheduling_class  # the order was chosen in front
        ended = "aborted"
        try:
            await self.check_health()
            with self._tally.count(features):
                async with self._turns:
                    loop = asyncio.get_running_loop()
                    due, held = loop.time() + self._ttft_s, EngineDelta("", 0)
                    faults = self._faults_of(request_id)
                    faulty = faults.tokens
                    for tokens, delta in enumerate(self._deltas(features, sampling)):
                        at = due + tokens * self._tpot_s
                        if held.tokens and (not self._merges or loop.time() < at or tokens in faulty):
                            yield self._told(request_id, held)
                            held = EngineDelta("", 0)
                        await self._step(tokens, at, faults)
                        held = EngineDelta(held.text + delta.text, held.tokens + delta.tokens, delta.finish_reason)
                        if tokens == 0 and delta.finish_reason is None:
                            yield self._told(request_id, held)
                            held = EngineDelta("", 0)
                    ended = "finished"
                    yield self._told(request_id, held)
        except (EngineFailed, NotReady):
            ended = "failed"
            raise
        finally:
            self.finished += ended == "finished"
            self.failed += ended == "failed"
            self.aborted += ended == "aborted"

    def _faults_of(self, request_id: str) -> Faults:
        """What goes wrong with this generation: with some, by their id, after some number of tokens."""
        if not self._fail_share or (chance := random.Random(request_id)).random() >= self._fail_share:  # noqa: S311
            return self.faults
        return Faults(fail_after_tokens=chance.randrange(self._tokens))

    def _told(self, request_id: str, delta: EngineDelta) -> EngineDelta:
        if self._log:
            self._log.add(request_id, delta.tokens)
        return delta

    async def _step(self, tokens: int, due: float, faults: Faults) -> None:
        """Wait until the next token is due, on a schedule that does not drift; `tokens` were generated before."""
        if tokens == faults.hang_after_tokens:
            await self._dead.wait()
        while self._stall_file and self._stall_file.exists() and not self._dead.is_set():  # noqa: ASYNC110 - a test's
            await asyncio.sleep(0.05)
        await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
        if tokens == faults.fail_after_tokens or self._dead.is_set():
            raise EngineFailed
        self.steps += 1

    def _deltas(self, features: Features, sampling: Sampling) -> Iterator[EngineDelta]:
        """One delta per token, and one more for the end of turn, unless a limit or a stop text comes first."""
        says_all = not sampling.ignore_eos and self._tokens < sampling.max_tokens
        count = self._tokens if says_all else sampling.max_tokens
        held = ""  # the end of the text, which may turn out to begin a stop text
        hold = max((len(stop) - 1 for stop in sampling.stop), default=0)
        for number, word in enumerate(islice(_words(features, self._text), count), 1):
            held += word
            if found := [held.index(stop) for stop in sampling.stop if stop in held]:
                yield EngineDelta(held[: min(found)], 1, FinishReason.STOP)
                return
            if number == count and not says_all:
                yield EngineDelta(held, 1, FinishReason.LENGTH)
                return
            final = max(0, len(held) - hold)
            yield EngineDelta(held[:final], 1)
            held = held[final:]
        yield EngineDelta(held, 0, FinishReason.STOP)


class _Log:
    """What was handed over, a line each: the request and how many tokens. Written at once: it survives a kill."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def add(self, request_id: str, tokens: int) -> None:
        os.write(self._file, f"{request_id} {tokens}\n".encode())


def _words(features: Features, text: str | None) -> Iterator[str]:
    """Endless words: the text's (only spaces divide them) over and over, or without one, some about these features."""
    step = max(1, features.log_mel.shape[1] // _FINGERPRINT_FRAMES)
    fingerprint = hashlib.blake2b(features.log_mel[:, ::step].tobytes(), digest_size=4).hexdigest()
    opening = f"This clip of {features.duration_s:.2f} seconds has the fingerprint {fingerprint}."
    words = chain(opening.split(), cycle(_STORY.split())) if text is None else cycle(text.split(" "))
    yield next(words)
    for word in words:
        yield f" {word}"
