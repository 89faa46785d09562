"""What metrics, logs and (off) traces cost: requests/s with them over requests/s without, in interleaved rounds.

    python benchmarks/instrumentation.py --rounds 10 --requests 400 --concurrency 16
    python benchmarks/instrumentation.py --engine vllm --requests 64      # with vLLM's own metrics against none

Both services run at the same time; only one of them is asked at a time, and which goes first alternates. With the fake
engine, which costs nothing, the frontend's CPU sets the pace: so this is the worst case. A scraper reads `/metrics` of the
instrumented one every 5 s, three times as often as it would.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Self

from clips import alike, make
from load import Load, Target

HERE = Path(__file__).parent
MODEL = "qwen3-omni-30b-a3b-captioner"
PROGRAMS = {
    "instrumented": [str(Path(sys.executable).with_name("captioner"))],
    "bare": [sys.executable, str(HERE / "uninstrumented.py")],
}


class Service:
    """One of the two, on a free port. A context."""

    def __init__(self, name: str, engine: str) -> None:
        self.name = name
        self._directory = tempfile.TemporaryDirectory(prefix="captioner-bench-")
        self._log = Path(self._directory.name, "log").open("w+")  # noqa: SIM115 - closed on leaving
        flags = ["serve", "--port=0", "--no-auth", "--allow-ignore-eos", f"--engine={engine}", "--max-num-seqs=64"]
        flags += [f"--data-dir={self._directory.name}/data", f"--{'no-' * (name == 'bare')}vllm-metrics"]
        self._command = PROGRAMS[name] + flags

    def __enter__(self) -> Self:
        environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
        self._process = subprocess.Popen(self._command, stdout=self._log, stderr=self._log, env=environment)
        deadline = time.monotonic() + 600
        while not (found := re.search(r"ready after .* on (http://[^\s\"]+)", Path(self._log.name).read_text())):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(Path(self._log.name).read_text()[-2000:])
            time.sleep(0.1)
        self.url = found[1]
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=60)
        self._log.close()
        self._directory.cleanup()


def main() -> None:
    """Compare, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("fake", "vllm"), default="fake")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        clips = alike(Path(directory), 8, 5)
        make(clips)
        paths = [clips[number % len(clips)].path for number in range(chosen.requests)]
        with Service("instrumented", chosen.engine) as first, Service("bare", chosen.engine) as second:
            _scrape(first.url)
            rates: dict[str, list[float]] = {first.name: [], second.name: []}
            for number in range(chosen.rounds + 1):
                for service in (first, second) if number % 2 else (second, first):
                    target = Target(f"{service.url}/v1/chat/completions", MODEL, chosen.tokens)
                    rate = _rate(Load(target, paths, chosen.concurrency), chosen.requests)
                    if number:  # the first round warms up
                        rates[service.name].append(rate)
    ratios = [ours / bare for ours, bare in zip(rates["instrumented"], rates["bare"], strict=True)]
    print(
        json.dumps(
            {
                "conditions": vars(chosen),
                "requests_per_s": {name: round(statistics.median(told), 2) for name, told in rates.items()},
                "ratio": {
                    "median": round(statistics.median(ratios), 4),
                    "least": round(min(ratios), 4),
                    "greatest": round(max(ratios), 4),
                },
            },
            indent=1,
        )
    )


def _rate(load: Load, requests: int) -> float:
    began = time.perf_counter()
    load.run()
    took_s = time.perf_counter() - began
    load.answers()  # raises unless each is right
    return requests / took_s


def _scrape(url: str) -> None:
    """Read the metrics again and again, as Prometheus does."""

    def forever() -> None:
        while True:
            try:
                with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:  # noqa: S310 - ours
                    answer.read()
            except OSError:
                return
            time.sleep(5)

    threading.Thread(target=forever, daemon=True).start()


if __name__ == "__main__":
    main()
