"""An engine without a model: fixed text at a fixed speed, deterministic, with faults on demand.

For tests, load generators and client development. A token is a word with the space before it; the words depend on the
features alone. There are no token ids, so stop tokens never match, and there is nothing to sample.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import os
import random
from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import TYPE_CHECKING, Any

from serving.engine.base import EngineDelta, Tally, ignore_start
from serving.errors import EngineFailed, NotReady
from serving.types import NO_TENANT, FinishReason, TokenLogprob

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator
    from pathlib import Path

    from serving.config import Settings
    from serving.engine.base import Load
    from serving.types import Features, Sampling, SchedulingClass

_STORY = (
    "A quiet room opens the clip, then a steady hum rises, a distant voice says something brief, and the hum fades."
)

_FINGERPRINT_FRAMES = 64
"""Frames in the fingerprint, so that a long clip costs no more than a short one."""


@dataclass(frozen=True, slots=True)
class Faults:
    """Faults of every generation, by the number of tokens before the fault (0: before the first token)."""

    fail_after_tokens: int | None = None
    hang_after_tokens: int | None = None

    @property
    def tokens(self) -> frozenset[int | None]:
        """Numbers of tokens before the faults."""
        return frozenset((self.fail_after_tokens, self.hang_after_tokens))


class FakeEngine:
    """An `Engine` that writes `fake_tokens` words: the first after `fake_ttft_s`, then one every `fake_tpot_s`.

    At most `concurrency` generations proceed at once; the others wait, and count as running. `finished`, `failed` and
    `aborted` count generations: each generation counts as exactly one of them, as `aborted` if it was closed or
    cancelled.
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
        self._slots: contextlib.AbstractAsyncContextManager[Any] = (
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
        """Crash: current generations (hanging or not) and later ones raise `EngineFailed`."""
        self._dead.set()

    async def generate(
        self,
        request_id: str,
        features: Features,
        sampling: Sampling,
        scheduling_class: SchedulingClass = NO_TENANT,
        on_started: Callable[[], None] = ignore_start,
    ) -> AsyncGenerator[EngineDelta]:
        """See `Engine`."""
        del scheduling_class  # admission control has chosen the order
        outcome = "aborted"
        try:
            await self.check_health()
            with self._tally.count(features):
                async with self._slots:
                    on_started()
                    loop = asyncio.get_running_loop()
                    due, held = loop.time() + self._ttft_s, EngineDelta("", 0)
                    faults = self._faults_of(request_id)
                    faulty = faults.tokens
                    for tokens, delta in enumerate(self._deltas(features, sampling)):
                        at = due + tokens * self._tpot_s
                        if held.tokens and (not self._merges or loop.time() < at or tokens in faulty):
                            yield self._logged(request_id, held)
                            held = EngineDelta("", 0)
                        await self._step(tokens, at, faults)
                        held = EngineDelta(
                            held.text + delta.text,
                            held.tokens + delta.tokens,
                            delta.finish_reason,
                            looped=delta.looped,
                            logprobs=held.logprobs + delta.logprobs,
                        )
                        if tokens == 0 and delta.finish_reason is None:
                            yield self._logged(request_id, held)
                            held = EngineDelta("", 0)
                    outcome = "finished"
                    yield self._logged(request_id, held)
        except (EngineFailed, NotReady):
            outcome = "failed"
            raise
        finally:
            self.finished += outcome == "finished"
            self.failed += outcome == "failed"
            self.aborted += outcome == "aborted"

    def _faults_of(self, request_id: str) -> Faults:
        """Return the faults of this generation; `fake_fail_share` of them fail, chosen by their id."""
        if not self._fail_share or (chance := random.Random(request_id)).random() >= self._fail_share:  # noqa: S311
            return self.faults
        return Faults(fail_after_tokens=chance.randrange(self._tokens))

    def _logged(self, request_id: str, delta: EngineDelta) -> EngineDelta:
        """Write `delta` to the log, if there is one, and return it."""
        if self._log:
            self._log.add(request_id, delta.tokens)
        return delta

    async def _step(self, tokens: int, due: float, faults: Faults) -> None:
        """Wait until the next token is due, on a schedule that does not drift, after `tokens` tokens."""
        if tokens == faults.hang_after_tokens:
            await self._dead.wait()
        while self._stall_file and self._stall_file.exists() and not self._dead.is_set():  # noqa: ASYNC110 - only tests set it
            await asyncio.sleep(0.05)
        await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
        if tokens == faults.fail_after_tokens or self._dead.is_set():
            raise EngineFailed
        self.steps += 1

    def _deltas(self, features: Features, sampling: Sampling) -> Iterator[EngineDelta]:
        """Yield a delta per token, and one for the end of turn unless a limit or a stop text comes first."""
        completes = not sampling.ignore_eos and self._tokens < sampling.max_tokens
        count = self._tokens if completes else sampling.max_tokens
        held = ""  # the end of the text, which may be the beginning of a stop text
        hold = max((len(stop) - 1 for stop in sampling.stop), default=0)
        for number, word in enumerate(islice(_words(features, self._text), count), 1):
            held += word
            likely = _logprobs(word, sampling.logprobs)
            if found := [held.index(stop) for stop in sampling.stop if stop in held]:
                yield EngineDelta(held[: min(found)], 1, FinishReason.STOP, logprobs=likely)
                return
            if number == count and not completes:
                yield EngineDelta(held, 1, FinishReason.LENGTH, logprobs=likely)
                return
            final = max(0, len(held) - hold)
            yield EngineDelta(held[:final], 1, logprobs=likely)
            held = held[final:]
        yield EngineDelta(held, 0, FinishReason.STOP)


def _logprobs(word: str, top: int | None) -> tuple[TokenLogprob, ...]:
    """Return a set probability of a word, 1/2, and of its alternatives, 1/4 and so on."""
    if top is None:
        return ()
    texts = (word, *(f"{word}{number}" for number in range(1, top)))[:top]
    return (TokenLogprob(word, -math.log(2), tuple((text, -(at + 1) * math.log(2)) for at, text in enumerate(texts))),)


class _Log:
    """A file with a line per delta: request id and tokens. Written at once, so it survives a kill."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def add(self, request_id: str, tokens: int) -> None:
        os.write(self._file, f"{request_id} {tokens}\n".encode())


def _words(features: Features, text: str | None) -> Iterator[str]:
    """Yield words without end: those of `text`, split at spaces and repeated; without it, words about the features."""
    step = max(1, features.log_mel.shape[1] // _FINGERPRINT_FRAMES)
    fingerprint = hashlib.blake2b(features.log_mel[:, ::step].tobytes(), digest_size=4).hexdigest()
    opening = f"This clip of {features.duration_s:.2f} seconds has the fingerprint {fingerprint}."
    words = chain(opening.split(), cycle(_STORY.split())) if text is None else cycle(text.split(" "))
    yield next(words)
    for word in words:
        yield f" {word}"
