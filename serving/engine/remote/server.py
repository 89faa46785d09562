"""An engine behind a socket, in each engine replica of a cluster (`client.py` is the frontends' end)."""

from __future__ import annotations

import asyncio
import hmac
import logging
import socket
import time
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from serving.engine.remote.wire import (
    SILENCE_S,
    STATE_INTERVAL_S,
    Abort,
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
    split,
)
from serving.errors import AudioTooLong, CaptionerError, EngineFailed, Internal, NotReady, Overloaded
from serving.observability.context import REQUEST_ID, TRACE
from serving.scheduling.shared_capacity import SharedCapacity
from serving.types import FRAMES_PER_S, MELS, Features

if TYPE_CHECKING:
    from collections.abc import Callable

    from serving.config import Settings
    from serving.engine.base import Engine, EngineDelta

log = logging.getLogger(__name__)

_HELLO_TIMEOUT_S = 5.0
_WRITE_BUFFER_BYTES = 1024 * 1024
"""While more than this waits for a frontend that reads slowly, its deltas are kept here, merged."""

_UPLOAD_STALL_TIMEOUT_S = 30.0
"""A frontend that has begun a request and sends nothing of it for this time has stopped. A frontend whose machine is
gone is noticed sooner, by the states that nothing acknowledges."""


