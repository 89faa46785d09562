"""The response of a caption, whole or as server-sent events, and the bill that is settled before its last byte."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from serving.api.dialects.base import HEARTBEAT
from serving.errors import CaptionerError, Disconnected, Internal
from serving.tenancy.idempotency import Answer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from starlette.types import Message, Send

    from serving.api.dialects.base import Codec, Reply
    from serving.config import Settings
    from serving.tenancy.idempotency import Claim
    from serving.tenancy.usage_session import UsageSession
    from serving.types import CaptionDelta

_OK = 200

_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class ResponseWriter:
    """Writer of one HTTP response: a whole body, a stream of server-sent events, or an error."""

    def __init__(self, send: Send, request_id: str, settings: Settings) -> None:
        self.reply: Reply | None = None
        self.session: UsageSession | None = None
        self.claim: Claim | None = None
        """Claim of the request to its idempotency key, which gets the answer."""
        self.ended = False
        """The last part of the response is being sent."""
        self.encode_s = 0.0
        self.write_stalled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done once the client has read nothing for `write_timeout_s`."""
        self._asgi_send = send
        self._request_id = request_id
        self._settings = settings
        self._started = False
        self._written_at = 0.0
        self._writing = asyncio.Lock()  # no heartbeat between a status line and the first event

    async def send_full(self, reply: Reply, deltas: AsyncGenerator[CaptionDelta]) -> None:
        """Send one response with all text."""
        pieces: list[str] = []
        last: CaptionDelta | None = None
        async for last in deltas:
            pieces.append(last.text)
        if last is None:
            raise Internal
        headers = {"x-dashscope-partialresponse": "true"} if last.partial else {}
        if last.retried:
            headers["x-captioner-retried"] = last.retried.value
        started = time.perf_counter()
        body = reply.full_body("".join(pieces), last)
        self.encode_s = time.perf_counter() - started
        await self._send_plain(200, reply.content_type, headers, body)

    async def replay(self, answer: Answer) -> None:
        """Send the answer of an earlier request with the same idempotency key."""
        headers = dict(answer.headers)
        content_type = headers.pop("content-type")
        await self._send_plain(200, content_type, {**headers, "idempotent-replayed": "true"}, answer.body)

    async def send_stream(self, reply: Reply, deltas: AsyncGenerator[CaptionDelta]) -> None:
        """Send SSE events. The status line waits for the first delta, but no longer than `first_byte_timeout_s`."""
        heartbeat = asyncio.create_task(self._keep_alive())
        interval_s, loop = self._settings.stream_flush_interval_s, asyncio.get_running_loop()
        try:
            async for delta in deltas:
                started = time.perf_counter()
                event = reply.event(delta)
                self.encode_s += time.perf_counter() - started
                if event or reply.ended:
                    await self._write(event, more=not reply.ended)
                if reply.ended:
                    return
                if interval_s:
                    # Sleep to the next tick, which is the same for all streams. Meanwhile the engine merges deltas: a
                    # write costs more than a token.
                    await asyncio.sleep(interval_s - loop.time() % interval_s)
        finally:
            heartbeat.cancel()
            await asyncio.gather(heartbeat, return_exceptions=True)

    async def fail(self, error: CaptionerError, codec: Codec) -> None:
        """Send the error: as a plain response if nothing was sent yet, else as the stream's last event."""
        with suppress(Disconnected):
            if not self._started:
                rendered = codec.error(error, self._request_id)
                await self._send_plain(rendered.status, rendered.content_type, rendered.headers, rendered.body)
            elif self.reply is not None:
                await self._send({"type": "http.response.body", "body": self.reply.error_event(error)})

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

    async def _write(self, event: bytes, *, more: bool = True) -> None:
        async with self._writing:
            if not more:
                await self._end()
            if not self._started:
                await self._start(200, "text/event-stream", _STREAM_HEADERS)
            await self._send({"type": "http.response.body", "body": event, "more_body": more})
            self._written_at = asyncio.get_running_loop().time()

    async def _send_plain(self, status: int, content_type: str, headers: Mapping[str, str], body: bytes) -> None:
        if status == _OK:
            if self.claim is not None:
                self.claim.answer = Answer({**headers, "content-type": content_type}, body)
            await self._end()  # before the status line, which a failure of the ledger still changes
        await self._start(status, content_type, {**headers, "content-length": str(len(body))})
        await self._send({"type": "http.response.body", "body": body})

    async def _end(self) -> None:
        """Settle before the last byte: no client has a complete response that the ledger does not have."""
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
        """Send any message. Raises `Disconnected` for a connected client that reads nothing, to release its slots."""
        try:
            async with asyncio.timeout(self._settings.write_timeout_s):
                await self._asgi_send(message)
        except TimeoutError:
            if self.ended:
                return  # already billed, as for a client that disconnects now
            if not self.write_stalled.done():
                # `Disconnected` does not reach the endpoint if the heartbeat task sends: nothing awaits that task yet.
                self.write_stalled.set_result(None)
            raise Disconnected from None
