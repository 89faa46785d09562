"""One caption over HTTP: from an ASGI scope to the path and back. No rule of a dialect, no audio, no model here."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serving.api.dialects.base import HEARTBEAT
from serving.api.request_body import disconnected, drain, pieces, read_body
from serving.errors import CaptionerError, Disconnected, Internal

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from starlette.types import Message, Receive, Scope, Send

    from serving.api.dialects.base import Codec, Reply
    from serving.config import Settings
    from serving.observability.metrics import Metrics
    from serving.observability.request_record import RequestRecord
    from serving.pipeline import Captioner
    from serving.scheduling.shared_capacity import SharedCapacity
    from serving.tenancy.keys import Keyring
    from serving.tenancy.usage_session import UsageSession, UsageSessions
    from serving.types import CaptionDelta

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CaptionEndpoint:
    """`POST` of one clip in one dialect (E1 and E2 of PROTOCOL).

    A raw ASGI application, since it owns the whole exchange: it reads with bounds, watches for the client's leaving,
    and chooses the moment of the status line.
    """

    codec: Codec
    captioner: Captioner
    keys: Keyring
    usage_sessions: UsageSessions
    metrics: Metrics
    bodies: SharedCapacity
    settings: Settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Metered exactly once, however it ends."""
        record = self.metrics.begin(scope["state"]["request_id"], self.codec.dialect)
        exchange = _Exchange(send, record.request_id, self.settings)
        # No exception outlives its clause: its traceback would keep this frame, and the features below it, in a cycle.
        try:
            await self._serve(scope, receive, exchange, record)
        except Disconnected as error:
            self.metrics.finish(record, error)
        except CaptionerError as error:
            self.metrics.finish(record, error)
            await exchange.fail(error, self.codec)
        except Exception:
            log.exception("unexpected failure", extra={"request_id": record.request_id})
            self.metrics.finish(record, Internal())
            await exchange.fail(Internal(), self.codec)
        except BaseException as error:
            self.metrics.finish(record, error)
            raise
        else:
            self.metrics.finish(record, None)

    async def _serve(self, scope: Scope, receive: Receive, exchange: _Exchange, record: RequestRecord) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        self.metrics.tracer.begin(record, headers)
        try:
            caller = self.keys.authenticate(headers)
        except CaptionerError:
            await drain(pieces(receive), self.settings.max_body_bytes)
            raise
        record.caller, record.caption = caller.tenant_id, [] if caller.log_content else None
        with self.bodies.permit(caller.scheduling_class) as permit:
            body = await read_body(receive, self.settings.max_body_bytes, permit)
            record.stage("receive", time.perf_counter() - record.started)
            request, reply = self.codec.decode_request(body, headers, record.request_id)
            del body
            exchange.reply = reply
            record.stream = reply.stream
            record.audio_form = type(request.audio).__name__.removesuffix("Audio").lower()
            deadline_s = self.settings.stream_timeout_s if reply.stream else self.settings.response_timeout_s
            async with self.usage_sessions.session(caller, record, request) as session:
                exchange.session = session
                deltas = self.captioner.caption(
                    request, record, session, deadline_s=deadline_s, on_prepared=permit.release
                )
                del request  # it carries the encoded audio, which the path lets go of once it is decoded
                answer = asyncio.create_task(self._answer(deltas, reply, exchange, record))
                gone = asyncio.create_task(disconnected(receive))
                try:
                    await asyncio.wait((answer, gone, exchange.stuck), return_when=asyncio.FIRST_COMPLETED)
                    if exchange.ended:
                        await asyncio.wait((answer,))  # who has the whole answer may go
                finally:
                    gone.cancel()
                    if not answer.done():
                        answer.cancel()
                    await asyncio.wait((answer, gone))
                if answer.cancelled():
                    raise Disconnected
                answer.result()

    async def _answer(
        self, deltas: AsyncGenerator[CaptionDelta], reply: Reply, exchange: _Exchange, record: RequestRecord
    ) -> None:
        try:
            async with aclosing(deltas):
                await (exchange.stream(reply, deltas) if reply.stream else exchange.whole(reply, deltas))
        finally:
            if exchange.encode_s:
                record.stage("encode", exchange.encode_s)