class EngineServer:
    """Server of `engine` for frontends that know the secret. It neither starts nor stops the engine."""

    def __init__(self, settings: Settings, engine: Engine, secret: Callable[[], str]) -> None:
        self.settings = settings
        self.engine = engine
        self.draining = False
        self.features = SharedCapacity(settings.max_features_bytes)
        self._secret = secret
        self._connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        """Port of the listening socket."""
        if self._server is None:
            raise NotReady
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    @property
    def features_bytes(self) -> int:
        """Bytes of features that the engine has not consumed."""
        return self.features.used

    @property
    def running(self) -> int:
        """Number of generations under way for frontends, waiting ones included."""
        return sum(len(connection.generations) for connection in self._connections)

    async def start(self, host: str, port: int = 0) -> None:
        """Listen on a port, any free one by default."""
        self._server = await asyncio.start_server(self._serve, host, port)

    async def drain(self) -> None:
        """Report to the frontends that no more is accepted, and return when everything that runs has finished."""
        self.draining = True
        for connection in self._connections:
            connection.send_state_now()
        while self.running:  # noqa: ASYNC110 - once in a replica's life
            await asyncio.sleep(STATE_INTERVAL_S)

    async def stop(self) -> None:
        """Close all connections; generations that still run are aborted. Idempotent."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        for connection in list(self._connections):
            connection.close()
        while self._connections:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)

    async def state(self, seen: int) -> State:
        """Return the state for a frontend whose last generation to arrive was `seen`."""
        ready, failed = True, False
        try:
            await self.engine.check_health()
        except CaptionerError as error:
            ready, failed = False, isinstance(error, EngineFailed)
        except Exception:
            log.exception("check of the engine failed unexpectedly")  # without a state the frontends would wait on
            ready, failed = False, True
        load = self.engine.load
        arriving_s = sum(connection.arriving_s for connection in self._connections)
        return State(seen, ready, failed, self.draining, replace(load, audio_s=load.audio_s + arriving_s))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(self, reader, writer)
        own: socket.socket = writer.get_extra_info("socket")
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * SILENCE_S))
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                hello = await read_message(reader)
            given = hello.secret if isinstance(hello, Hello) else ""
            if not hmac.compare_digest(given.encode(), self._secret().encode()):
                log.warning("connection without the cluster's secret refused")
                return
            self._connections.add(connection)
            await connection.run()
        except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
            if isinstance(error, ProtocolError):
                log.warning("frontend broke the protocol", extra={"error": str(error)})
        finally:
            await connection.end()
            self._connections.discard(connection)


class _Connection:
    """Connection of one frontend."""

    def __init__(self, server: EngineServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.generations: dict[int, asyncio.Task[None] | None] = {}  # None while the features arrive
        self._server = server
        self._reader = reader
        self._writer = writer
        self._incoming: dict[int, _Incoming] = {}
        self._outbox: dict[int, EngineDelta] = {}
        self._started: list[int] = []
        self._flushing = False
        self._seen = -1
        self._state_due = asyncio.Event()

    @property
    def arriving_s(self) -> float:
        """Seconds of audio whose features have not arrived in full."""
        return sum(incoming.frames for incoming in self._incoming.values()) / FRAMES_PER_S

    async def run(self) -> None:
        """Handle messages until the frontend closes the connection."""
        sending_states = asyncio.create_task(self._send_states())
        try:
            while True:
                self._handle(await read_message(self._reader))
        finally:
            sending_states.cancel()

    def _handle(self, message: Message) -> None:
        match message:
            case Generate():
                self._accept(message)
            case FeaturesPiece(number=number, data=data):
                self._add_features(number, data)
            case Abort(number=number):
                self._abort(number)
            case other:
                raise ProtocolError(f"unexpected {type(other).__name__} from a frontend")

    def close(self) -> None:
        """Send the deltas that are left, and close the connection."""
        self._flush(now=True)
        self._writer.close()

    async def end(self) -> None:
        """Abort the generations of this frontend, whose connection is gone."""
        self._writer.close()
        for number in list(self._incoming):
            self._drop(number)
        await asyncio.sleep(0)  # see `_abort`
        tasks = [task for task in self.generations.values() if task]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        with suppress(OSError):
            await self._writer.wait_closed()

    def send_state_now(self) -> None:
        """Send the state now rather than at the next interval."""
        self._state_due.set()

    async def _send_states(self) -> None:
        while True:
            self._drop_stalled()
            state = await self._server.state(self._seen)
            if self._writer.transport.get_write_buffer_size() <= _WRITE_BUFFER_BYTES:
                self._write(state)
            with suppress(TimeoutError):
                async with asyncio.timeout(STATE_INTERVAL_S):
                    await self._state_due.wait()
            self._state_due.clear()

    def _drop_stalled(self) -> None:
        """Refuse requests whose frontend has stopped in the middle of their features; others wait for that memory."""
        latest = time.monotonic() - _UPLOAD_STALL_TIMEOUT_S
        for number in [number for number, incoming in self._incoming.items() if incoming.heard_s < latest]:
            self._drop(number)
            self._fail(number, NotReady())

    def _accept(self, request: Generate) -> None:
        settings, number, frames = self._server.settings, request.number, request.frames
        if number in self.generations or frames <= 0:
            raise ProtocolError(f"{frames} frames for generation {number}")
        incoming = _Incoming(request, self._server.features)
        self.generations[number] = None
        self._seen = number
        if self._server.draining:
            self._fail(number, NotReady())
        elif frames > settings.max_audio_s * FRAMES_PER_S:
            self._fail(number, AudioTooLong())
        else:
            try:
                incoming.permit.grow(incoming.nbytes)
            except Overloaded as error:
                self._fail(number, error)
                return
            incoming.allocate()
            self._incoming[number] = incoming

    def _add_features(self, number: int, piece: bytes | memoryview) -> None:
        """Add a piece of features. Pieces of a refused or aborted request were under way, and are ignored."""
        if not (incoming := self._incoming.get(number)):
            return
        try:
            complete = incoming.add(piece)
        except ValueError as error:
            raise ProtocolError(f"too many bytes of features for generation {number}") from error
        if complete:
            del self._incoming[number]
            self.generations[number] = asyncio.create_task(self._generate(number, incoming))

    async def _generate(self, number: int, incoming: _Incoming) -> None:
        """Run one generation to its end. Its features count as memory until the engine has consumed them."""
        interval_s, loop = self._server.settings.stream_flush_interval_s, asyncio.get_running_loop()
        request, permit = incoming.request, incoming.permit
        try:
            features = incoming.features()
            del incoming
            REQUEST_ID.set(request.request_id)
            TRACE.set(request.trace)
            async with aclosing(
                self._server.engine.generate(
                    request.request_id,
                    features,
                    request.sampling,
                    request.scheduling_class,
                    lambda: self._report_start(number),
                )
            ) as deltas:
                del features
                async for delta in deltas:
                    permit.release()
                    self._outbox[number] = merge(self._outbox.get(number), delta)
                    self._flush_soon()
                    if delta.finish_reason is not None:
                        return
                    if interval_s:
                        # All generations wake on the same tick, so that one write carries the deltas of all. In the
                        # meantime the engine merges its deltas.
                        await asyncio.sleep(interval_s - loop.time() % interval_s)
            self._fail(number, EngineFailed())
        except CaptionerError as error:
            self._fail(number, error)
        except Exception:
            log.exception("generation failed unexpectedly")
            self._fail(number, Internal())
        except BaseException:
            # Cancelled, by an abort or by a fault of the engine. Without an end the frontend would wait on.
            self._fail(number, Internal())
            raise
        finally:
            permit.release()
            self.generations.pop(number, None)

    def _report_start(self, number: int) -> None:
        self._started.append(number)
        self._flush_soon()

    def _abort(self, number: int) -> None:
        self._outbox.pop(number, None)
        self._drop(number)
        if task := self.generations.get(number):
            # Not at once: a task that the frame before created would never start, and so not release its memory.
            asyncio.get_running_loop().call_soon(task.cancel)

    def _drop(self, number: int) -> None:
        """Discard features that have not arrived in full."""
        if incoming := self._incoming.pop(number, None):
            incoming.permit.release()
            del self.generations[number]

    def _fail(self, number: int, error: CaptionerError) -> None:
        self._flush(now=True)
        self._write(Failure.of(number, error))
        if self.generations.get(number) is None:
            self.generations.pop(number, None)

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self, *, now: bool = False) -> None:
        self._flushing = False
        if not (self._outbox or self._started) or self._writer.is_closing():
            return
        if not now and self._writer.transport.get_write_buffer_size() > _WRITE_BUFFER_BYTES:
            self._flushing = True
            asyncio.get_running_loop().call_later(0.05, self._flush)
            return
        for message in split(self._outbox, self._started):
            self._write(message)
        self._outbox.clear()
        self._started.clear()

    def _write(self, message: Message) -> None:
        if not self._writer.is_closing():
            self._writer.write(encode(message)[0])


class _Incoming:
    """A request whose features are arriving."""

    def __init__(self, request: Generate, capacity: SharedCapacity) -> None:
        self.request = request
        self.frames = request.frames
        self.nbytes = 4 * MELS * request.frames
        self.permit = capacity.permit(request.scheduling_class)
        self.heard_s = time.monotonic()
        """Time of the last piece."""
        self._filled = 0

    def allocate(self) -> None:
        """Allocate the memory of the features."""
        self._log_mel = np.empty((MELS, self.frames), np.float32)
        self._bytes = self._log_mel.data.cast("B")

    def add(self, piece: bytes | memoryview) -> bool:
        """Append a piece; return whether the features are complete. Raises `ValueError` if it does not fit."""
        self._bytes[self._filled : self._filled + len(piece)] = piece
        self._filled += len(piece)
        self.heard_s = time.monotonic()
        return self._filled == self.nbytes

    def features(self) -> Features:
        """Return the features, once they are complete."""
        return Features(self._log_mel, self.request.samples)
