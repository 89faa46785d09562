"""Two tenants before an engine that is short: who waits how long, and who gets how much.

    python benchmarks/fairness.py [--seconds 60] [--out FILE]

The service runs with a fake engine of a fixed speed, so its capacity is known. Tenant B sends three quarters of its
half, evenly spread. Tenant A sends its half (calm), then 20 times as much (flood); then the same flood comes with B's
requests under A's key (one line for all: the unfair order). At last both flood, with weights 3 and 1. In each phase
what ends in its last two thirds counts.
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
import statistics
import subprocess
import sys
import tempfile
import time
import wave
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

BIN = Path(sys.executable).parent
PLACES, LEAST_TOKENS, TOKENS, TPOT_S = 16, 24, 72, 0.1
"""Captions differ in length: alike, those that begin together would end together, and everyone wait for that."""
CAPACITY = PLACES / ((LEAST_TOKENS + TOKENS) / 2 * TPOT_S)
"""Captions per second that the engine makes, but for what starts and ends take."""
FLOOD = 20
FLAGS = (
    f"--engine=fake --fake-tokens={TOKENS} --fake-tpot-s={TPOT_S} --max-num-seqs={PLACES} --audio-workers=1 "
    "--max-engine-wait-s=60 --max-engine-queue=256"
)


@dataclass
class Phase:
    """What came of one load."""

    waits_s: dict[str, list[float]] = field(default_factory=lambda: {"a": [], "b": []})
    refused: dict[str, int] = field(default_factory=lambda: {"a": 0, "b": 0})
    tokens: dict[str, int] = field(default_factory=lambda: {"a": 0, "b": 0})

    def told(self, seconds: float) -> dict[str, Any]:
        """As it goes into the report."""
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
    """A clip that no other is like."""
    out = io.BytesIO()
    with wave.open(out, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(number.to_bytes(4, "little") * round(seconds * 4000))
    return base64.b64encode(out.getvalue()).decode()


class Load:
    """Requests at a set rate, whatever becomes of them, for a time."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url
        self._session = session
        self._number = 0
        self._random = random.Random(1)

    async def run(self, seconds: float, rates: dict[str, float], keys: dict[str, str]) -> Phase:
        """Send `rates` of each tenant; what ends in the last two thirds counts."""
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
        audio = {"type": "input_audio", "input_audio": {"data": clip(self._number), "format": "wav"}}
        body = {
            "model": "qwen3-omni-30b-a3b-captioner",
            "messages": [{"role": "user", "content": [audio]}],
            "max_tokens": (tokens := self._random.randint(LEAST_TOKENS, TOKENS)),
        }
        began = time.monotonic()
        async with self._session.post(self._url, json=body, headers={"authorization": f"Bearer {key}"}) as answer:
            told = await answer.json()
        if answer.status not in {200, 429, 503}:
            raise RuntimeError(f"HTTP {answer.status}: {told}")
        if answer.status == 200 and told["usage"]["completion_tokens"] != tokens:
            raise RuntimeError(f"not a whole caption: {told}")
        if time.monotonic() > counts_from:
            if answer.status == 200:
                phase.waits_s[tenant].append(time.monotonic() - began)
                phase.tokens[tenant] += tokens
            else:
                phase.refused[tenant] += 1


def captioner(directory: Path, *words: str) -> Any:
    """A verb of the administration, as JSON."""
    environment = os.environ | {"CAPTIONER_DATA_DIR": str(directory)}
    command = [str(BIN / "captioner"), *words, "--format=json"]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


async def measure(url: str, seconds: float, keys: dict[str, dict[str, str]]) -> dict[str, Any]:
    """All phases."""
    share = CAPACITY / 2
    calm = {"a": share, "b": 0.75 * share}
    flood = calm | {"a": FLOOD * share}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=300)) as session:
        load = Load(f"{url}/v1/chat/completions", session)
        counted = seconds * 2 / 3
        phases = {}
        for name, rates, of in (
            ("calm", calm, keys["equal"]),
            ("flood", flood, keys["equal"]),
            ("flood, one line for all", flood, keys["one"]),
            ("both flood, weights 3 and 1", dict.fromkeys("ab", FLOOD * share / 2), keys["weighted"]),
        ):
            phases[name] = (await load.run(seconds, rates, of)).told(counted)
            print(name, phases[name], file=sys.stderr, flush=True)
            await asyncio.sleep(2)
    return phases


def verdict(phases: dict[str, Any]) -> dict[str, float]:
    """The ratios that were to be shown."""
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
    """Start the service, make the tenants, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="length of each of four phases")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fairness.json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fairness-") as name:
        directory = Path(name)
        for plan, weight in (("even", "1"), ("heavy", "3")):
            captioner(directory, "plans", "set", plan, f"--weight={weight}")
        secret = {}
        for tenant, plan in (("a", "even"), ("b", "even"), ("heavy", "heavy")):
            captioner(directory, "tenants", "create", tenant, f"--plan={plan}")
            secret[tenant] = captioner(directory, "keys", "create", tenant)["key"]
        keys = {
            "equal": {"a": secret["a"], "b": secret["b"]},
            "one": {"a": secret["a"], "b": secret["a"]},
            "weighted": {"a": secret["heavy"], "b": secret["b"]},
        }
        command = [str(BIN / "captioner"), "serve", "--port=0", f"--data-dir={directory}", *FLAGS.split()]
        log = directory / "log"
        with log.open("w") as out:
            service = subprocess.Popen([*command, f"--download-dir={directory}"], stderr=out, stdout=out)
        try:
            while not (found := re.search(r"ready after .* on (http://[^\s\"]+)", log.read_text())):
                if service.poll() is not None:
                    raise RuntimeError(log.read_text())
                time.sleep(0.1)
            phases = asyncio.run(measure(found[1], given.seconds, keys))
        finally:
            service.terminate()
            service.wait()
    result = {"settings": FLAGS, "seconds": given.seconds, "load_average": os.getloadavg(), "phases": phases}
    result["verdict"] = verdict(phases)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["verdict"], indent=1))


if __name__ == "__main__":
    main()
