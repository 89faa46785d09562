"""One caption over HTTP: from an ASGI scope to the pipeline and back.

Rules of a dialect, audio and the model are in other modules.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Self

from serving.api.body_coding import inflate
from serving.api.multipart_form import boundary_of
from serving.api.request_body import Body, disconnected
from serving.api.response_writer import ResponseWriter
from serving.errors import CaptionerError, Disconnected, Internal, NotReady
from serving.types import FinishReason

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from starlette.types import Receive, Scope, Send

    from serving.api.components import Components
    from serving.api.dialects.base import Codec, Reply
    from serving.config import Settings
    from serving.observability.metrics import Metrics
    from serving.observability.request_record import RequestRecord
    from serving.pipeline import CaptionPipeline
    from serving.scheduling.shared_capacity import SharedCapacity
    from serving.tenancy.idempotency import IdempotentAnswers
    from serving.tenancy.keys import Keyring
    from serving.tenancy.usage_session import UsageSessions
    from serving.timeline.captions import Timelines
    from serving.types import CaptionDelta, CaptionRequest

log = logging.getLogger(__name__)

_DECODED_ON_LOOP_BYTES = 256 * 1024
"""Largest body that is decoded on the event loop: it takes 10 ms at worst."""

_DECODER = ThreadPoolExecutor(1, "decode-request")
"""One thread: the parser holds the interpreter, so a second one would only keep the event loop waiting for longer."""


@dataclass(frozen=True, slots=True)
class CaptionEndpoint:
    """`POST` of one clip in one dialect (E1 and E2 of PROTOCOL; forms of PROTOCOL 18).

    A raw ASGI application, because it controls both directions: it reads with bounds, watches for the client's
    disconnect, and chooses the moment of the status line.
    """

    codec: Codec
    pipeline: CaptionPipeline
    timelines: Timelines
    keys: Keyring
    usage_sessions: UsageSessions
    metrics: Metrics
    bodies: SharedCapacity
    settings: Settings
    idempotency: IdempotentAnswers
    max_body_bytes: int | None = None
    """Limit of a request body, unless it is the setting `max_body_bytes`."""

    @classmethod
    def of(cls, components: Components, codec: Codec, *, max_body_bytes: int | None = None) -> Self:
        """Return the endpoint of `codec`'s dialect over the components of this process."""
        return cls(
            codec,
            components.pipeline,
            components.timelines,
            components.keys,
            components.usage_sessions,
            components.metrics,
            components.bodies,
            components.settings,
            components.idempotency,
            max_body_bytes,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Metered exactly once, however the request ends."""
        record = self.metrics.begin(scope["state"]["request_id"], self.codec.dialect)
        response = ResponseWriter(send, record.request_id, self.settings)
        # No exception outlives its clause: its traceback would keep this frame, and the features below it, in a cycle.
        try:
            await self._serve(scope, receive, response, record)
        except Disconnected as error:
            self.metrics.finish(record, error)
        except CaptionerError as error:
            self.metrics.finish(record, error)
            await response.fail(error, self.codec)
        except Exception:
            log.exception("unexpected failure", extra={"request_id": record.request_id})
            self.metrics.finish(record, Internal())
            await response.fail(Internal(), self.codec)
        except asyncio.CancelledError as error:
            # The service stops and its grace is over: the client receives an error, not a stream that is cut.
            self.metrics.finish(record, None if response.ended else error)
            if not response.ended:
                await response.fail(NotReady(), self.codec)
            if task := asyncio.current_task():
                task.uncancel()  # the request has its answer; its task ends as after any error
        except BaseException as error:
            self.metrics.finish(record, error)
            raise
        else:
            self.metrics.finish(record, None)

    async def _serve(self, scope: Scope, receive: Receive, response: ResponseWriter, record: RequestRecord) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        # A stranger is answered at once: the connection reads the rest of the body, briefly.
        caller = self.keys.authenticate(headers)
        self.metrics.tracer.begin(record, headers)  # only with a key: strangers do not fill the collector
        record.caller, record.caption = caller.tenant_id, [] if caller.log_content else None
        body = Body(receive, self.settings, limit_bytes=self.max_body_bytes)
        async with self.usage_sessions.session(caller, record) as session:
            response.session = session
            try:
                await session.admit()
            except CaptionerError:
                await body.drain()
                raise
            admitted = time.perf_counter()
            record.stage("admit", admitted - record.started)
            with self.bodies.permit(caller.scheduling_class) as permit:
                content = await body.read(permit)
                if coding := headers.get("content-encoding", "").strip().lower():
                    content = await inflate(content, coding, permit, limit_bytes=body.limit_bytes)
                record.stage("receive", time.perf_counter() - admitted)
                request, reply = await self._decode(content, headers, record)
                key, digest = headers.get("idempotency-key"), ""
                if key is not None and not reply.stream:
                    digest = await self._digest(content, headers.get("content-type", ""))
                del content
                response.reply = reply
                record.stream = reply.stream
                record.audio_form = type(request.audio).__name__.removesuffix("Audio").lower()
                deadline_s = self.settings.stream_timeout_s if reply.stream else self.settings.response_timeout_s
                async with AsyncExitStack() as stack:
                    if key is not None and digest:
                        claiming = self.idempotency.claim(caller.tenant_id, key, digest, within_s=deadline_s)
                        claim = await stack.enter_async_context(claiming)
                        if claim.found is not None:
                            record.finish_reason = FinishReason.STOP
                            await response.replay(claim.found)
                            return
                        session.commit = response.claim = claim
                    caption = self.pipeline.caption if request.timeline is None else self.timelines.caption
                    deltas = caption(request, record, session, deadline_s=deadline_s, on_prepared=permit.release)
                    del request  # it holds the encoded audio, which the pipeline releases once decoded
                    if response.claim is None:
                        await self._send(deltas, reply, response, record, receive)
                    else:  # the caption is finished for a client that leaves and repeats the request: billed once
                        await self._respond(deltas, reply, response, record)

    async def _decode(
        self, content: bytes, headers: Mapping[str, str], record: RequestRecord
    ) -> tuple[CaptionRequest, Reply]:
        """Decode a request; a large one in a thread, so that counting its values does not hold the event loop."""
        if len(content) <= _DECODED_ON_LOOP_BYTES:
            return self.codec.decode_request(content, headers, record.request_id)
        decode = self.codec.decode_request
        return await asyncio.get_running_loop().run_in_executor(_DECODER, decode, content, headers, record.request_id)

    async def _digest(self, content: bytes, content_type: str) -> str:
        """Return the hash of a request; that of a large one is made in a thread.

        A client that sends a form again writes another boundary, which does not count.
        """
        boundary = boundary_of(content_type) if content_type.startswith("multipart/") else b""
        hashed = partial(_sha256, self.codec.dialect.encode(), content, boundary)
        return await asyncio.to_thread(hashed) if len(content) > _DECODED_ON_LOOP_BYTES else hashed()

    async def _send(
        self,
        deltas: AsyncGenerator[CaptionDelta],
        reply: Reply,
        response: ResponseWriter,
        record: RequestRecord,
        receive: Receive,
    ) -> None:
        """Send the response. Raises `Disconnected` once the client disconnects, or reads nothing for too long."""
        response_task = asyncio.create_task(self._respond(deltas, reply, response, record))
        disconnect_task = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait(
                (response_task, disconnect_task, response.write_stalled), return_when=asyncio.FIRST_COMPLETED
            )
            if response.ended:
                await asyncio.wait((response_task,))  # a client that has the complete response may disconnect
            client_left = not response_task.done()
        finally:
            disconnect_task.cancel()
            if not response.ended:  # what is billed is also sent, even if the service stops now
                response_task.cancel()
            await asyncio.wait((response_task, disconnect_task))
            if response_task.cancelled():
                # Take its exception: the traceback would keep the features, in a cycle with the task.
                with suppress(asyncio.CancelledError):
                    response_task.result()
        if response_task.cancelled():
            # Cancelled by something else, such as a task of the engine: the client still waits for an answer.
            raise Disconnected if client_left else Internal
        response_task.result()

    async def _respond(
        self, deltas: AsyncGenerator[CaptionDelta], reply: Reply, response: ResponseWriter, record: RequestRecord
    ) -> None:
        try:
            async with aclosing(deltas):
                await (response.send_stream(reply, deltas) if reply.stream else response.send_full(reply, deltas))
        finally:
            if response.encode_s:
                record.stage("encode", response.encode_s)


def _sha256(dialect: bytes, content: bytes, boundary: bytes) -> str:
    digest = hashlib.sha256(dialect + b"\0")
    digest.update(content.replace(boundary, b"") if boundary else content)
    return digest.hexdigest()