class _Exchange:
    """One HTTP answer being written."""

    def __init__(self, send: Send, request_id: str, settings: Settings) -> None:
        self.reply: Reply | None = None
        self.session: UsageSession | None = None
        self.ended = False
        """The last of the answer is on its way."""
        self.encode_s = 0.0
        self.stuck: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done once the client has read nothing for too long."""
        self._asgi_send = send
        self._request_id = request_id
        self._settings = settings
        self._started = False
        self._written_at = 0.0
        self._writing = asyncio.Lock()  # the heartbeat must not fall into a status line

    async def whole(self, reply: Reply, deltas: AsyncGenerator[CaptionDelta]) -> None:
        """Answer with all text at once."""
        pieces: list[str] = []
        last: CaptionDelta | None = None
        async for last in deltas:
            pieces.append(last.text)
        if last is None:
            raise Internal
        headers = {"x-dashscope-partialresponse": "true"} if last.partial else {}
        began = time.perf_counter()
        body = reply.whole("".join(pieces), last)
        self.encode_s = time.perf_counter() - began
        await self._plain(200, "application/json", headers, body)

    async def stream(self, reply: Reply, deltas: AsyncGenerator[CaptionDelta]) -> None:
        """Answer piece by piece. The status line waits for the first piece, but no longer than `first_byte_timeout_s`."""
        heartbeat = asyncio.create_task(self._keep_alive())
        pace_s, loop = self._settings.stream_flush_interval_s, asyncio.get_running_loop()
        try:
            async for delta in deltas:
                began = time.perf_counter()
                frame = reply.frame(delta)
                self.encode_s += time.perf_counter() - began
                if frame or reply.ended:
                    await self._write(frame, more=not reply.ended)
                if reply.ended:
                    return
                if pace_s:
                    # To the next tick, the same for all streams. Meanwhile the engine merges what comes: a write costs
                    # more than a token.
                    await asyncio.sleep(pace_s - loop.time() % pace_s)
        finally:
            heartbeat.cancel()
            await asyncio.gather(heartbeat, return_exceptions=True)

    async def fail(self, error: CaptionerError, codec: Codec) -> None:
        """Tell the error: as a plain response if nothing was sent yet, else as the stream's last event."""
        with suppress(Disconnected):
            if not self._started:
                answer = codec.error(error, self._request_id)
                await self._plain(answer.status, answer.content_type, answer.headers, answer.body)
            elif self.reply is not None:
                await self._send({"type": "http.response.body", "body": self.reply.error_frame(error)})

    async def _keep_alive(self) -> None:
        await asyncio.sleep(self._settings.first_byte_timeout_s)
        if not self._started:
            await self._write(HEARTBEAT)
        while True:
            silent_s = asyncio.get_running_loop().time() - self._written_at
            if silent_s >= self._settings.heartbeat_s:
                await self._write(HEARTBEAT)
            else:
                await asyncio.sleep(self._settings.heartbeat_s - silent_s)

    async def _write(self, frame: bytes, *, more: bool = True) -> None:
        async with self._writing:
            if not self._started:
                await self._start(200, "text/event-stream", _STREAM_HEADERS)
            if not more:
                await self._end()
            await self._send({"type": "http.response.body", "body": frame, "more_body": more})
            self._written_at = asyncio.get_running_loop().time()

    async def _plain(self, status: int, content_type: str, headers: Mapping[str, str], body: bytes) -> None:
        await self._start(status, content_type, {**headers, "content-length": str(len(body))})
        if status == _OK:
            await self._end()
        await self._send({"type": "http.response.body", "body": body})

    async def _end(self) -> None:
        """Before the last byte: nobody has an answer that the ledger does not know."""
        self.ended = True
        if self.session:
            await self.session.settle(None)

    async def _start(self, status: int, content_type: str, headers: Mapping[str, str]) -> None:
        self._started = True
        limits = self.session.headers if self.session else {}
        fields = [(b"content-type", content_type.encode())]
        fields += [(name.encode("latin-1"), value.encode("latin-1")) for name, value in {**limits, **headers}.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": fields})

    async def _send(self, message: Message) -> None:
        """Send anything. Raises `Disconnected` for a client that stays and reads nothing: it would keep its places."""
        try:
            async with asyncio.timeout(self._settings.write_timeout_s):
                await self._asgi_send(message)
        except TimeoutError:
            if self.ended:
                return  # it is billed already, as for a client that leaves now
            if not self.stuck.done():
                self.stuck.set_result(None)  # whoever sends may be the heartbeat, whose end nobody awaits
            raise Disconnected from None


_OK = 200
_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
