"""What keys, limits, fair turns and ledger cost: the service with all of it beside one with none, in turns.

    python benchmarks/tenancy_overhead.py [--rounds 10] [--redis redis://127.0.0.1:6379/0]

Fake engines that answer at once, clips of a second. In each round each service gets so many requests one at a time (for
latencies), and so many from 16 callers (for requests/s).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import wave
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp

if TYPE_CHECKING:
    from collections.abc import Iterator

CAPTIONER = Path(sys.executable).with_name("captioner")
KEY = "sk-of-the-benchmark"
ON = [f"--api-keys={KEY}"]
LIMITS = (
    "requests_per_minute",
    "tokens_per_minute",
    "audio_seconds_per_minute",
    "concurrent_requests",
    "tokens_per_day",
)
"""Of the tenant of the settings' keys: each is counted, none is reached."""
OFF = ["--no-auth", "--no-metering"]
CALLERS = 16


def body() -> bytes:
    """One request for the caption of a second of silence."""
    out = io.BytesIO()
    with wave.open(out, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16_000)
        sound.writeframes(bytes(32_000))
    audio = {"data": base64.b64encode(out.getvalue()).decode(), "format": "wav"}
    content = [{"type": "input_audio", "input_audio": audio}]
    return json.dumps(
        {"model": "qwen3-omni-30b-a3b-captioner", "messages": [{"role": "user", "content": content}]}
    ).encode()


@contextmanager
def served(*flags: str) -> Iterator[str]:
    """A service; yields where its captions are asked for."""
    with tempfile.TemporaryDirectory(prefix="overhead-") as name:
        log = Path(name, "log")
        if flags[0] == ON[0]:
            limits = [f"--limit={limit}=1000000000" for limit in LIMITS]
            subprocess.run(
                [CAPTIONER, "tenants", "create", "default", "--plan=unlimited", *limits],
                env=os.environ | {"CAPTIONER_DATA_DIR": name},
                check=True,
                stdout=subprocess.DEVNULL,
            )
        command = [str(CAPTIONER), "serve", "--port=0", "--engine=fake", "--audio-workers=1", f"--data-dir={name}"]
        with log.open("w") as out:
            service = subprocess.Popen([*command, f"--download-dir={name}", *flags], stdout=out, stderr=out)
        try:
            while not (found := re.search(r"ready after .* on (http://[^\s\"]+)", log.read_text())):
                if service.poll() is not None:
                    raise RuntimeError(log.read_text())
                time.sleep(0.1)
            yield f"{found[1]}/v1/chat/completions"
        finally:
            service.terminate()
            service.wait()


async def round_of(url: str, requests: int, callers: int) -> tuple[list[float], float]:
    """Latencies in ms, and requests/s."""
    left, latencies_ms, sent = iter(range(requests)), list[float](), body()
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers) as session:

        async def caller() -> None:
            for _ in left:
                began = time.perf_counter()
                async with session.post(url, data=sent) as answer:
                    if answer.status != 200:
                        raise RuntimeError(await answer.text())
                    await answer.read()
                latencies_ms.append(1000 * (time.perf_counter() - began))

        began = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(callers)))
        return latencies_ms, requests / (time.perf_counter() - began)


def main() -> None:
    """Measure in turns, and print what the difference is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--requests", type=int, default=300, help="of each kind in each round")
    parser.add_argument("--redis", help="limits are counted there")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tenancy-overhead.json")
    given = parser.parse_args()
    on = [*ON, *([f"--redis-url={given.redis}"] if given.redis else [])]
    rounds: list[dict[str, Any]] = []
    with ExitStack() as stack:
        urls = {"on": stack.enter_context(served(*on)), "off": stack.enter_context(served(*OFF))}
        for url in urls.values():
            asyncio.run(round_of(url, given.requests, CALLERS))
        for number in range(given.rounds):
            told: dict[str, Any] = {}
            for name in sorted(urls, reverse=bool(number % 2)):
                alone_ms, _ = asyncio.run(round_of(urls[name], given.requests, 1))
                _, per_s = asyncio.run(round_of(urls[name], 2 * given.requests, CALLERS))
                cuts = statistics.quantiles(alone_ms, n=100)
                told[name] = {"p50_ms": cuts[49], "p99_ms": cuts[98], "requests_per_s": per_s}
            rounds.append(told)
    p50 = sorted(each["on"]["p50_ms"] - each["off"]["p50_ms"] for each in rounds)
    p99 = sorted(each["on"]["p99_ms"] - each["off"]["p99_ms"] for each in rounds)
    ratio = sorted(each["on"]["requests_per_s"] / each["off"]["requests_per_s"] for each in rounds)
    result = {
        "p50 added, ms (at most 1)": _spread(p50),
        "p99 added, ms": _spread(p99),
        "requests/s, on / off (at least 0.9)": _spread(ratio),
        "load_average": os.getloadavg(),
        "rounds": rounds,
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "rounds"}, indent=1))


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 3), "least": round(values[0], 3), "most": round(values[-1], 3)}


if __name__ == "__main__":
    main()
