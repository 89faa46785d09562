"""Engine replicas behind sockets, used as one engine by each frontend of a cluster (`server.py` is the other end).

Each clip goes to the less loaded of two random replicas with room in their KV cache (`routing.py`). A replica that is
lost (its process, its node, its network) or unhealthy gets no further clips from that moment on. A clip for which the
lost replica had sent nothing yet is sent once more, to another replica; a caption that had begun fails.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from contextlib import aclosing, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

from serving.engine.base import EngineDelta, Load, context_tokens, ignore_start
from serving.engine.remote.routing import NO_LOAD, KnownLoad, choose
from serving.engine.remote.wire import (
    PIECE_BYTES,
    SILENCE_S,
    STATE_INTERVAL_S,
    Abort,
    Deltas,
    Failure,
    FeaturesPiece,
    Generate,
    Hello,
    Message,
    ProtocolError,
    State,
    encode,
    merge,
    read_message,
)
from serving.errors import CaptionerError, EngineFailed, Internal, NotReady, Overloaded
from serving.observability.context import TRACE
from serving.types import NO_TENANT

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable

    from serving.types import Features, Sampling, SchedulingClass

log = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 5.0
_RECONNECT_INTERVAL_S = 0.5
_NO_STATE = State(seen=-1, ready=False, failed=False, draining=False, load=NO_LOAD)


class RemoteEngine:
    """An `Engine` over the replicas at the addresses that `update` names.

    `retries` counts clips that were sent a second time, here or by the pipeline.
    """

    def __init__(self, randomness: random.Random | None = None) -> None:
        self.retries = 0
        self._random = randomness or random.Random()  # noqa: S311 - a choice of replicas, no secret
        self._replicas: dict[str, _Replica] = {}
        self._leaving: set[_Replica] = set()

    @property
    def load(self) -> Load:
        """Sum of the loads that the replicas reported last."""
        loads = [replica.load for replica in self._replicas.values()]
        return Load(
            *(sum(values) for values in zip(*(asdict(load).values() for load in (*loads, NO_LOAD)), strict=True))
        )

    @property
    def steps(self) -> int:
        """See `Engine`. Each replica watches its own engine for stalls."""
        return 0

    @property
    def replicas(self) -> dict[str, int]:
        """Number of replicas that are ready, and that are not."""
        ready = sum(replica.ready for replica in self._replicas.values())
        return {"ready": ready, "not_ready": len(self._replicas) - ready}

    def update(self, addresses: Iterable[str], secret: str) -> None:
        """Use the replicas at these addresses (`host:port`); replicas at other addresses finish what they have."""
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
        """See `Engine`. Return at once: replicas come and go by `update`, and none is waited for."""

    async def check_health(self) -> None:
        """See `Engine`. No ready replica is never fatal: Ray replaces replicas, not this process."""
        if not any(replica.ready for replica in self._replicas.values()):
            raise NotReady

    async def generate(
        self,
        request_id: str,
        features: Features,
        sampling: Sampling,
        scheduling_class: SchedulingClass = NO_TENANT,
        on_started: Callable[[], None] = ignore_start,
    ) -> AsyncGenerator[EngineDelta]:
        """See `Engine`."""
        refused: set[_Replica] = set()
        tokens = context_tokens(features)
        error: CaptionerError = NotReady()
        while len(refused) < 2:  # noqa: PLR2004 - one try and one more
            if (replica := self._choose(refused, tokens)) is None:
                break
            begun = False
            self.retries += bool(refused)
            try:
                async with aclosing(
                    replica.generate(request_id, features, sampling, scheduling_class, on_started)
                ) as deltas:
                    async for delta in deltas:
                        if not begun:
                            begun = True
                            del features  # this replica has them, and no other replica will be tried
                        yield delta
                    return
            except (EngineFailed, NotReady, Overloaded) as failure:
                # A clip that has waited its full time does not start again at the end of another queue.
                if begun or (isinstance(failure, Overloaded) and failure.reason == "engine_wait"):
                    raise
                error = failure.with_traceback(None)  # which would keep this frame, and the features, in a cycle
            refused.add(replica)
            log.warning(
                "engine replica refused a clip or was lost", extra={"request_id": request_id, "tries": len(refused)}
            )
        try:
            raise error
        finally:
            del error

    async def stop(self) -> None:
        """See `Engine`."""
        replicas, self._replicas = [*self._replicas.values(), *self._leaving], {}
        await asyncio.gather(*(replica.stop() for replica in replicas))

    def _choose(self, excluded: set[_Replica], tokens: int) -> _Replica | None:
        able = [replica for replica in self._replicas.values() if replica.ready and replica not in excluded]
        return choose(able, tokens, self._random)


class _Replica:
    """One engine replica and the connection to it, which is reopened until the replica leaves."""

    def __init__(self, address: str) -> None:
        self.secret = ""
        self.known = KnownLoad()
        self._address = address
        self._state = _NO_STATE
        self._numbers = itertools.count()
        self._mailboxes: dict[int, _Mailbox] = {}
        self._heard = False
        self._writer: asyncio.StreamWriter | None = None
        self._on_left: Callable[[_Replica], None] | None = None
        self._running = asyncio.create_task(self._run())

    @property
    def load(self) -> Load:
        """Load that the replica reported last."""
        return self.known.reported

    @property
    def ready(self) -> bool:
        """True while the replica accepts clips."""
        state = self._state
        return self._writer is not None and self._on_left is None and state.ready and not state.draining

    def leave(self, on_left: Callable[[_Replica], None]) -> None:
        """Accept no further clips, and disconnect when what runs has finished."""
        self._on_left = on_left
        if not self._mailboxes:
            self._running.cancel()

    async def stop(self) -> None:
        """Close the connection."""
        self._running.cancel()
        await asyncio.wait((self._running,))

    async def generate(
        self,
        request_id: str,
        features: Features,
        sampling: Sampling,
        scheduling_class: SchedulingClass,
        on_started: Callable[[], None],
    ) -> AsyncGenerator[EngineDelta]:
        """See `Engine`."""
        number, mailbox, writer = next(self._numbers), _Mailbox(on_started), self._writer
        if writer is None:
            raise NotReady
        self._mailboxes[number] = mailbox
        self.known.sent(number, features.duration_s, context_tokens(features))
        ended = False
        try:
            # A refusal may arrive while the features are still being sent.
            sending = asyncio.create_task(_send(writer, number, request_id, features, sampling, scheduling_class))
            sending.add_done_callback(mailbox.fail_with)
            del features
            try:
                while not ended:
                    delta = await mailbox.get()
                    ended = delta.finish_reason is not None
                    yield delta
            except CaptionerError:
                ended = True
                raise
            finally:
                sending.cancel()
        finally:
            del self._mailboxes[number]
            self.known.ended(number)
            if not ended and not writer.is_closing():
                writer.writelines(encode(Abort(number)))
            if self._on_left and not self._mailboxes:
                self._running.cancel()

    async def _run(self) -> None:
        try:
            while True:
                try:
                    await self._converse()
                except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
                    if isinstance(error, ProtocolError):
                        log.warning(
                            "engine replica broke the protocol", extra={"address": self._address, "error": str(error)}
                        )
                except Exception:
                    log.exception("conversation with an engine replica failed", extra={"address": self._address})
                await asyncio.sleep(_RECONNECT_INTERVAL_S)
        finally:
            if self._on_left:
                self._on_left(self)

    async def _converse(self) -> None:
        """Connect, and handle messages of the replica until the connection is lost."""
        host, _, port = self._address.rpartition(":")
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        try:
            writer.writelines(encode(Hello(self.secret)))
            self._writer = writer
            async with asyncio.timeout(None) as silence:
                watching = asyncio.create_task(self._watch(silence))
                try:
                    while True:
                        message = await read_message(reader)
                        self._heard = True
                        self._handle(message)
                finally:
                    watching.cancel()
        finally:
            self._writer, self._state = None, _NO_STATE
            self.known.report(NO_LOAD, seen=-1)
            writer.close()
            for mailbox in self._mailboxes.values():
                mailbox.fail(EngineFailed())

    async def _watch(self, silence: asyncio.Timeout) -> None:
        """End the conversation when nothing has arrived from the replica for `SILENCE_S`.

        The time is counted in ticks of this process: after the whole machine was suspended, no replica counts as lost.
        """
        silent_ticks = 0
        while silent_ticks < SILENCE_S / STATE_INTERVAL_S:
            await asyncio.sleep(STATE_INTERVAL_S)
            silent_ticks, self._heard = 0 if self._heard else silent_ticks + 1, False
        silence.reschedule(asyncio.get_running_loop().time())

    def _handle(self, message: Message) -> None:
        match message:
            case State():
                if message.failed and not self._state.failed:
                    log.error("engine replica has failed", extra={"address": self._address})
                self._state = message
                self.known.report(message.load, message.seen)
            case Deltas(deltas=deltas, started=started):
                for number in self._mailboxes.keys() & started:
                    self._mailboxes[number].on_started()
                for number, delta in deltas.items():
                    if mailbox := self._mailboxes.get(number):
                        mailbox.put(delta)
            case Failure(number=number):
                if mailbox := self._mailboxes.get(number):
                    mailbox.fail(message.exception())
            case other:
                raise ProtocolError(f"unexpected {type(other).__name__} from an engine replica")


class _Mailbox:
    """Deltas of one caption that have arrived and were not consumed yet, merged."""

    def __init__(self, on_started: Callable[[], None]) -> None:
        self.on_started = on_started
        self._delta: EngineDelta | None = None
        self._error: CaptionerError | None = None
        self._arrived = asyncio.Event()

    def put(self, delta: EngineDelta) -> None:
        self._delta = merge(self._delta, delta)
        self._arrived.set()

    def fail(self, error: CaptionerError) -> None:
        self._error = error
        self._arrived.set()

    def fail_with(self, sending: asyncio.Task[None]) -> None:
        """Fail if the request could not be sent."""
        if not sending.cancelled() and (error := sending.exception()) is not None:
            log.error("request to an engine replica could not be sent", exc_info=error)
            self.fail(Internal())

    async def get(self) -> EngineDelta:
        """Wait for deltas, and return them as one. Raise a failure after the deltas that arrived before it."""
        await self._arrived.wait()
        if (delta := self._delta) is not None:
            self._delta = None
            if self._error is None:
                self._arrived.clear()
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
    """Send a request. Each piece waits for the socket, so that pieces of several clips alternate."""
    request = Generate(
        number,
        request_id,
        sampling,
        scheduling_class,
        features.samples,
        frames=features.log_mel.shape[1],
        trace=TRACE.get(),
    )
    with suppress(OSError):  # the reader of the answers sees the lost connection
        writer.writelines(encode(request))
        log_mel = features.log_mel.data.cast("B")
        for first in range(0, len(log_mel), PIECE_BYTES):
            writer.writelines(encode(FeaturesPiece(number, log_mel[first : first + PIECE_BYTES])))
            await writer.drain()
