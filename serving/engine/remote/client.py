"""Engine replicas behind sockets, as one engine: what runs in each frontend of a cluster (`server.py` is the other end).

Each clip goes to the replica with the least work in audio-seconds that still has room in its KV cache. A replica that
is lost (its process, its node, its network) or ails gets no more at once. What it had not begun to answer is asked once
more, of another one; a caption that had begun fails.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from contextlib import aclosing, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from serving import errors
from serving.engine.base import EngineDelta, Load, context_tokens
from serving.engine.remote.wire import PIECE_BYTES, SILENCE_S, STATE_EVERY_S, LinkError, frame, known, read_frame
from serving.errors import CaptionerError, EngineFailed, Internal, NotReady, Overloaded
from serving.observability.context import TRACE
from serving.types import NO_TENANT, FinishReason

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Sequence

    from serving.types import Features, Sampling, SchedulingClass

log = logging.getLogger(__name__)

_CONNECT_S = 5.0
_RETRY_CONNECT_S = 0.5
_NOTHING = Load(running=0, waiting=0, audio_s=0.0, kv_tokens=0, kv_capacity_tokens=0)


class RemoteEngine:
    """An `Engine` over the replicas at the addresses that `update` names.

    `retries` counts clips that were asked for a second time.
    """

    def __init__(self) -> None:
        self.retries = 0
        self._replicas: dict[str, _Replica] = {}
        self._leaving: set[_Replica] = set()

    @property
    def load(self) -> Load:
        """Of all replicas together, as they last told it."""
        loads = [replica.load for replica in self._replicas.values()]
        return Load(
            *(sum(values) for values in zip(*(asdict(load).values() for load in (*loads, _NOTHING)), strict=True))
        )

    @property
    def steps(self) -> int:
        """See `Engine`. Each replica watches its own."""
        return 0

    @property
    def replicas(self) -> dict[str, int]:
        """How many replicas are ready, how many are not."""
        ready = sum(replica.ready for replica in self._replicas.values())
        return {"ready": ready, "not_ready": len(self._replicas) - ready}

    def update(self, addresses: Iterable[str], secret: str) -> None:
        """Work with the replicas at these addresses (`host:port`); others finish what they have."""
        addresses = set(addresses)
        for address in addresses - self._replicas.keys():
            self._replicas[address] = _Replica(address)
        for address in self._replicas.keys() - addresses:
            replica = self._replicas.pop(address)
            self._leaving.add(replica)
            replica.leave(self._leaving.discard)
        for replica in self._replicas.values():
            replica.secret = secret

    async def start(self) -> None:
        """See `Engine`. Replicas come and go by `update`; none is waited for."""

    async def check_health(self) -> None:
        """See `Engine`. Replicas are replaced by others than us, so none ready is never fatal here."""
        if not any(replica.ready for replica in self._replicas.values()):
            raise NotReady

    async def generate(
        self, request_id: str, features: Features, sampling: Sampling, scheduling_class: SchedulingClass = NO_TENANT
    ) -> AsyncGenerator[EngineDelta]:
        """See `Engine`."""
        refused: set[_Replica] = set()
        tokens = context_tokens(features)
        error: CaptionerError = NotReady()
        while len(refused) < 2:  # noqa: PLR2004 - one try and one more
            if (replica := self._least_loaded(refused, tokens)) is None:
                break
            begun = False
            self.retries += bool(refused)
            try:
                async with aclosing(replica.generate(request_id, features, sampling, scheduling_class)) as deltas:
                    async for delta in deltas:
                        if not begun:
                            begun = True
                            del features  # the replica has them, and no other one is asked any more
                        yield delta
                    return
            except (EngineFailed, NotReady, Overloaded) as failure:
                # One that has waited its time need not begin anew at the end of another line.
                if begun or (isinstance(failure, Overloaded) and failure.reason == "engine_wait"):
                    raise
                error = failure.with_traceback(None)  # which would keep this frame, and the features, in a cycle
            refused.add(replica)
            log.warning("a replica refused a clip or was lost", extra={"request_id": request_id, "tries": len(refused)})
        try:
            raise error
        finally:
            del error

    async def stop(self) -> None:
        """See `Engine`."""
        replicas, self._replicas = [*self._replicas.values(), *self._leaving], {}
        await asyncio.gather(*(replica.stop() for replica in replicas))

    def _least_loaded(self, but: set[_Replica], tokens: int) -> _Replica | None:
        able = [replica for replica in self._replicas.values() if replica.ready and replica not in but]
        return min(able, key=lambda replica: replica.burden(tokens), default=None)


class _Replica:
    """One engine replica, and the connection to it: made anew until it leaves."""

    def __init__(self, address: str) -> None:
        self.load = _NOTHING
        self.secret = ""
        self._address = address
        self._state: dict[str, Any] = {}
        self._numbers = itertools.count()
        self._mailboxes: dict[int, _Mailbox] = {}
        self._unseen_s: dict[int, float] = {}
        self._heard = False
        self._writer: asyncio.StreamWriter | None = None
        self._left: Callable[[_Replica], None] | None = None
        self._running = asyncio.create_task(self._run())

    @property
    def ready(self) -> bool:
        """Whether it can take a clip now."""
        return self._writer is not None and bool(self._state.get("ready")) and not self._state.get("draining")

    def burden(self, tokens: int) -> tuple[bool, float, float]:
        """What to compare replicas by for a clip of so many tokens: without room for it last, then by audio-seconds.

        Clips that the told load cannot hold yet count as well, lest all of a burst go to one.
        """
        full = self.load.kv_tokens + tokens > self.load.kv_capacity_tokens
        used = self.load.kv_tokens / max(1, self.load.kv_capacity_tokens)
        return full, self.load.audio_s + sum(self._unseen_s.values()), used

    def leave(self, left: Callable[[_Replica], None]) -> None:
        """Take nothing more, and end when what runs has ended."""
        self._left, self._state = left, {}
        if not self._mailboxes:
            self._running.cancel()

    async def stop(self) -> None:
        """Hang up."""
        self._running.cancel()
        await asyncio.wait((self._running,))

    async def generate(
        self, request_id: str, features: Features, sampling: Sampling, scheduling_class: SchedulingClass
    ) -> AsyncGenerator[EngineDelta]:
        """See `Engine`."""
        number, mailbox, writer = next(self._numbers), _Mailbox(), self._writer
        if writer is None:
            raise NotReady
        self._mailboxes[number] = mailbox
        self._unseen_s[number] = features.duration_s
        ended = False
        try:
            # While the features go out, the answer may come already: a refusal.
            sending = asyncio.create_task(_send(writer, number, request_id, features, sampling, scheduling_class))
            del features
            try:
                while not ended:
                    delta = await mailbox.take()
                    ended = delta.finish_reason is not None
                    yield delta
            except CaptionerError:
                ended = True
                raise
            finally:
                sending.cancel()
        finally:
            del self._mailboxes[number]
            self._unseen_s.pop(number, None)
            if not ended and not writer.is_closing():
                writer.writelines(frame({"op": "abort", "id": number}))
            if self._left and not self._mailboxes:
                self._running.cancel()

    async def _run(self) -> None:
        try:
            while True:
                try:
                    await self._converse()
                except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
                    if isinstance(error, LinkError):
                        log.warning("the engine at %s broke the protocol: %s", self._address, error)
                await asyncio.sleep(_RETRY_CONNECT_S)
        finally:
            if self._left:
                self._left(self)

    async def _converse(self) -> None:
        """Connect, and read what the replica tells until the connection is lost."""
        host, _, port = self._address.rpartition(":")
        async with asyncio.timeout(_CONNECT_S):
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        try:
            writer.writelines(frame({"secret": self.secret}))
            self._writer = writer
            async with asyncio.timeout(None) as silence:
                watching = asyncio.create_task(self._watch(silence))
                try:
                    while True:
                        header, _ = await read_frame(reader)
                        self._heard = True
                        try:
                            self._take(header)
                        except (KeyError, TypeError, ValueError) as error:
                            raise LinkError(f"a malformed frame: {error!r}") from error
                finally:
                    watching.cancel()
        finally:
            self._writer, self._state, self.load = None, {}, _NOTHING
            writer.close()
            for mailbox in self._mailboxes.values():
                mailbox.fail(EngineFailed())

    async def _watch(self, silence: asyncio.Timeout) -> None:
        """End the conversation when the replica has told nothing for `SILENCE_S`.

        Counted in ticks of our own: when the whole machine has stood still, nobody is lost.
        """
        silent_ticks = 0
        while silent_ticks < SILENCE_S / STATE_EVERY_S:
            await asyncio.sleep(STATE_EVERY_S)
            silent_ticks, self._heard = 0 if self._heard else silent_ticks + 1, False
        silence.reschedule(asyncio.get_running_loop().time())

    def _take(self, header: dict[str, Any]) -> None:
        match header["op"]:
            case "state":
                if header["failed"] and not self._state.get("failed"):
                    log.error("the engine at %s has failed", self._address)
                self._state = {} if self._left else header
                self.load = known(Load, header["load"])
                for number in [number for number in self._unseen_s if number <= header["seen"]]:
                    del self._unseen_s[number]
            case "deltas":
                waited = dict(header.get("queue_s", ()))
                own = {number: counts for number, *counts in header.get("own", ())}
                for number, text, tokens, finish_reason in header["deltas"]:
                    if mailbox := self._mailboxes.get(number):
                        mailbox.put(text, tokens, finish_reason, waited.get(number, 0.0), own.get(number, (0, 0)))
            case "error":
                if mailbox := self._mailboxes.get(header["id"]):
                    mailbox.fail(_error(header))
            case other:
                raise LinkError(f"no such frame: {other}")


class _Mailbox:
    """What has come for one caption and was not taken yet, merged."""

    def __init__(self) -> None:
        self._queue_s = 0.0
        self._text: list[str] = []
        self._tokens = self._input_tokens = self._uncounted_tokens = 0
        self._finish_reason: FinishReason | None = None
        self._error: CaptionerError | None = None
        self._come = asyncio.Event()

    def put(self, text: str, tokens: int, finish_reason: str | None, queue_s: float, own: Sequence[int]) -> None:
        self._queue_s = self._queue_s or queue_s
        self._text.append(text)
        self._tokens += tokens
        self._input_tokens += own[0]
        self._uncounted_tokens += own[1]
        self._finish_reason = FinishReason(finish_reason) if finish_reason else None
        self._come.set()

    def fail(self, error: CaptionerError) -> None:
        self._error = error
        self._come.set()

    async def take(self) -> EngineDelta:
        """Wait for something, and take it all. What came before a failure is taken before it raises."""
        await self._come.wait()
        if self._text:
            delta = EngineDelta(
                "".join(self._text),
                self._tokens,
                self._finish_reason,
                self._queue_s,
                self._input_tokens,
                self._uncounted_tokens,
            )
            self._text, self._tokens, self._queue_s = [], 0, 0.0
            self._input_tokens = self._uncounted_tokens = 0
            if self._error is None:
                self._come.clear()
            return delta
        error, self._error = self._error or Internal(), None
        try:
            raise error
        finally:
            del error  # as above


async def _send(  # noqa: PLR0917 - one call
    writer: asyncio.StreamWriter,
    number: int,
    request_id: str,
    features: Features,
    sampling: Sampling,
    scheduling_class: SchedulingClass,
) -> None:
    """Send a request. Pieces wait for the socket, so that those of several clips alternate."""
    header = {"op": "generate", "id": number, "request_id": request_id, "sampling": asdict(sampling)}
    header |= {"share": asdict(scheduling_class), "samples": features.samples, "frames": features.log_mel.shape[1]}
    if trace := TRACE.get():
        header["trace"] = dict(trace)
    with suppress(OSError):  # whoever reads the answers learns of it
        writer.writelines(frame(header))
        log_mel = features.log_mel.data.cast("B")
        for first in range(0, len(log_mel), PIECE_BYTES):
            writer.writelines(frame({"op": "features", "id": number}, log_mel[first : first + PIECE_BYTES]))
            await writer.drain()


def _error(header: dict[str, Any]) -> CaptionerError:
    """The exception that a replica named."""
    kind = getattr(errors, str(header["error"]), None)
    if not (isinstance(kind, type) and issubclass(kind, CaptionerError)):
        return Internal()
    if issubclass(kind, Overloaded):
        return kind(header["message"], retry_after_s=header["retry_after_s"], reason=header["reason"])
    return kind(header["message"])
