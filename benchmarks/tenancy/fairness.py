"""Two tenants at a saturated engine: waiting times, and shares of throughput.

    python -m benchmarks.tenancy.fairness [--seconds 60] [--out FILE]

The service runs with a fake engine of a fixed speed, so its capacity is known. Tenant B sends three quarters of its
half, evenly spread. Tenant A sends its half (calm), then 20 times as much (flood); then the same flood arrives with B's
requests under A's key (one queue for all: the unfair order). Finally both flood, with weights 3 and 1. In each phase
the requests that end in its last two thirds count. Writes results/fairness.json, and prints the ratios.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.load.wav import wav_base64
from benchmarks.load.wire import chat_body
from benchmarks.managed_process import LocalService
from benchmarks.program import CAPTIONER, RESULTS, option_parser, write_json

SLOTS, LEAST_TOKENS, TOKENS, TPOT_S = 16, 24, 72, 0.1
"""Captions differ in length: equal captions that begin together would end together, and all callers wait for that."""
CAPACITY = SLOTS / ((LEAST_TOKENS + TOKENS) / 2 * TPOT_S)
"""Captions per second of the engine, without the time that starts and ends take."""
FLOOD = 20
FLAGS = (
    *("--engine=fake", f"--fake-tokens={TOKENS}", f"--fake-tpot-s={TPOT_S}", f"--max-num-seqs={SLOTS}"),
    *("--audio-workers=1", "--max-engine-wait-s=60", "--max-engine-queue=256"),
)


@dataclass
class Phase:
    """Answers of one load, by tenant."""

    waits_s: dict[str, list[float]] = field(default_factory=lambda: {"a": [], "b": []})
    refused: dict[str, int] = field(default_factory=lambda: {"a": 0, "b": 0})
    tokens: dict[str, int] = field(default_factory=lambda: {"a": 0, "b": 0})

    def summary(self, seconds: float) -> dict[str, Any]:
        """Return the figures of each tenant for the report."""
        return {
            tenant: {
                "answered": len(waits),
                "refused": self.refused[tenant],
                "tokens_per_s": round(self.tokens[tenant] / seconds, 1),
                "p50_s": round(statistics.median(waits), 3) if waits else None,
                "p95_s": round(statistics.quantiles(waits, n=20)[-1], 3) if len(waits) > 1 else None,
            }
            for tenant, waits in self.waits_s.items()
        }


def clip(number: int, seconds: float = 2.0) -> str:
    """Return a clip that is different for each number, as base64."""
    return wav_base64(number.to_bytes(4, "little") * round(seconds * 4000), 8000)


class OpenLoop:
    """Requests at a fixed rate, independent of their answers, for a time."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url
        self._session = session
        self._number = 0
        self._random = random.Random(1)

    async def run(self, seconds: float, rates: dict[str, float], keys: dict[str, str]) -> Phase:
        """Send each tenant's rate; requests that end in the last two thirds count."""
        phase, running, began = Phase(), set[asyncio.Task[None]](), time.monotonic()
        for tenant, rate in rates.items():
            for index in range(round(rate * seconds)):
                due = began + index / rate
                running.add(asyncio.create_task(self._one(tenant, keys[tenant], due, phase, began + seconds / 3)))
        done, late = await asyncio.wait(running, timeout=seconds + 5)
        for task in done:
            task.result()  # a wrong answer ends the run
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        return phase

    async def _one(self, tenant: str, key: str, due: float, phase: Phase, counts_from: float) -> None:
        await asyncio.sleep(max(0, due - time.monotonic()))
        self._number += 1
        tokens = self._random.randint(LEAST_TOKENS, TOKENS)
        body = chat_body(clip(self._number), "wav", max_tokens=tokens)
        began = time.monotonic()
        async with self._session.post(self._url, json=body, headers={"authorization": f"Bearer {key}"}) as response:
            answer = await response.json()
        if response.status not in {200, 429, 503}:
            raise RuntimeError(f"HTTP {response.status}: {answer}")
        if response.status == 200 and answer["usage"]["completion_tokens"] != tokens:
            raise RuntimeError(f"a caption of other than {tokens} tokens: {answer}")
        if time.monotonic() > counts_from:
            if response.status == 200:
                phase.waits_s[tenant].append(time.monotonic() - began)
                phase.tokens[tenant] += tokens
            else:
                phase.refused[tenant] += 1


