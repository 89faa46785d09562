"""Download process: the program that downloads for one frontend, so that no stranger's bytes are parsed on its loop.

    python -m serving.audio.downloader FD

FD is a Unix socket whose other end `download_process.py` has; `download_messages.py` documents the messages. The
process holds no secret: its environment is an allow-list, and the frontend sends the settings of downloads alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

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
from serving.audio.fetch import Fetcher
from serving.config import Settings
from serving.errors import CaptionerError, Internal
from serving.observability import logging as logs
from serving.observability.context import REQUEST_ID
from serving.types import SchedulingClass

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serving.audio.download_messages import Message

STATUS_INTERVAL_S = 1.0

_NICENESS = 5
"""With all cores busy, captions take precedence, as over audio workers."""

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38

log = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> None:
    """Download until the frontend closes its end of the socket."""
    (descriptor,) = arguments
    _confine()
    uvloop.run(_serve(socket.socket(fileno=int(descriptor))))


def _confine() -> None:
    # A terminal or systemd signals the whole group: the frontend decides.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(_NICENESS)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a socket and a file for each download
    with contextlib.suppress(OSError):  # if the machine runs out of memory, running downloads are a small loss
        Path("/proc/self/oom_score_adj").write_text("600")


async def _serve(channel: socket.socket) -> None:
    reader, writer = await asyncio.open_connection(sock=channel, limit=MAX_LINE_BYTES)
    configured = decode(await reader.readline())
    if not isinstance(configured, Configure):
        raise TypeError(f"expected Configure, got {type(configured).__name__}")
    settings = Settings.model_validate(configured.settings)
    logs.configure(settings.log_level, settings.log_format)
    fetcher = Fetcher(settings)
    await fetcher.start()
    try:
        await _Downloads(fetcher, writer).serve(reader)
    finally:
        await fetcher.stop()


class _Downloads:
    """The downloads of the frontend by number: each is a task, from `Start` to `End`."""

    def __init__(self, fetcher: Fetcher, writer: asyncio.StreamWriter) -> None:
        self._fetcher = fetcher
        self._writer = writer
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def serve(self, reader: asyncio.StreamReader) -> None:
        """Serve messages until the frontend is gone; then cancel what is left."""
        reporting = asyncio.create_task(self._report())
        self._send(Ready())
        try:
            while line := await reader.readline():
                self._handle(decode(line))
        except ConnectionError:
            pass  # the frontend has died
        finally:
            left = [reporting, *self._tasks.values()]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    def _handle(self, message: Message) -> None:
        match message:
            case Start(number):
                task = asyncio.create_task(self._download(message))
                self._tasks[number] = task
                task.add_done_callback(lambda _: self._tasks.pop(number))
            case End(number):
                if running := self._tasks.get(number):
                    running.cancel()
            case _:
                raise TypeError(f"unexpected {type(message).__name__}")

    async def _download(self, start: Start) -> None:
        REQUEST_ID.set(start.request_id)
        scheduling_class = SchedulingClass(start.tenant, start.weight, start.priority)
        try:
            async with self._fetcher.fetch(start.url, scheduling_class) as path:
                self._send(Finished(start.number, str(path)))
                await asyncio.get_running_loop().create_future()  # until `End` cancels this task
        except CaptionerError as error:
            self._send(Failed(start.number, type(error).__name__, str(error), vars(error)))
        except Exception:
            log.exception("download raised an unexpected error")
            self._send(Failed(start.number, Internal.__name__, Internal.message, {}))

    async def _report(self) -> None:
        while True:
            self._send(Status(self._fetcher.used_bytes, self._fetcher.running))
            await asyncio.sleep(STATUS_INTERVAL_S)

    def _send(self, message: Message) -> None:
        self._writer.write(encode(message))


if __name__ == "__main__":
    main(sys.argv[1:])
