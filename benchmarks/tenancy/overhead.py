"""Cost of keys, limits, fair queueing and ledger: the service with all of them, and without any, in turns.

    python -m benchmarks.tenancy.overhead [--rounds 10] [--redis redis://127.0.0.1:6379/0]

Fake engines that answer at once, clips of a second. In each round each service gets `--requests` one at a time (for
latencies), and twice as many from 16 callers (for requests/s). Writes results/tenancy-overhead.json.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp

from benchmarks.load.wav import wav_base64
from benchmarks.load.wire import chat_body
from benchmarks.managed_process import LocalService
from benchmarks.program import CAPTIONER, RESULTS, option_parser, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator

KEY = "sk-of-the-benchmark"
ON = (f"--api-keys={KEY}",)
LIMITS = (
    "requests_per_minute",
    "tokens_per_minute",
    "audio_seconds_per_minute",
    "concurrent_requests",
    "tokens_per_day",
)
"""Limits of the tenant of the settings' keys: each is counted, none is reached."""
OFF = ("--no-auth", "--no-metering")
CALLERS = 16


@contextmanager
def running_service(*flags: str) -> Iterator[str]:
    """Run a service; yield the URL of its chat completions."""
    with tempfile.TemporaryDirectory(prefix="overhead-") as name:
        if flags[0] == ON[0]:
            limits = [f"--limit={limit}=1000000000" for limit in LIMITS]
            subprocess.run(
                [CAPTIONER, "tenants", "create", "default", "--plan=unlimited", *limits],
                env=os.environ | {"CAPTIONER_DATA_DIR": str(Path(name, "data"))},
                check=True,
                stdout=subprocess.DEVNULL,
            )
        with LocalService("--engine=fake", "--audio-workers=1", *flags, directory=Path(name)) as service:
            yield f"{service.url}/v1/chat/completions"


async def send_all(url: str, requests: int, callers: int) -> tuple[list[float], float]:
    """Return the latencies in ms, and requests/s."""
    body = json.dumps(chat_body(wav_base64(bytes(32_000)), "wav")).encode()  # a second of silence
    unsent, latencies_ms = iter(range(requests)), list[float]()
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers) as session:

        async def caller() -> None:
            for _ in unsent:
                began = time.perf_counter()
                async with session.post(url, data=body) as answer:
                    if answer.status != 200:
                        raise RuntimeError(await answer.text())
                    await answer.read()
                latencies_ms.append(1000 * (time.perf_counter() - began))

        began = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(callers)))
        return latencies_ms, requests / (time.perf_counter() - began)


def main() -> None:
    """Measure in turns, and print the differences."""
    parser = option_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--requests", type=int, default=300, help="of each kind in each round")
    parser.add_argument("--redis", help="URL of the Redis that counts the limits; default: memory")
    parser.add_argument("--out", type=Path, default=RESULTS / "tenancy-overhead.json")
    options = parser.parse_args()
    on = [*ON, *([f"--redis-url={options.redis}"] if options.redis else [])]
    rounds: list[dict[str, Any]] = []
    with ExitStack() as stack:
        urls = {"on": stack.enter_context(running_service(*on)), "off": stack.enter_context(running_service(*OFF))}
        for url in urls.values():
            asyncio.run(send_all(url, options.requests, CALLERS))
        for number in range(options.rounds):
            found: dict[str, Any] = {}
            for name in sorted(urls, reverse=bool(number % 2)):
                alone_ms, _ = asyncio.run(send_all(urls[name], options.requests, 1))
                _, per_s = asyncio.run(send_all(urls[name], 2 * options.requests, CALLERS))
                cuts = statistics.quantiles(alone_ms, n=100)
                found[name] = {"p50_ms": cuts[49], "p99_ms": cuts[98], "requests_per_s": per_s}
            rounds.append(found)
    result = {
        "p50 added, ms (at most 1)": _spread([each["on"]["p50_ms"] - each["off"]["p50_ms"] for each in rounds]),
        "p99 added, ms": _spread([each["on"]["p99_ms"] - each["off"]["p99_ms"] for each in rounds]),
        "requests/s, on / off (at least 0.9)": _spread(
            [each["on"]["requests_per_s"] / each["off"]["requests_per_s"] for each in rounds]
        ),
        "load_average": os.getloadavg(),
        "rounds": rounds,
    }
    write_json(options.out, result)
    print(json.dumps({name: value for name, value in result.items() if name != "rounds"}, indent=1))


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "least": round(min(values), 3),
        "most": round(max(values), 3),
    }


if __name__ == "__main__":
    main()
