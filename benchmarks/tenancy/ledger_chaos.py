"""Exactness of the ledger while requests end in every way, processes are killed, and the database stops.

    python -m benchmarks.tenancy.ledger_chaos --requests 10000

Two API processes with the fake engine share a PostgreSQL. Clients let requests finish, or disconnect before the first
token or within the stream; some captions fail, some meet their deadline, some audio is no audio. Meanwhile the
processes are killed (SIGKILL) and started again, and the database is stopped and started. Finally every record is
compared with the engines' log and with the answers that the clients received. Prints the result as JSON; the exit
status is 1 if anything does not add up.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psycopg

from benchmarks.load.wav import wav_data_url
from benchmarks.load.wire import chat_body
from benchmarks.program import CAPTIONER, option_parser
from benchmarks.servers import Postgres, Redis, free_port
from benchmarks.tenancy.ledger_audit import Received, all_records, audit, billed_tokens, delivered_tokens

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

KEY = "sk-chaos-chaos-chaos-chaos-chaos-chaos"
KINDS = ("whole", "stream", "leave_at_once", "leave_waiting", "leave_midstream", "deadline", "no_audio")
WEIGHTS = (25, 25, 10, 10, 20, 5, 5)
TOKENS, PER_TOKEN_S, FAIL_SHARE = 40, 0.004, 0.1
FLAGS = (
    "--engine=fake",
    "--audio-workers=1",
    f"--fake-tokens={TOKENS}",
    f"--fake-tpot-s={PER_TOKEN_S}",
    f"--fake-fail-share={FAIL_SHARE}",
    "--fake-ttft-s=0.02",
    "--stream-flush-interval-s=0.01",
    "--allow-ignore-eos",
    "--response-timeout-s=3",
    "--shutdown-grace-s=20",
)
_START_S = 120
_CLIENT_S = 60


class Frontend:
    """An API process that is killed and started again, with its own directory. A context manager."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self.port = free_port()
        self.data = directory / "data"
        self.engine_log = directory / "engine-log"
        self._log = directory / "log"
        directory.mkdir()
        self._environment = os.environ | environment | {"CAPTIONER_API_KEYS": KEY}
        self._flags = [*FLAGS, f"--port={self.port}", f"--data-dir={self.data}", f"--fake-log={self.engine_log}"]
        self._flags += [f"--uploads-dir={directory}", f"--download-dir={directory}"]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def command(self) -> list[str]:
        """Command line."""
        return [str(CAPTIONER), "serve", *self._flags]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def start(self) -> None:
        """Start the process, without waiting until it is ready."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self.command, env=self._environment, stdout=log, stderr=log)

    def kill(self) -> None:
        """Kill the process, and start another in its place."""
        assert self.process is not None  # noqa: S101
        self.process.kill()
        self.process.wait()
        self.start()

    def stop(self) -> None:
        """Stop the process as an operator would."""
        assert self.process is not None  # noqa: S101
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=_START_S)

    async def wait_ready(self) -> None:
        """Wait until the process is ready. Raises `TimeoutError`."""
        async with asyncio.timeout(_START_S):
            while True:
                with suppress(OSError, asyncio.IncompleteReadError):
                    answer = await exchange(self.port, b"GET /readyz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                    if answer.status == 200:
                        return
                await asyncio.sleep(0.1)


async def exchange(port: int, request: bytes, *, events: int | None = None, patience_s: float = _CLIENT_S) -> Received:
    """Send a request; disconnect after `events` or `patience_s`. Raises `OSError` if it cannot be sent."""
    received = Received()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    with suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(patience_s):
            await writer.drain()
            data, length = b"", None
            while piece := await reader.read(65_536):
                data += piece
                if not received.status and b"\r\n\r\n" in data:
                    headers, _, data = data.partition(b"\r\n\r\n")
                    received.status = int(headers.split(b" ", 2)[1])
                    found = re.search(rb"(?i)x-request-id: (\S+)", headers)
                    received.request_id = found[1].decode() if found else ""
                    sized = re.search(rb"(?i)content-length: (\d+)", headers)
                    length = int(sized[1]) if sized else None
                received.body = data
                if events is not None and data.count(b"data:") >= events:
                    break
            # The kernel closes the connection of a killed process like any other.
            received.complete = bool(received.status) and (
                data.endswith(b"0\r\n\r\n") if length is None else len(data) == length
            )
    writer.transport.abort()
    return received


AUDIO = [wav_data_url(bytes(2 * round(16_000 * seconds))) for seconds in (0.3, 1.0, 2.0, 3.5)]


async def request_caption(port: int, kind: str, chance: random.Random) -> Received:
    """Send one request that ends in the way of `kind`, unless a kill ends it before."""
    audio = "data:audio/wav;base64,bm8gYXVkaW8=" if kind == "no_audio" else chance.choice(AUDIO)
    body = chat_body(audio)
    if kind in ("stream", "leave_midstream"):
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if kind == "deadline":
        body |= {"ignore_eos": True, "max_tokens": 3000}
    elif chance.random() < 0.3:
        body["max_tokens"] = chance.randint(1, TOKENS)
    content = json.dumps(body).encode()
    headers = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\nconnection: close\r\n"
    request = f"{headers}content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content
    match kind:
        case "leave_at_once":
            received = await exchange(port, request, patience_s=0.002 * chance.random())
        case "leave_waiting":
            received = await exchange(port, request, patience_s=0.1 * chance.random())
        case "leave_midstream":
            received = await exchange(port, request, events=chance.randint(1, 8))
        case _:
            received = await exchange(port, request)
    received.kind = kind
    if received.complete and received.status == 200:
        payloads = re.findall(rb"data: (\{.*\})", received.body) or [received.body]
        parsed = [json.loads(payload) for payload in payloads]
        received.usage = next((each["usage"] for each in reversed(parsed) if each.get("usage")), {})
        received.code = str(next((each["error"]["code"] for each in parsed if "error" in each), ""))
    elif received.complete:
        with suppress(ValueError, KeyError, TypeError):
            received.code = str(json.loads(received.body)["error"]["code"])
    return received


class Chaos:
    """One run of clients, kills and outages."""

    def __init__(self, frontends: list[Frontend], database: Postgres, seed: int) -> None:
        self.received: list[Received] = []
        self.kills = self.outages = self.unsent = 0
        self._frontends = frontends
        self._database = database
        self._chance = random.Random(seed)
        self._left = 0

    async def run(self, requests: int, concurrency: int, *, kills: int, outages: int) -> None:
        """Send the requests; kill processes and stop the database meanwhile, evenly spread over the requests."""
        self._left = requests
        before = len(self.received)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._disturb(requests, before, kills, self._kill))
            group.create_task(self._disturb(requests, before, outages, self._outage))
            for _ in range(concurrency):
                group.create_task(self._client())

    async def _client(self) -> None:
        while self._left > 0:
            self._left -= 1
            [kind] = self._chance.choices(KINDS, WEIGHTS)
            try:
                port = self._chance.choice(self._frontends).port
                self.received.append(await request_caption(port, kind, self._chance))
            except OSError:  # no process listens at this moment
                self.unsent += 1
                self._left += 1
                await asyncio.sleep(0.05)

    async def _disturb(self, requests: int, before: int, times: int, act: Callable[[], Awaitable[None]]) -> None:
        for number in range(times):
            at = before + requests * (number + 0.3 + 0.4 * self._chance.random()) / times
            while len(self.received) < at:  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0.01)
            await act()

    async def _kill(self) -> None:
        frontend = self._chance.choice(self._frontends)
        await frontend.wait_ready()  # to kill a process before it serves would be too easy
        await asyncio.sleep(self._chance.random())
        await asyncio.to_thread(frontend.kill)
        self.kills += 1

    async def _outage(self) -> None:
        self.outages += 1
        await asyncio.to_thread(self._database.stop)
        await asyncio.sleep(1 + 2 * self._chance.random())
        await asyncio.to_thread(self._database.start)


def set_budget(database: Postgres, more: int) -> int:
    """Let the tenant of the settings' keys spend `more` tokens today; return its budget of the day."""
    budget = billed_tokens(all_records(database)) + more
    with psycopg.connect(database.url) as connection:
        connection.execute(
            "INSERT INTO tenants (id, name, region, state, plan, limits, free_tokens, free_days, free_only, "
            "log_content, created_at, activated_at) VALUES ('default', 'Default', 'beijing', 'active', 'unlimited', "
            "%s, 0, 0, false, false, 0, 0)",
            [json.dumps({"tokens_per_day": budget})],
        )
        connection.execute("UPDATE store_state SET revision = revision + 1")
    return budget


