"""Two frontends and two engines while everything around them fails: each request has one record, one bill, one answer.

    python -m benchmarks.tenancy.cluster_chaos --requests 100000 [--seed 1] [--minutes 60]

Fake engines; frontends and engines are processes of `chaos_node.py`, with PostgreSQL, Redis, and a disk of 24 MiB for
each frontend (as root; else no disk is filled). Clients end requests in 13 ways (`chaos_client.py`), in both dialects.
Meanwhile, evenly spread over the requests: processes are killed, stopped in order, and paused; PostgreSQL and Redis
crash, and are paused; disks are filled; clocks jump by up to a day. In the end no record and no reservation is open,
every token is accounted for, every answer is a beginning of the right text, and every refusal has its code. Prints the
result as JSON; the exit status is 1 if anything does not add up.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psutil
import psycopg

from benchmarks.program import module_environment, option_parser
from benchmarks.servers import Postgres, Redis, free_port
from benchmarks.tenancy import chaos_client
from benchmarks.tenancy.chaos_audit import audit
from benchmarks.tenancy.chaos_client import CLIPS, ENDINGS, ENDLESS, KEY, TOKENS, Received
from benchmarks.tenancy.ledger_audit import all_records, billed_tokens, delivered_tokens
from benchmarks.tenancy.ledger_chaos import Frontend, exchange, shared

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

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
LIMITS = {"concurrent_requests": 10_000, "concurrent_audio_seconds": 100_000, "tokens_per_day": 10**12}
CLOCK_JUMPS_S = (-86_400, -3600, -2, 2, 3600, 86_400)
DISK_MIB = 24
SETTLED_S = 150
"""Time for the end: an open record of a machine that is lost is closed after 120 s."""


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


PROCESSES = ("kill_frontend", "stop_frontend", "kill_engine", "stop_engine", "pause_engine", "pause_frontend")
SURROUNDINGS = ("crash_database", "pause_database", "crash_redis", "pause_redis", "fill_disk", "move_clock")


class Chaos:
    """Clients and disturbances of one run."""

    def __init__(self, cluster: Cluster, requests: int, concurrency: int, most_s: float) -> None:
        self.received: list[Received] = []
        self.unsent = 0
        self._cluster, self._requests, self._concurrency = cluster, requests, concurrency
        self._left = requests
        self._until = time.monotonic() + most_s

    @property
    def _over(self) -> bool:
        return self._left <= 0 or time.monotonic() > self._until

    async def run(self, disturbances: int) -> None:
        """Send all requests; disturb processes, and what is around them, `disturbances` times each."""
        async with asyncio.TaskGroup() as group:
            for acts in ((*PROCESSES, "kill_helper"), SURROUNDINGS):
                group.create_task(self._disturb(acts, disturbances))
            for _ in range(self._concurrency):
                group.create_task(self._client())

    async def _client(self) -> None:
        chance, frontends = self._cluster.chance, self._cluster.frontends
        while not self._over:
            self._left -= 1
            [kind] = chance.choices(list(ENDINGS), list(ENDINGS.values()))
            server = chance.randrange(len(frontends))
            try:
                self.received.append(await chaos_client.request(server, frontends[server].port, kind, chance))
            except OSError:  # no process listens at this moment
                self.unsent += 1
                self._left += 1
                await asyncio.sleep(0.05)

    async def _disturb(self, acts: tuple[str, ...], times: int) -> None:
        order: list[str] = []
        for number in range(times):
            at = self._requests * (number + 0.3 + 0.4 * self._cluster.chance.random()) / times
            while len(self.received) < at and not self._over:  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0.01)
            if time.monotonic() > self._until:
                return
            order = order or self._cluster.chance.sample(acts, len(acts))
            name = order.pop()
            act: Callable[[], Awaitable[None]] = getattr(self._cluster, name)
            await act()
            self._cluster.done[name] += 1


async def chaos(
    directory: Path,
    *,
    requests: int,
    concurrency: int = 24,
    disturbances: int,
    seed: int = 1,
    minutes: float = float("inf"),
) -> dict[str, Any]:
    """Run everything, for `minutes` at most; return the counts, and under `wrong` what does not add up."""
    with Cluster(directory, seed) as cluster:
        for frontend in cluster.frontends:
            await frontend.wait_ready()
        set_limits(cluster.database)
        texts = await endless_texts(cluster)
        run, began = Chaos(cluster, requests, concurrency, 60 * minutes), time.monotonic()
        await run.run(disturbances)
        took_s = time.monotonic() - began
        for frontend in cluster.frontends:
            await frontend.wait_ready()
        reserved = await open_reservations(cluster)
        await settled(cluster.database)
        rows = all_records(cluster.database)
        downtimes = {number: frontend.down for number, frontend in enumerate(cluster.frontends)}
        wrong = audit(rows, run.received, delivered_tokens(cluster.logs), texts, downtimes)
        if reserved:
            wrong["reservations open"] = reserved
        for frontend in cluster.frontends:
            await asyncio.to_thread(frontend.stop)
        if left := journals(directory):
            wrong["journals left"] = left
    return {
        "requests": len(run.received),
        "seconds": round(took_s, 1),
        "seed": seed,
        "disturbances": dict(sorted(cluster.done.items())),
        "not_sent_as_nobody_listened": run.unsent,
        "records": len(rows),
        "endings": dict(Counter(str(row["ending"]) for row in rows)),
        "billed_tokens": billed_tokens(rows),
        "seen": seen(run.received),
        "wrong": {fault: [len(found), *found[:10]] for fault, found in wrong.items()},
    }


def seen(received: list[Received]) -> dict[str, dict[str, int]]:
    """Count answers by kind, and by status and code."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for each in received:
        found[each.kind][f"{each.status or 'none'} {each.code}".strip()] += 1
    return {kind: dict(counts.most_common()) for kind, counts in sorted(found.items())}


