"""One process of a cluster without Ray: a frontend or an engine replica at fixed addresses, with a clock to move.

    python -m benchmarks.tenancy.chaos_node frontend HOST:PORT,HOST:PORT CLOCK SETTINGS…
    python -m benchmarks.tenancy.chaos_node engine PORT SETTINGS…

The parts are those of `serving/cluster/deployments.py` (application, `RemoteEngine`, `EngineServer`), without Ray's
membership and proxy. The file CLOCK has the seconds by which the wall clock of the process is wrong; it is read twenty
times a second, and an empty or missing file is 0.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from pathlib import Path

import uvloop

from serving.api.app import make_engine
from serving.cli.serve import ServiceRun
from serving.config import Settings
from serving.engine.remote.client import RemoteEngine
from serving.engine.remote.server import EngineServer
from serving.observability import logging as logs
from serving.storage.uploads import make_uploads_directory

SECRET = "of the chaos"  # noqa: S105 - on loopback, for a measurement
_CLOCK_EVERY_S = 0.05


class FixedEngines(RemoteEngine):
    """`RemoteEngine` over addresses that do not change."""

    def __init__(self, addresses: list[str]) -> None:
        super().__init__()
        self._addresses = addresses

    async def start(self) -> None:
        """Connect to the replicas."""
        self.update(self._addresses, SECRET)


class MovedClock:
    """Wall clock of this process, wrong by the seconds that a file has."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._time, self._time_ns, self._monotonic = time.time, time.time_ns, time.monotonic
        self._offset_ns, self._read_at = 0, 0.0

    def install(self) -> None:
        """Replace `time.time` and `time.time_ns`, which all code of the service calls."""
        time.time = lambda: self._time() + self._offset() / 1e9
        time.time_ns = lambda: self._time_ns() + self._offset()

    def _offset(self) -> int:
        if self._monotonic() > self._read_at + _CLOCK_EVERY_S:
            self._read_at = self._monotonic()
            try:
                self._offset_ns = round(float(self._path.read_text() or "0") * 1e9)
            except (OSError, ValueError):
                self._offset_ns = 0
        return self._offset_ns


async def run_engine(settings: Settings, port: int) -> int:
    """Serve an engine at a port until SIGTERM; running captions are finished first."""
    engine = make_engine(settings)
    server = EngineServer(settings, engine, lambda: SECRET)
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await engine.start()
    await server.start("127.0.0.1", port)
    await stopped.wait()
    await server.drain()
    await server.stop()
    await engine.stop()
    return 0


def main() -> int:
    """Run one process until it is stopped; return the exit status."""
    role, where, *rest = sys.argv[1:]
    if role == "engine":
        settings = Settings.load(rest)
        logs.configure(settings.log_level, settings.log_format)
        return uvloop.run(run_engine(settings, int(where)))
    clock, *flags = rest
    MovedClock(Path(clock)).install()
    settings = Settings.load(flags)
    logs.configure(settings.log_level, settings.log_format)
    make_uploads_directory(settings)
    return uvloop.run(ServiceRun(settings, FixedEngines(where.split(","))).run())


if __name__ == "__main__":
    sys.exit(main())