async def chaos(
    directory: Path, *, requests: int, concurrency: int = 48, kills: int, outages: int, seed: int = 1
) -> dict[str, Any]:
    """Run everything; return the counts, and under `wrong` what does not add up."""
    with ExitStack() as stack:
        database, redis = stack.enter_context(Postgres()), stack.enter_context(Redis())
        environment = {"CAPTIONER_DATABASE_URL": database.url} | shared(redis)
        frontends = [stack.enter_context(Frontend(directory / str(number), environment)) for number in range(2)]
        for frontend in frontends:
            await frontend.wait_ready()
        run, began = Chaos(frontends, database, seed), time.monotonic()
        await run.run(requests, concurrency, kills=kills, outages=outages)
        took_s = time.monotonic() - began
        for frontend in frontends:
            await frontend.wait_ready()
        # Limits in memory hold for one process: the budget is tried with one process, which is killed as well.
        frontends[1].stop()
        await asyncio.sleep(2)
        budget = set_budget(database, 50 * requests // 10)
        await asyncio.sleep(2)
        last = Chaos(frontends[:1], database, seed + 1)
        await last.run(max(100, requests // 5), concurrency // 2, kills=1, outages=0)
        await frontends[0].wait_ready()
        frontends[0].stop()
        rows = all_records(database)
        delivered = delivered_tokens([frontend.engine_log for frontend in frontends])
        result = audit(rows, run.received + last.received, delivered)
        result["budget"] = spent = {
            "tokens": budget,
            "billed": billed_tokens(rows),
            "most_in_flight": concurrency // 2 * (3000 + 60),
            "refused": sum(each.status == 429 for each in last.received),
        }
        if not spent["refused"] or spent["billed"] > budget + spent["most_in_flight"]:
            result["wrong"]["budget"] = [json.dumps(spent)]
        left = [str(path) for frontend in frontends for path in frontend.data.glob("journal/*")]
        if left:
            result["wrong"]["journals left"] = left
    return {
        "requests": len(run.received),
        "seconds": round(took_s, 1),
        "kills": run.kills,
        "database_outages": run.outages,
        "not_sent_as_nobody_listened": run.unsent,
        "seen": {f"{kind} {status} {code}".strip(): count for (kind, status, code), count in _sorted(run.received)},
        **result,
    }


def shared(redis: Redis) -> dict[str, str]:
    """Return the variables that both processes must have in common."""
    return {"CAPTIONER_REDIS_URL": redis.url, "CAPTIONER_KEY_PEPPER": "the same for both, and no secret here"}


def _sorted(received: list[Received]) -> list[tuple[tuple[str, int, str], int]]:
    return sorted(Counter((each.kind, each.status, each.code) for each in received).items())


def main() -> None:
    """Run everything, and print the result as JSON; the exit status is 1 if anything does not add up."""
    parser = option_parser(__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=48)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--outages", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    options = vars(parser.parse_args())
    with tempfile.TemporaryDirectory(prefix="ledger-chaos-") as directory:
        result = asyncio.run(chaos(Path(directory), **options))
    print(json.dumps(result, indent=1))
    sys.exit(1 if result["wrong"] else 0)


if __name__ == "__main__":
    main()