async def endless_texts(cluster: Cluster) -> list[str]:
    """Return the endless caption of each clip: as the service begins it while nothing disturbs it, and continued."""
    texts = []
    for clip in range(len(CLIPS)):
        for _ in range(20):  # a twentieth of the captions fail
            received = Received("finished", "openai", stream=True, clip=clip, server=0, began=time.time())
            data = chaos_client.compose("finished", "openai", clip, cluster.chance, stream=True)
            answer = await exchange(cluster.frontends[0].port, data)
            received.status, received.body = answer.status, chaos_client.unchunk(answer.body)
            chaos_client.parse(received)
            if not received.code and len(received.text.split()) >= TOKENS:
                break
        texts.append(received.text)
    if any(len(text.split()) < TOKENS for text in texts) or len(set(texts)) < len(texts):
        raise RuntimeError("the service does not caption the clips")
    return [_continued(text) for text in texts]


def _continued(text: str) -> str:
    """Return the caption's first `ENDLESS` words: an opening, then a story over and over."""
    opening, _, rest = text.partition(" A quiet room")
    story = (" A quiet room" + rest).partition(" fades.")[0] + " fades."
    return opening + story * (ENDLESS // len(story.split()) + 1)


def set_limits(database: Postgres) -> None:
    """Give the tenant of the settings' key limits that nothing reaches, so that reservations are counted."""
    with psycopg.connect(database.url) as connection:
        connection.execute(
            "INSERT INTO tenants (id, name, region, state, plan, limits, free_tokens, free_days, free_only, "
            "log_content, created_at, activated_at) VALUES ('default', 'Default', 'beijing', 'active', 'unlimited', "
            "%s, 0, 0, false, false, 0, 0)",
            [json.dumps(LIMITS)],
        )
        connection.execute("UPDATE store_state SET revision = revision + 1")


async def open_reservations(cluster: Cluster) -> list[str]:
    """Return what both frontends still count as running, after the leases of killed processes have expired."""
    body = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
    probe = f"{body}content-length: 1\r\nconnection: close\r\n\r\n{{".encode()
    deadline = time.monotonic() + SETTLED_S
    while True:
        found = []
        for frontend in cluster.frontends:
            reader, writer = await asyncio.open_connection("127.0.0.1", frontend.port)
            writer.write(probe)
            head = (await reader.read()).split(b"\r\n\r\n")[0].decode().lower()
            writer.close()
            fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:])
            for name, own in (("concurrent-requests", 1), ("concurrent-audio-seconds", 0)):
                limit, remaining = (float(fields[f"x-ratelimit-{part}-{name}"]) for part in ("limit", "remaining"))
                if limit - remaining - own:
                    found.append(f"{name}: {limit - remaining - own:g}")
        if not found or time.monotonic() > deadline:
            return found
        await asyncio.sleep(1)


def journals(directory: Path) -> list[str]:
    """Return the journals that stopped frontends have left."""
    return [str(path) for path in directory.glob("disk-*/data/journal/*")]


async def settled(database: Postgres) -> None:
    """Wait until no record is open, for as long as a lost machine's records may be."""
    for _ in range(SETTLED_S):
        if all(row["ending"] is not None for row in all_records(database)):
            return
        await asyncio.sleep(1)


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


def main() -> None:
    """Run everything, and print the result as JSON; the exit status is 1 if anything does not add up."""
    parser = option_parser(__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--concurrency", type=int, default=24)
    parser.add_argument("--disturbances", type=int, help="of each of two sorts; default: one for 100 requests")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="send no request after this time")
    options = vars(parser.parse_args())
    options["disturbances"] = options["disturbances"] or options["requests"] // 100
    with tempfile.TemporaryDirectory(prefix="cluster-chaos-") as directory:
        result = asyncio.run(chaos(Path(directory), **options))
    print(json.dumps(result, indent=1))
    sys.exit(1 if result["wrong"] else 0)


if __name__ == "__main__":
    main()
