"""Two frontends, two engines, their stores and disks, and everything that a chaos does to them."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

import psutil

from benchmarks.program import module_environment
from benchmarks.servers import Postgres, Redis, free_port
from benchmarks.tenancy.chaos_client import TOKENS
from benchmarks.tenancy.ledger_chaos import Frontend, shared

if TYPE_CHECKING:
    from collections.abc import Iterator

ENGINE_FLAGS = (
    "--engine=fake",
    f"--fake-tokens={TOKENS}",
    "--fake-tpot-s=0.004",
    "--fake-ttft-s=0.02",
    "--fake-fail-share=0.05",
    "--stream-flush-interval-s=0.01",
    "--allow-ignore-eos",
)
FRONTEND_FLAGS = (
    "--engine=fake",
    "--audio-workers=1",
    "--stream-flush-interval-s=0",
    "--allow-ignore-eos",
    "--response-timeout-s=4",
    "--stream-timeout-s=6",
    "--shutdown-grace-s=10",
)
CLOCK_JUMPS_S = (-86_400, -3600, -2, 2, 3600, 86_400)
DISK_MIB = 24
PROCESSES = ("kill_frontend", "stop_frontend", "kill_engine", "stop_engine", "pause_engine", "pause_frontend")
SURROUNDINGS = ("crash_database", "pause_database", "crash_redis", "pause_redis", "fill_disk", "move_clock")


class Node(Frontend):
    """A process of the cluster, which is killed, stopped and paused. A context manager."""

    def __init__(self, directory: Path, environment: dict[str, str], *arguments: str, port: int = 0) -> None:
        super().__init__(directory, environment | module_environment())
        self.port = port or self.port
        self.clock = directory / "clock"
        self._arguments = arguments
        self.down: list[tuple[float, float]] = []

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "benchmarks.tenancy.chaos_node", *self._arguments]

    @contextmanager
    def is_down(self) -> Iterator[None]:
        """Note that clients may see this process fail; until 2 s later, for what was sent meanwhile."""
        began = time.time()
        self.down.append((began, float("inf")))
        try:
            yield
        finally:
            self.down[-1] = began, time.time() + 2


class Cluster:
    """The processes of a run, and what is done to them. A context manager."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.chance = random.Random(seed)
        self.done: Counter[str] = Counter()
        self._directory = directory
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._stack:
            self.database, self.redis = self._stack.enter_context(Postgres()), self._stack.enter_context(Redis())
            environment = {"CAPTIONER_DATABASE_URL": self.database.url} | shared(self.redis)
            ports = [free_port(), free_port()]
            self.logs = [self._directory / f"engine-log-{number}" for number in range(2)]
            self.engines = [
                Node(
                    self._directory / f"engine-{number}", {}, "engine", str(port), *ENGINE_FLAGS,
                    f"--fake-log={log}", f"--data-dir={self._directory}/engine-{number}/data", port=port,
                )
                for number, (port, log) in enumerate(zip(ports, self.logs, strict=True))
            ]  # fmt: skip
            addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
            self.frontends, self.disks = [], []
            for number in range(2):
                directory, port = self._directory / f"frontend-{number}", free_port()
                disk = self._directory / f"disk-{number}"
                self.disks.append(self._stack.enter_context(small_disk(disk)))
                flags = [f"--port={port}", f"--data-dir={disk}/data", f"--uploads-dir={directory}/uploads"]
                flags += [f"--download-dir={directory}"]
                arguments = ("frontend", addresses, str(directory / "clock"), *FRONTEND_FLAGS, *flags)
                self.frontends.append(Node(directory, environment, *arguments, port=port))
            for node in (*self.engines, *self.frontends):
                self._stack.enter_context(node)
            self._kept = self._stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._kept.close()

    async def kill_frontend(self) -> None:
        """Kill a frontend, and start another in its place."""
        frontend = self.chance.choice(self.frontends)
        with frontend.is_down():
            await asyncio.to_thread(frontend.kill)
            await frontend.wait_ready()

    async def stop_frontend(self) -> None:
        """Stop a frontend in order; its running requests end before."""
        frontend = self.chance.choice(self.frontends)
        with frontend.is_down():
            await asyncio.to_thread(frontend.stop)
            frontend.start()
            await frontend.wait_ready()

    async def kill_engine(self) -> None:
        """Kill an engine, and start another at its address."""
        await asyncio.to_thread(self.chance.choice(self.engines).kill)

    async def stop_engine(self) -> None:
        """Stop an engine in order."""
        engine = self.chance.choice(self.engines)
        await asyncio.to_thread(engine.stop)
        engine.start()

    async def pause_engine(self) -> None:
        """Stop an engine's process by SIGSTOP for a while."""
        await self._pause([_process(self.chance.choice(self.engines))])

    async def pause_frontend(self) -> None:
        """Stop a frontend's process by SIGSTOP for a while."""
        frontend = self.chance.choice(self.frontends)
        with frontend.is_down():
            await self._pause([_process(frontend)])

    async def kill_helper(self) -> None:
        """Kill an audio worker or the download process of a frontend."""
        helpers = _process(self.chance.choice(self.frontends)).children()
        with suppress(psutil.Error):
            if helpers:
                self.chance.choice(helpers).kill()

    async def crash_database(self) -> None:
        """Crash PostgreSQL for up to 3 s."""
        await asyncio.to_thread(self.database.stop)
        await asyncio.sleep(3 * self.chance.random())
        await asyncio.to_thread(self.database.start)

    async def pause_database(self) -> None:
        """Pause every process of PostgreSQL."""
        await self._pause(_of_port("postgres", self.database.port))

    async def crash_redis(self) -> None:
        """Kill Redis, which loses its data, for up to 3 s."""
        await asyncio.to_thread(self.redis.stop)
        await asyncio.sleep(3 * self.chance.random())
        await asyncio.to_thread(self.redis.start)

    async def pause_redis(self) -> None:
        """Pause Redis."""
        await self._pause(_of_port("redis-server", self.redis.port))

    async def fill_disk(self) -> None:
        """Fill the disk of a frontend for up to 3 s."""
        if disks := [disk for disk in self.disks if disk is not None]:
            path = self.chance.choice(disks) / "ballast"
            with path.open("wb", buffering=0) as file, suppress(OSError):
                while file.write(bytes(4096)):
                    pass
            await asyncio.sleep(0.5 + 2.5 * self.chance.random())
            path.unlink()

    async def move_clock(self) -> None:
        """Let the clock of a frontend jump, and after up to 3 s back."""
        clock = self.chance.choice(self.frontends).clock
        clock.write_text(str(self.chance.choice(CLOCK_JUMPS_S)))
        await asyncio.sleep(3 * self.chance.random())
        clock.write_text("0")

    async def _pause(self, processes: list[psutil.Process]) -> None:
        stopped = []
        try:
            for process in processes:
                with suppress(psutil.Error):
                    process.send_signal(signal.SIGSTOP)
                    stopped.append(process)
            await asyncio.sleep(0.5 + 2.5 * self.chance.random())
        finally:
            for process in stopped:
                with suppress(psutil.Error):
                    process.send_signal(signal.SIGCONT)


@contextmanager
def small_disk(directory: Path) -> Iterator[Path | None]:
    """Mount a small disk at the directory, and yield it; without the rights for that, yield `None`."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(directory)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def _process(node: Node) -> psutil.Process:
    assert node.process is not None  # noqa: S101
    return psutil.Process(node.process.pid)


def _of_port(name: str, port: int) -> list[psutil.Process]:
    """Return the server that was started with a port, and its children."""
    for process in psutil.Process().children():
        with suppress(psutil.Error):
            program, *arguments = process.cmdline() or [""]  # a process that has ended has none
            if Path(program).name == name and str(port) in arguments:
                return [process, *process.children(recursive=True)]
    return []
