"""Download process from the frontend's side: its start, its end, and the downloads that it runs for us.

A server that a stranger names can make its client work hard (chunks of one byte, headers without end). On the
frontend's event loop one such download delayed every tenant's captions by 2.6 s, and 16 of them by 27 s.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import subprocess
import sys
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from serving import errors
from serving.audio.download_messages import (
    MAX_LINE_BYTES,
    Configure,
    End,
    Failed,
    Finished,
    Ready,
    Start,
    Status,
    decode,
    encode,
)
from serving.audio.egress import EgressGuard
from serving.observability.context import REQUEST_ID
from serving.observability.cpu_time import CpuTime
from serving.types import NO_TENANT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from serving.audio.download_messages import Message
    from serving.config import Settings
    from serving.types import SchedulingClass

SETTINGS = frozenset(
    (
        *("fetch_timeout_s", "fetch_connect_timeout_s", "fetch_min_bytes_per_s", "fetch_ports", "fetch_allow"),
        *("max_url_bytes", "max_downloads_bytes", "max_downloads", "log_level", "log_format"),
        *("download_dir", "data_dir"),
    )
)
"""Settings that the process is sent. It uses no `data_dir`, whose default needs a home directory."""

_ENVIRONMENT = frozenset(
    (
        *("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR"),
        *("RES_OPTIONS", "LOCALDOMAIN"),  # the system's resolver
    )
)

_RESPAWN_DELAY_S = 1.0
"""Delay after a process that could not even start, so that a broken installation does not spin."""

_SILENT_S = 20.0
"""Time without a `Status`, which is sent every second, after which a process is replaced: it hangs or is stopped."""

_STOP_TIMEOUT_S, _RECONNECT_S = 5.0, 5.0
"""Time for a process to end, and for a download to wait for the process that replaces a dead one."""

log = logging.getLogger(__name__)


class DownloadProcess:
    """The download process of this frontend. `program` is its command line after the interpreter.

    A process that dies is replaced; its running downloads fail as `Internal`, which clients retry.
    """

    def __init__(self, settings: Settings, *, program: Sequence[str] = ("-m", "serving.audio.downloader")) -> None:
        self._settings = settings
        self._program = program
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Path]] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._supervising: asyncio.Task[None] | None = None
        self._status = Status(0, 0)
        self._connected = asyncio.Event()
        self._cpu = CpuTime()
        self.deaths = 0
        EgressGuard(settings)  # its `ValueError` for a bad `fetch_allow` ends the start

    @property
    def used_bytes(self) -> int:
        """Disk used by downloads, in bytes, as of the last second."""
        return self._status.used_bytes

    @property
    def running(self) -> int:
        """Downloads that are not finished, as of the last second."""
        return self._status.running

    @property
    def cpu_s(self) -> float:
        """CPU time that the process has used, in seconds, dead ones included."""
        return self._cpu.sample([self._process.pid] if self._process else [])

    async def start(self) -> None:
        """Start the process and wait until it is ready. Raises `Internal` if it cannot start.

        It dies with the thread that starts it, so call it on the thread whose loop will stop it.
        """
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._supervising = asyncio.create_task(self._supervise())
        await self._ready

    async def stop(self) -> None:
        """Stop the process, which removes its files; running downloads fail as `NotReady`. Idempotent."""
        if self._supervising is None:
            return
        self._supervising.cancel()
        await asyncio.wait((self._supervising,))
        self._supervising = None
        self._fail_all(errors.NotReady())

    @asynccontextmanager
    async def fetch(self, url: str, scheduling_class: SchedulingClass = NO_TENANT) -> AsyncIterator[Path]:
        """Download the file behind a URL for a tenant: see `Fetcher.fetch`, whose exceptions it raises.

        Raises `NotReady` when the process is stopped, and `Internal` if it dies, or could not be started again.
        """
        if self._supervising is None:
            raise errors.NotReady
        try:
            async with asyncio.timeout(_RECONNECT_S):
                await self._connected.wait()
        except TimeoutError:
            raise errors.Internal from None
        number, answer = next(self._numbers), asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        tenant, weight, priority = scheduling_class.tenant, scheduling_class.weight, scheduling_class.priority
        self._send(Start(number, url, REQUEST_ID.get(), tenant, weight, priority))
        try:
            yield await answer
        finally:
            self._waiting.pop(number, None)
            self._send(End(number))

    def _send(self, message: Message) -> None:
        if self._writer is not None:
            self._writer.write(encode(message))

    async def _supervise(self) -> None:
        """Run the process, and run it again whenever it has ended."""
        while True:
            try:
                was_ready = await self._run()
            except OSError:
                log.exception("cannot start the download process")
                was_ready = False
            self.deaths += 1
            self._fail_all(errors.Internal())
            if not was_ready:
                if not self._ready.done():
                    self._ready.set_exception(errors.Internal())
                await asyncio.sleep(_RESPAWN_DELAY_S)

    async def _run(self) -> bool:
        """Run one process until it ends; return whether it was ready. Raises `OSError`."""
        process, channel = self._spawn()
        self._process, was_ready = process, False
        try:
            reader, self._writer = await asyncio.open_connection(sock=channel, limit=MAX_LINE_BYTES)
            self._connected.set()
            self._send(Configure(self._settings.model_dump(mode="json", include=set(SETTINGS))))
            with suppress(ConnectionError):
                async for message in _messages(reader):
                    was_ready = True
                    self._handle(message)
            process.kill()  # it is dead, or silent, or has sent what is no message
        finally:
            writer, self._writer, self._status = self._writer, None, Status(0, 0)
            if writer is not None:
                writer.close()
            else:
                channel.close()
            self._connected.clear()
            # A process whose socket is closed removes its files and ends.
            killing = asyncio.get_running_loop().call_later(_STOP_TIMEOUT_S, process.kill)
            with suppress(ChildProcessError):
                await asyncio.to_thread(os.waitid, os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            killing.cancel()
            self._cpu.sample([process.pid])
            self._process = None
            status = process.wait()
        log.warning("download process died", extra={"exit_status": status, "downloads": len(self._waiting)})
        return was_ready

    def _spawn(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """Start a process; return it and our end of its socket. Raises `OSError`."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        environment = {name: value for name, value in os.environ.items() if name in _ENVIRONMENT}
        try:
            process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-P", *self._program, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                process_group=0,  # the terminal's Ctrl-C must not reach it
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)  # noqa: FBT003 - the socket's own signature
        return process, ours

    def _handle(self, message: Message) -> None:
        match message:
            case Ready():
                if not self._ready.done():
                    self._ready.set_result(None)
            case Status():
                self._status = message
            case Finished(number, path):
                if (answer := self._waiting.get(number)) and not answer.done():
                    answer.set_result(Path(path))
            case Failed(number):
                if (answer := self._waiting.get(number)) and not answer.done():
                    answer.set_exception(_error(message))
            case _:
                raise TypeError(f"unexpected {type(message).__name__}")

    def _fail_all(self, error: errors.CaptionerError) -> None:
        """Fail the downloads that wait. Those that are finished are in use, and are none of a new process."""
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(error)


async def _messages(reader: asyncio.StreamReader) -> AsyncIterator[Message]:
    """Yield messages until the process ends, hangs, or sends what is no message."""
    while True:
        try:
            async with asyncio.timeout(_SILENT_S):
                line = await reader.readline()
            if not line:
                return
            message = decode(line)
        except TimeoutError:
            log.warning("download process hangs", extra={"silent_s": _SILENT_S})
            return
        except (ValueError, LookupError, TypeError):
            log.exception("download process sent a malformed message")
            return
        yield message


def _error(failed: Failed) -> errors.CaptionerError:
    """Return the exception that the process named; any other than a download has is `Internal`."""
    kind = getattr(errors, failed.error, None)
    if isinstance(kind, type) and issubclass(kind, errors.AudioError | errors.Overloaded):
        error = kind(failed.message)
        vars(error).update(failed.attributes)
        return error
    return errors.Internal()
