"""Does the ledger add up? Requests that end in every way, processes that are killed, a database that stops.

Two API processes with the fake engine share a PostgreSQL. Clients let requests finish, leave before the first token or
in the middle; some captions fail, some meet their deadline, some audio is no audio. Meanwhile the processes are killed
(SIGKILL) and started again, and the database is stopped and started. In the end every record is compared with what the
engine says it handed over, and with what the clients were told.

    python benchmarks/ledger_chaos.py --requests 10000
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import wave
from collections import Counter, defaultdict
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psycopg
from stores import Postgres, Redis, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

MODEL = "qwen3-omni-30b-a3b-captioner"
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
    """One API process, with a directory of its own, which is killed and started again. A context."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self.port = free_port()
        self.data = directory / "data"
        self.log = directory / "log"
        self.engine_log = directory / "handed-over"
        directory.mkdir()
        self._environment = os.environ | environment | {"CAPTIONER_API_KEYS": KEY}
        self._flags = [*FLAGS, f"--port={self.port}", f"--data-dir={self.data}", f"--fake-log={self.engine_log}"]
        self._flags += [f"--uploads-dir={directory}", f"--download-dir={directory}"]
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def start(self) -> None:
        """Start it; it serves some seconds later."""
        command = [str(Path(sys.executable).with_name("captioner")), "serve", *self._flags]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)

    def kill(self) -> None:
        """End it without a word, and start another in its place."""
        assert self.process is not None  # noqa: S101
        self.process.kill()
        self.process.wait()
        self.start()

    def stop(self) -> None:
        """End it as an operator would."""
        assert self.process is not None  # noqa: S101
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=_START_S)

    async def serves(self) -> None:
        """Wait until it does."""
        async with asyncio.timeout(_START_S):
            while True:
                with suppress(OSError, asyncio.IncompleteReadError):
                    answer = await exchange(self.port, b"GET /readyz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                    if answer.status == 200:
                        return
                await asyncio.sleep(0.1)


@dataclass(slots=True)
class Seen:
    """What a client saw of one request."""

    kind: str = ""
    status: int = 0
    request_id: str = ""
    code: str = ""
    body: bytes = b""
    complete: bool = False
    usage: dict[str, Any] = field(default_factory=dict)


async def exchange(port: int, request: bytes, *, frames: int | None = None, patience_s: float = _CLIENT_S) -> Seen:
    """Send a request; leave after so many events or so long, without a word. Raises `OSError` if it cannot be sent."""
    seen = Seen()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    with suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(patience_s):
            await writer.drain()
            data, length = b"", None
            while piece := await reader.read(65_536):
                data += piece
                if not seen.status and b"\r\n\r\n" in data:
                    head, _, data = data.partition(b"\r\n\r\n")
                    seen.status = int(head.split(b" ", 2)[1])
                    found = re.search(rb"(?i)x-request-id: (\S+)", head)
                    seen.request_id = found[1].decode() if found else ""
                    sized = re.search(rb"(?i)content-length: (\d+)", head)
                    length = int(sized[1]) if sized else None
                seen.body = data
                if frames is not None and data.count(b"data:") >= frames:
                    break
            # Of a process that was killed the kernel closes the connection like any other.
            seen.complete = bool(seen.status) and (
                data.endswith(b"0\r\n\r\n") if length is None else len(data) == length
            )
    writer.transport.abort()
    return seen


def clip(seconds: float) -> str:
    """Make some audio, as a data URL."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(bytes(2 * round(16_000 * seconds)))
    return "data:audio/wav;base64," + base64.b64encode(buffer.getvalue()).decode()


AUDIO = [clip(seconds) for seconds in (0.3, 1.0, 2.0, 3.5)]


async def ask(port: int, kind: str, chance: random.Random) -> Seen:
    """Send one request that ends in this way, if nobody ends it before."""
    audio = "data:audio/wav;base64,bm8gYXVkaW8=" if kind == "no_audio" else chance.choice(AUDIO)
    part = {"type": "input_audio", "input_audio": {"data": audio}}
    body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": [part]}]}
    if kind in ("stream", "leave_midstream"):
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if kind == "deadline":
        body |= {"ignore_eos": True, "max_tokens": 3000}
    elif chance.random() < 0.3:
        body["max_tokens"] = chance.randint(1, TOKENS)
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\nconnection: close\r\n"
    request = f"{head}content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content
    match kind:
        case "leave_at_once":
            seen = await exchange(port, request, patience_s=0.002 * chance.random())
        case "leave_waiting":
            seen = await exchange(port, request, patience_s=0.1 * chance.random())
        case "leave_midstream":
            seen = await exchange(port, request, frames=chance.randint(1, 8))
        case _:
            seen = await exchange(port, request)
    seen.kind = kind
    if seen.complete and seen.status == 200:
        payloads = re.findall(rb"data: (\{.*\})", seen.body) or [seen.body]
        told = [json.loads(payload) for payload in payloads]
        seen.usage = next((each["usage"] for each in reversed(told) if each.get("usage")), {})
        seen.code = str(next((each["error"]["code"] for each in told if "error" in each), ""))
    elif seen.complete:
        with suppress(ValueError, KeyError, TypeError):
            seen.code = str(json.loads(seen.body)["error"]["code"])
    return seen


class Chaos:
    """One run."""

    def __init__(self, frontends: list[Frontend], database: Postgres, seed: int) -> None:
        self.seen: list[Seen] = []
        self.kills = self.outages = self.unsent = 0
        self._frontends = frontends
        self._database = database
        self._chance = random.Random(seed)
        self._left = 0

    async def run(self, requests: int, concurrency: int, *, kills: int, outages: int) -> None:
        """Send so many requests, and let so much go wrong meanwhile, evenly spread over them."""
        self._left = requests
        before = len(self.seen)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._trouble(requests, before, kills, self._kill))
            group.create_task(self._trouble(requests, before, outages, self._outage))
            for _ in range(concurrency):
                group.create_task(self._client())

    async def _client(self) -> None:
        while self._left > 0:
            self._left -= 1
            [kind] = self._chance.choices(KINDS, WEIGHTS)
            try:
                self.seen.append(await ask(self._chance.choice(self._frontends).port, kind, self._chance))
            except OSError:  # nobody listens, in this moment
                self.unsent += 1
                self._left += 1
                await asyncio.sleep(0.05)

    async def _trouble(self, requests: int, before: int, times: int, make: Any) -> None:
        for number in range(times):
            at = before + requests * (number + 0.3 + 0.4 * self._chance.random()) / times
            while len(self.seen) < at:  # noqa: ASYNC110 - no event tells it
                await asyncio.sleep(0.01)
            await make()

    async def _kill(self) -> None:
        frontend = self._chance.choice(self._frontends)
        await frontend.serves()  # to kill one that does not even serve yet would be too easy
        await asyncio.sleep(self._chance.random())
        await asyncio.to_thread(frontend.kill)
        self.kills += 1

    async def _outage(self) -> None:
        self.outages += 1
        await asyncio.to_thread(self._database.stop)
        await asyncio.sleep(1 + 2 * self._chance.random())
        await asyncio.to_thread(self._database.start)


def handed_over(frontends: list[Frontend]) -> Counter[str]:
    """Tokens by request, as the engines tell."""
    tokens: Counter[str] = Counter()
    for frontend in frontends:
        for line in frontend.engine_log.read_text().splitlines():
            request_id, count = line.split()
            tokens[request_id] += int(count)
    return tokens


def audit(rows: list[dict[str, Any]], seen: list[Seen], delivered: Counter[str]) -> dict[str, Any]:
    """Compare the ledger with what engines and clients know; `wrong` lists what does not add up."""
    by_id = {row["request_id"]: row for row in rows}
    wrong: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        for what in _faults(row, delivered[row["request_id"]]):
            wrong[what].append(f"{row['request_id']}: {row['ending']}, {row['output_tokens']} tokens")
    wrong["doubled"] += [
        request_id for request_id, count in Counter(row["request_id"] for row in rows).items() if count > 1
    ]
    wrong["handed over, not in the ledger"] += [request_id for request_id in delivered if request_id not in by_id]
    answered = [each for each in seen if each.status == 200]
    wrong["answered, not in the ledger"] += [each.request_id for each in answered if each.request_id not in by_id]
    told = [(each, by_id[each.request_id]) for each in answered if each.usage and each.request_id in by_id]
    # A client has its last byte a moment before the record is closed: a kill in between makes it lost.
    wrong["the client was told otherwise"] += [
        each.request_id
        for each, row in told
        if row["ending"] != "lost"
        and (each.usage["prompt_tokens"], each.usage["completion_tokens"])
        != (row["input_tokens"], row["output_tokens"])
    ]
    wrong["answered to the end, recorded otherwise"] += [
        f"{each.request_id}: {row['ending']}"
        for each, row in told
        if row["ending"] not in ("finished", "partial", "lost")
    ]
    lost = {row["request_id"]: row for row in rows if row["ending"] == "lost"}
    return {
        "records": len(rows),
        "endings": dict(Counter(str(row["ending"]) for row in rows)),
        "output_tokens_of_all_but_lost": {
            "ledger": sum(row["output_tokens"] for row in rows if row["request_id"] not in lost),
            "engine": sum(tokens for request_id, tokens in delivered.items() if request_id not in lost),
        },
        "lost": {
            "records": len(lost),
            "tokens_recorded": sum(row["output_tokens"] for row in lost.values()),
            "tokens_handed_over": sum(delivered[request_id] for request_id in lost),
            "answered_to_the_end": sum(each.request_id in lost for each, _ in told),
        },
        "billed_nanos": sum(row["amount_nanos"] for row in rows),
        "wrong": {what: found for what, found in wrong.items() if found},
    }


def _faults(row: dict[str, Any], delivered: int) -> Iterator[str]:
    """What is wrong with one record, the engine having handed over so many tokens."""
    ending, output = row["ending"], row["output_tokens"]
    if ending is None or row["closed_at"] is None:
        yield "still open"
    if output > delivered or (ending != "lost" and output != delivered):
        yield "tokens differ from the engine's"
    paid = ending in ("finished", "partial") or (ending == "disconnected" and row["prepared_at"] is not None)
    if row["billed"] != paid:
        yield "billed against the rule"
    if row["amount_nanos"] != paid * (15_800 * row["input_tokens"] + 12_700 * output):
        yield "another amount"


def everything(database: Postgres) -> list[dict[str, Any]]:
    """The ledger, row by row."""
    with psycopg.connect(database.url, row_factory=psycopg.rows.dict_row) as connection:
        return connection.execute("SELECT * FROM usage_records").fetchall()


def billed_tokens(rows: list[dict[str, Any]]) -> int:
    """Tokens that are to be paid."""
    return sum(row["input_tokens"] + row["output_tokens"] for row in rows if row["billed"])


def set_budget(database: Postgres, more: int) -> int:
    """Let the tenant of the settings' keys spend so many tokens more today; return its budget of the day."""
    budget = billed_tokens(everything(database)) + more
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
    """Run it all; return what happened, and under `wrong` what does not add up."""
    with ExitStack() as stack:
        database, redis = stack.enter_context(Postgres()), stack.enter_context(Redis())
        environment = {"CAPTIONER_DATABASE_URL": database.url} | shared(redis)
        frontends = [stack.enter_context(Frontend(directory / str(number), environment)) for number in range(2)]
        for frontend in frontends:
            await frontend.serves()
        run, began = Chaos(frontends, database, seed), time.monotonic()
        await run.run(requests, concurrency, kills=kills, outages=outages)
        took_s = time.monotonic() - began
        for frontend in frontends:
            await frontend.serves()
        # Limits in memory hold for one process: a budget is tried on one, which is killed as well.
        frontends[1].stop()
        await asyncio.sleep(2)
        budget = set_budget(database, 50 * requests // 10)
        await asyncio.sleep(2)
        last = Chaos(frontends[:1], database, seed + 1)
        await last.run(max(100, requests // 5), concurrency // 2, kills=1, outages=0)
        await frontends[0].serves()
        frontends[0].stop()
        rows = everything(database)
        result = audit(rows, run.seen + last.seen, handed_over(frontends))
        result["budget"] = spent = {
            "tokens": budget,
            "billed": billed_tokens(rows),
            "most_in_flight": concurrency // 2 * (3000 + 60),
            "refused": sum(each.status == 429 for each in last.seen),
        }
        if not spent["refused"] or spent["billed"] > budget + spent["most_in_flight"]:
            result["wrong"]["budget"] = [json.dumps(spent)]
        left = [str(path) for frontend in frontends for path in frontend.data.glob("journal/*")]
        if left:
            result["wrong"]["journals left"] = left
    return {
        "requests": len(run.seen),
        "seconds": round(took_s, 1),
        "kills": run.kills,
        "database_outages": run.outages,
        "not_sent_as_nobody_listened": run.unsent,
        "seen": {f"{kind} {status} {code}".strip(): count for (kind, status, code), count in _sorted(run.seen)},
        **result,
    }


def shared(redis: Redis) -> dict[str, str]:
    """What both processes must have in common."""
    return {"CAPTIONER_REDIS_URL": redis.url, "CAPTIONER_KEY_PEPPER": "the same for both, and no secret here"}


def _sorted(seen: list[Seen]) -> list[tuple[tuple[str, int, str], int]]:
    return sorted(Counter((each.kind, each.status, each.code) for each in seen).items())


def main() -> None:
    """Run it, and print the result as JSON; the exit status tells whether all adds up."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--requests", type=int, default=10_000)
    arguments.add_argument("--concurrency", type=int, default=48)
    arguments.add_argument("--kills", type=int, default=20)
    arguments.add_argument("--outages", type=int, default=6)
    arguments.add_argument("--seed", type=int, default=1)
    given = vars(arguments.parse_args())
    with tempfile.TemporaryDirectory(prefix="ledger-chaos-") as directory:
        result = asyncio.run(chaos(Path(directory), **given))
    print(json.dumps(result, indent=1))
    sys.exit(1 if result["wrong"] else 0)


if __name__ == "__main__":
    main()