def administer(data: Path, *words: str) -> Any:
    """Run a verb of the administration; return its JSON."""
    environment = os.environ | {"CAPTIONER_DATA_DIR": str(data)}
    command = [str(CAPTIONER), *words, "--format=json"]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def make_tenants(data: Path) -> dict[str, dict[str, str]]:
    """Create the tenants; return the keys of tenants a and b by order: equal weights, one queue, weights 3 and 1."""
    for plan, weight in (("even", "1"), ("heavy", "3")):
        administer(data, "plans", "set", plan, f"--weight={weight}")
    key = {}
    for tenant, plan in (("a", "even"), ("b", "even"), ("heavy", "heavy")):
        administer(data, "tenants", "create", tenant, f"--plan={plan}")
        key[tenant] = administer(data, "keys", "create", tenant)["key"]
    return {
        "equal": {"a": key["a"], "b": key["b"]},
        "one": {"a": key["a"], "b": key["a"]},
        "weighted": {"a": key["heavy"], "b": key["b"]},
    }


async def measure(url: str, seconds: float, keys: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Run all phases."""
    share = CAPACITY / 2
    calm = {"a": share, "b": 0.75 * share}
    flood = calm | {"a": FLOOD * share}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=300)) as session:
        load = OpenLoop(f"{url}/v1/chat/completions", session)
        counted = seconds * 2 / 3
        phases = {}
        for name, rates, of in (
            ("calm", calm, keys["equal"]),
            ("flood", flood, keys["equal"]),
            ("flood, one line for all", flood, keys["one"]),
            ("both flood, weights 3 and 1", dict.fromkeys("ab", FLOOD * share / 2), keys["weighted"]),
        ):
            phases[name] = (await load.run(seconds, rates, of)).summary(counted)
            print(name, phases[name], file=sys.stderr, flush=True)
            await asyncio.sleep(2)
    return phases


def verdict(phases: dict[str, Any]) -> dict[str, float]:
    """Return the ratios with an aim."""
    calm, flood, one, weighted = phases.values()

    def per_s(phase: dict[str, Any]) -> float:
        return float(sum(tenant["tokens_per_s"] for tenant in phase.values()))

    return {
        "B's p95, flood / calm (at most 1.25)": round(flood["b"]["p95_s"] / calm["b"]["p95_s"], 3),
        "B's p95, one line for all / calm": round((one["b"]["p95_s"] or float("inf")) / calm["b"]["p95_s"], 3),
        "throughput, fair / one line (0.97 or more)": round(per_s(flood) / per_s(one), 3),
        "A / B with weights 3 and 1 (2.85 to 3.15)": round(
            weighted["a"]["tokens_per_s"] / weighted["b"]["tokens_per_s"], 3
        ),
    }


def main() -> None:
    """Make the tenants, start the service, measure, and write the result."""
    parser = option_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="length of each of four phases")
    parser.add_argument("--out", type=Path, default=RESULTS / "fairness.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fairness-") as name:
        keys = make_tenants(Path(name, "data"))
        with LocalService(*FLAGS, directory=Path(name)) as service:
            phases = asyncio.run(measure(service.url, options.seconds, keys))
    result = {"settings": " ".join(FLAGS), "seconds": options.seconds, "load_average": os.getloadavg()}
    result |= {"phases": phases, "verdict": verdict(phases)}
    write_json(options.out, result)
    print(json.dumps(result["verdict"], indent=1))


if __name__ == "__main__":
    main()
