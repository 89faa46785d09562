"""An engine behind a socket: what runs in each engine replica, for the frontends of a cluster (`remote.py`)."""

from __future__ import annotations

import asyncio
import hmac
import logging
import socket
import time
from contextlib import aclosing, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from serving.engine.remote.wire import SILENCE_S, STATE_EVERY_S, LinkError, frame, known, read_frame
from serving.errors import AudioTooLong, CaptionerError, EngineFailed, Internal, NotReady, Overloaded
from serving.observability.context import REQUEST_ID, TRACE
from serving.scheduling.shared_capacity import SharedCapacity
from serving.types import FRAMES_PER_S, MELS, Features, Sampling, SchedulingClass

if TYPE_CHECKING:
    from collections.abc import Callable

    from serving.config import Settings
    from serving.engine.base import Engine, EngineDelta

log = logging.getLogger(__name__)

_HELLO_S = 5.0
_WRITE_BUFFER_BYTES = 1024 * 1024
"""When a frontend reads this much too slowly, its deltas wait here, merged."""

_STALLED_S = 30.0
"""A frontend that sends nothing of a request it has begun for so long has stopped; one whose machine is gone is noticed
sooner, by the states that nothing acknowledges."""


class EngineServer:
    """Serves `engine` to frontends that know the secret. It neither starts nor stops the engine."""

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
        """The port that it listens on."""
        if self._server is None:
            raise NotReady
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    @property
    def features_bytes(self) -> int:
        """Memory of features that have not been consumed."""
        return self.features.used

    @property
    def running(self) -> int:
        """Generations under way for frontends, those that wait included."""
        return sum(len(connection.generations) for connection in self._connections)

    async def start(self, host: str, port: int = 0) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._serve, host, port)

    async def drain(self) -> None:
        """Tell the frontends to send no more, and return when all that runs has ended."""
        self.draining = True
        for connection in self._connections:
            connection.tell_state()
        while self.running:  # noqa: ASYNC110 - once in a replica's life
            await asyncio.sleep(STATE_EVERY_S)

    async def stop(self) -> None:
        """Hang up; what still runs is aborted. Idempotent."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        for connection in list(self._connections):
            connection.close()
        while self._connections:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)

    async def state(self) -> dict[str, Any]:
        """What frontends are told, again and again."""
        ready, failed = True, False
        try:
            await self.engine.check_health()
        except CaptionerError as error:
            ready, failed = False, isinstance(error, EngineFailed)
        load = asdict(self.engine.load)
        load["audio_s"] += sum(connection.arriving_s for connection in self._connections)
        return {"ready": ready, "failed": failed, "draining": self.draining, "load": load}

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(self, reader, writer)
        own: socket.socket = writer.get_extra_info("socket")
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * SILENCE_S))
        try:
            async with asyncio.timeout(_HELLO_S):
                header, _ = await read_frame(reader)
            if not hmac.compare_digest(str(header.get("secret")).encode(), self._secret().encode()):
                log.warning("a caller without the cluster's secret was turned away")
                return
            self._connections.add(connection)
            await connection.run()
        except (OSError, asyncio.IncompleteReadError, LinkError, TimeoutError) as error:
            if isinstance(error, LinkError):
                log.warning("a frontend broke the protocol: %s", error)
        finally:
            await connection.end()
            self._connections.discard(connection)


class _Connection:
    """One frontend."""

    def __init__(self, server: EngineServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.generations: dict[int, asyncio.Task[None] | None] = {}  # None while its features arrive
        self._server = server
        self._reader = reader
        self._writer = writer
        self._incoming: dict[int, _Incoming] = {}
        self._outbox: dict[int, list[Any]] = {}
        self._waited: list[tuple[int, float]] = []
        self._own: dict[int, list[int]] = {}
        self._flushing = False
        self._seen = -1
        self._state_due = asyncio.Event()

    @property
    def arriving_s(self) -> float:
        """Audio whose features have not arrived in full."""
        return sum(incoming.frames for incoming in self._incoming.values()) / FRAMES_PER_S

    async def run(self) -> None:
        """Answer frames until the frontend hangs up."""
        telling = asyncio.create_task(self._tell_states())
        try:
            while True:
                header, payload = await read_frame(self._reader)
                match header.get("op"):
                    case "generate":
                        self._accept(header)
                    case "features":
                        self._take(header["id"], payload)
                    case "abort":
                        self._abort(header["id"])
                    case other:
                        raise LinkError(f"no such frame: {other}")
        except (KeyError, TypeError, ValueError) as error:
            raise LinkError(f"a malformed frame: {error!r}") from error
        finally:
            telling.cancel()

    def close(self) -> None:
        """Hang up, with all said."""
        self._flush(now=True)
        self._writer.close()

    async def end(self) -> None:
        """Abort what runs for this frontend, whose connection is gone."""
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

    def tell_state(self) -> None:
        """Tell the state now rather than when it is due."""
        self._state_due.set()

    async def _tell_states(self) -> None:
        while True:
            self._drop_stalled()
            state = {"op": "state", "seen": self._seen, **await self._server.state()}
            if self._writer.transport.get_write_buffer_size() <= _WRITE_BUFFER_BYTES:
                self._write(state)
            with suppress(TimeoutError):
                async with asyncio.timeout(STATE_EVERY_S):
                    await self._state_due.wait()
            self._state_due.clear()

    def _drop_stalled(self) -> None:
        """Give up requests whose frontend has stopped in the middle of their features: others wait for that room."""
        latest = time.monotonic() - _STALLED_S
        for number in [number for number, incoming in self._incoming.items() if incoming.heard_s < latest]:
            self._drop(number)
            self._fail(number, NotReady())

    def _accept(self, header: dict[str, Any]) -> None:
        settings, number, frames = self._server.settings, int(header["id"]), int(header["frames"])
        incoming = _Incoming(header, frames, self._server.features)
        if number in self.generations or frames <= 0:
            raise LinkError(f"{frames} frames for generation {number}")
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

    def _take(self, number: int, piece: bytes) -> None:
        """Add a piece of features. One that was refused or aborted has no place: its pieces were under way."""
        if (incoming := self._incoming.get(number)) and incoming.add(piece):
            del self._incoming[number]
            self.generations[number] = asyncio.create_task(self._generate(number, incoming))

    async def _generate(self, number: int, incoming: _Incoming) -> None:
        """Run one generation to its end. Its features count as memory until the engine has consumed them."""
        pace_s, loop = self._server.settings.stream_flush_interval_s, asyncio.get_running_loop()
        scheduling_class, permit = incoming.scheduling_class, incoming.permit
        try:
            request_id, features, sampling = incoming.request()
            REQUEST_ID.set(request_id)
            TRACE.set(incoming.trace)
            del incoming
            async with aclosing(
                self._server.engine.generate(request_id, features, sampling, scheduling_class)
            ) as deltas:
                del features
                async for delta in deltas:
                    permit.release()
                    self._hand_over(number, delta)
                    if delta.finish_reason is not None:
                        return
                    if pace_s:
                        # All wake on the same tick, so that one write carries the deltas of all. Meanwhile the engine
                        # merges what comes.
                        await asyncio.sleep(pace_s - loop.time() % pace_s)
            self._fail(number, EngineFailed())
        except CaptionerError as error:
            self._fail(number, error)
        except Exception:
            log.exception("a generation failed unexpectedly")
            self._fail(number, Internal())
        finally:
            permit.release()
            self.generations.pop(number, None)

    def _abort(self, number: int) -> None:
        self._outbox.pop(number, None)
        self._drop(number)
        if task := self.generations.get(number):
            # Not at once: one that was made by the frame before would never begin, and so not give its memory back.
            asyncio.get_running_loop().call_soon(task.cancel)

    def _drop(self, number: int) -> None:
        """Forget features that have not arrived in full."""
        if incoming := self._incoming.pop(number, None):
            incoming.permit.release()
            del self.generations[number]

    def _hand_over(self, number: int, delta: EngineDelta) -> None:
        if waiting := self._outbox.get(number):
            waiting[0] += delta.text
            waiting[1] += delta.tokens
            waiting[2] = delta.finish_reason
        else:
            self._outbox[number] = [delta.text, delta.tokens, delta.finish_reason]
        if delta.queue_s:
            self._waited.append((number, delta.queue_s))
        if delta.input_tokens or delta.uncounted_tokens:
            own = self._own.setdefault(number, [0, 0])
            own[0] += delta.input_tokens
            own[1] += delta.uncounted_tokens
        self._flush_soon()

    def _fail(self, number: int, error: CaptionerError) -> None:
        self._flush(now=True)
        header = {"op": "error", "id": number, "error": type(error).__name__, "message": str(error)}
        if isinstance(error, Overloaded):
            header |= {"retry_after_s": error.retry_after_s, "reason": error.reason}
        self._write(header)
        if self.generations.get(number) is None:
            self.generations.pop(number, None)

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self, *, now: bool = False) -> None:
        self._flushing = False
        if not self._outbox or self._writer.is_closing():
            return
        if not now and self._writer.transport.get_write_buffer_size() > _WRITE_BUFFER_BYTES:
            self._flushing = True
            asyncio.get_running_loop().call_later(0.05, self._flush)
            return
        deltas = [[number, *delta] for number, delta in self._outbox.items()]
        self._write(
            {
                "op": "deltas",
                "deltas": deltas,
                "queue_s": self._waited,
                "own": [[number, *own] for number, own in self._own.items()],
            }
        )
        self._outbox.clear()
        self._waited.clear()
        self._own.clear()

    def _write(self, header: dict[str, Any]) -> None:
        if not self._writer.is_closing():
            self._writer.write(frame(header)[0])


class _Incoming:
    """A request whose features are arriving."""

    def __init__(self, header: dict[str, Any], frames: int, features: SharedCapacity) -> None:
        self.nbytes = 4 * MELS * frames
        self.scheduling_class = known(SchedulingClass, header.get("share", {}))
        self.permit = features.permit(self.scheduling_class)
        self._header = header
        self.frames = frames
        self.heard_s = time.monotonic()
        """When the last of it came."""
        self._filled = 0

    @property
    def trace(self) -> dict[str, str] | None:
        """The trace that the frontend is in."""
        return self._header.get("trace")

    def allocate(self) -> None:
        """Make room."""
        self._log_mel = np.empty((MELS, self.frames), np.float32)
        self._room = self._log_mel.data.cast("B")

    def add(self, piece: bytes) -> bool:
        """Put a piece in its place; return whether that was the last. Raises `ValueError` if it does not fit."""
        self._room[self._filled : self._filled + len(piece)] = piece
        self._filled += len(piece)
        self.heard_s = time.monotonic()
        return self._filled == self.nbytes

    def request(self) -> tuple[str, Features, Sampling]:
        """What the engine is asked for."""
        given = self._header["sampling"]
        tuples = {name: tuple(given[name]) for name in ("stop", "stop_token_ids")}
        sequences = tuple(tuple(ids) for ids in given["stop_token_sequences"])
        sampling = known(Sampling, given | tuples | {"stop_token_sequences": sequences})
        return str(self._header["request_id"]), Features(self._log_mel, int(self._header["samples"])), sampling
