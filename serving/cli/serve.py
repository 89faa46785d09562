"""`captioner serve`: one run of the service in this process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import time
from typing import TYPE_CHECKING

import uvicorn
import uvloop

from serving.api.admin import AdminServer
from serving.api.app import create_app
from serving.api.connections import Connections, backlog, raise_descriptor_limit
from serving.api.uvicorn_protocol import protocol
from serving.cli.first_request import print_first_request, with_development_key
from serving.cli.preflight import problem_of_start, warn_of_unknown_variables
from serving.cli.settings_errors import SETTINGS_ERRORS, report
from serving.cli.settings_help import printed_help
from serving.cli.terminal import fail
from serving.config import Settings
from serving.errors import NotReady, ServerError
from serving.observability import logging as logs
from serving.private_process import forbid_inspection
from serving.storage.uploads import UnusableBucket, make_uploads_directory
from serving.tenancy.database import UnusableDatabase, failure

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Sequence
    from types import FrameType

    from serving.api.components import Components
    from serving.engine.base import Engine

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 75
"""Lifetime of an idle connection in seconds: longer than clients and load balancers keep one (mostly a minute), so that
no request meets a connection that is just being closed. uvicorn's default is 5 s."""

_LAST_WORDS_S = 5
"""Time in seconds after `shutdown_grace_s` for the error events of streams that are still running."""


def serve(argv: Sequence[str]) -> int:
    """Run `serve SETTINGS…` until a signal; return the exit status."""
    if printed_help(argv):
        return 0
    try:
        settings = Settings.load(argv[1:])
    except SETTINGS_ERRORS as error:
        return report(error)
    warn_of_unknown_variables()
    if problem := problem_of_start(settings):
        return fail(problem)
    logs.configure(settings.log_level, settings.log_format)
    forbid_inspection()
    try:
        make_uploads_directory(settings)
    except OSError as error:
        return fail(str(error))
    try:
        run = ServiceRun(with_development_key(settings))
    except (UnusableDatabase, UnusableBucket) as error:
        return fail(str(error))
    except OSError as error:  # of the pepper, which is made at the first start
        return fail(f"data_dir cannot be used: {failure(error)}", 3)
    return uvloop.run(run.run())


_UNSTORED = 4


class _Listener(uvicorn.Server):
    """uvicorn, with an event that is set once it listens, and a stop after which no stream is cut off.

    When the grace of a stop is over, running requests are cancelled and end with their dialect's error. uvicorn itself
    would cancel them and stop the application at the same moment; its own timeout comes later.
    """

    def __init__(self, config: uvicorn.Config, grace_s: float, hint: str = "") -> None:
        super().__init__(config)
        self._hint = hint
        self._pressed_again = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self.listening = asyncio.Event()
        self._grace_s = grace_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if running := len(self.server_state.tasks):
            log.info("stopping, finishing %d captions%s", running, self._hint)
        else:
            log.info("stopping")
        cancelling = asyncio.get_running_loop().call_later(self._grace_s, self._cancel_requests)
        try:
            await super().shutdown(sockets)
        finally:
            cancelling.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop at the first signal; a second SIGINT ends running requests, and a third the process."""
        if self.should_exit and sig == signal.SIGINT and self._loop and not self._pressed_again:
            self._pressed_again = True
            self._loop.call_soon_threadsafe(self._cancel_requests)
            return
        super().handle_exit(sig, frame)

    def _cancel_requests(self) -> None:
        if self.server_state.tasks:
            reason = "a second signal came" if self._pressed_again else "the grace is over"
            log.warning("requests cancelled, %s", reason, extra={"count": len(self.server_state.tasks)})
        for task in self.server_state.tasks:
            task.cancel()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self.listening.set()


class ServiceRun:
    """One run of the service: uvicorn, the administration's API, and messages for a person at a terminal.

    `engine` defaults to the engine that the settings name.
    """

    def __init__(self, settings: Settings, engine: Engine | None = None) -> None:
        self._settings = settings
        self._began = time.monotonic()
        self._loaded = asyncio.Event()
        self._failed = self._stopped = False
        raise_descriptor_limit()
        connections = Connections(settings)
        app = create_app(settings, engine, on_engine=self._on_engine, connections=connections)
        self._components: Components = app.state.components
        self._ledger = self._components.usage_sessions.ledger
        self._server = _Listener(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                loop="uvloop",
                http=protocol(settings, connections),
                ws="none",
                backlog=backlog(),
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # `Origins` reads them
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=math.ceil(settings.shutdown_grace_s) + _LAST_WORDS_S,
            ),
            settings.shutdown_grace_s,
            "; press Ctrl-C again to end them now" if settings.log_format == "text" else "",
        )

    async def run(self) -> int:
        """Serve until a signal, or until the engine fails to start; return the exit status.

        0: stopped by a signal. 1: the start failed. 4: usage records could be stored nowhere; they are in the log.
        """
        what = "the embedded stand-in" if self._settings.is_embedded else self._settings.model
        log.info("loading %s with the %s engine", what, self._settings.engine)
        for number in (signal.SIGINT, signal.SIGTERM):
            # Before uvicorn's own handlers are in place. Later it raises the signal again for this one: no effect.
            signal.signal(number, lambda *_: self._stop())
        reporting = asyncio.create_task(self._report_start())
        try:
            async with self._administration():
                await self._server.serve()
        finally:
            reporting.cancel()
            self._ledger.log_unstored()  # if a second signal left no time for a stop in order
        if self._ledger.unstored:
            log.error("usage records are in the log alone", extra={"records": self._ledger.unstored})
            return _UNSTORED
        return 1 if self._failed or not (self._server.started or self._stopped) else 0

    def _stop(self) -> None:
        self._stopped = self._server.should_exit = True

    @contextlib.asynccontextmanager
    async def _administration(self) -> AsyncIterator[None]:
        """Serve the administration's API while the service runs, if `admin_port` is set."""
        if self._settings.admin_port is None:
            yield
            return
        server = AdminServer(self._settings, alone=False)
        serving = asyncio.create_task(server.serve())
        try:
            yield
        finally:
            server.should_exit = True
            await asyncio.wait((serving,))

    async def _report_start(self) -> None:
        """Log every 10 s that the engine is loading, then that it is ready."""
        await self._server.listening.wait()
        while not self._loaded.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(10):
                    await self._loaded.wait()
                    break
            waited_s = time.monotonic() - self._began
            log.info("still loading after %d s; requests get 503 until then", waited_s, extra=await self._progress())
        host, port = self._server.servers[0].sockets[0].getsockname()[:2]
        origin = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        log.info("ready after %.0f s on %s", time.monotonic() - self._began, origin)
        if self._components.keys.nobody_has_a_key:
            log.warning("nobody has a key, so every request is refused: `captioner tenants create`, then `keys create`")
        print_first_request(origin, self._settings)

    async def _progress(self) -> dict[str, str]:
        """Return what the service waits for, as fields of a log line."""
        try:
            await self._components.check_ready()
        except NotReady as error:
            return {"waits_for": error.progress or str(error)}
        except ServerError as error:
            return {"waits_for": str(error)}
        return {}

    def _on_engine(self, failure: BaseException | None) -> None:
        if failure is None:
            self._loaded.set()
        else:
            log.error("stopping: the service could not be started; the cause is logged above")
            log.error("run `captioner doctor` with the same settings: it checks GPUs, memory, disks and services")
            self._failed = self._server.should_exit = True
