"""Watchdog of one audio worker: ends a worker that makes no progress, whatever the worker itself does.

The worker's own limit is CPU time (`worker.py`), which a worker that waits, is stopped, or has masked its signals never
uses up. The watchdog counts wall-clock time and kills.
"""

from __future__ import annotations

import logging
import os
import signal
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    import subprocess

LIVENESS_INTERVAL_S = 0.5
"""Interval of `check`. A worker that is found stopped twice in a row is killed."""

_KILL_DELAY_S = 1.0
"""Time for a worker to end by SIGPROF; then it is killed."""

log = logging.getLogger(__name__)


class Watchdog:
    """Watchdog over one process. `expired` is set once the process has exceeded the limit of a clip."""

    def __init__(self, process: subprocess.Popen[bytes], loop: asyncio.AbstractEventLoop) -> None:
        self.expired = False
        self._process = process
        self._loop = loop
        self._stopped = False
        self._deadline: asyncio.TimerHandle | None = None

    def arm(self, limit_s: float) -> None:
        """End the process unless `disarm` is called within `limit_s`."""
        self._deadline = self._loop.call_later(limit_s, self._expire)

    def disarm(self) -> None:
        """Cancel the limit. Idempotent."""
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None

    def check(self) -> None:
        """Kill the process if it is stopped (SIGSTOP), and was at the last check."""
        before, self._stopped = self._stopped, _is_stopped(self._process.pid)
        if before and self._stopped:
            log.warning("audio worker is stopped; killing it", extra={"pid": self._process.pid})
            self._process.kill()

    def _expire(self) -> None:
        if self.expired or _is_stopped(self._process.pid):  # the clip of a stopped worker is not to blame
            self._process.kill()
            return
        self.expired = True
        self._process.send_signal(signal.SIGPROF)
        self.arm(_KILL_DELAY_S)


def _is_stopped(pid: int) -> bool:
    """Return whether a child of this process is stopped at this moment."""
    with suppress(ChildProcessError):
        return os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
    return False
