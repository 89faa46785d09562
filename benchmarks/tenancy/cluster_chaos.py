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
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg

from benchmarks.program import option_parser
from benchmarks.tenancy import chaos_client
from benchmarks.tenancy.chaos_audit import audit
from benchmarks.tenancy.chaos_client import CLIPS, ENDINGS, ENDLESS, KEY, TOKENS, Received
from benchmarks.tenancy.chaos_cluster import PROCESSES, SURROUNDINGS, Cluster
from benchmarks.tenancy.ledger_audit import all_records, billed_tokens, delivered_tokens
from benchmarks.tenancy.ledger_chaos import exchange

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from benchmarks.servers import Postgres

LIMITS = {"concurrent_requests": 10_000, "concurrent_audio_seconds": 100_000, "tokens_per_day": 10**12}
SETTLED_S = 150
"""Time for the end: an open record of a machine that is lost is closed after 120 s."""


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
