"""Cost of metrics, logs and (disabled) traces: requests/s with them over requests/s without, in interleaved rounds.

    python -m benchmarks.compare.instrumentation --rounds 10 --requests 400 --concurrency 16
    python -m benchmarks.compare.instrumentation --engine vllm --requests 64      # vLLM's own metrics on and off

Both services run all the time; only one gets requests at a time, and the order alternates. With the fake engine, which
takes next to no CPU, the frontend's CPU sets the rate: this is the worst case. `/metrics` of the instrumented service
is read every 5 s, three times as often as Prometheus would. Prints one JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.load.clips import alike, make
from benchmarks.load.closed_loop import Load, Target
from benchmarks.load.wire import MODEL_NAME
from benchmarks.managed_process import LocalService
from benchmarks.program import CAPTIONER, module_environment, option_parser

if TYPE_CHECKING:
    from collections.abc import Mapping

PROGRAMS = {
    "instrumented": [str(CAPTIONER)],
    "bare": [sys.executable, "-m", "benchmarks.compare.uninstrumented"],
}


class Service(LocalService):
    """One of the two services, on a free port. A context manager."""

    def __init__(self, name: str, engine: str) -> None:
        flags = ["--no-auth", "--allow-ignore-eos", f"--engine={engine}", "--max-num-seqs=64"]
        super().__init__(*flags, f"--{'no-' * (name == 'bare')}vllm-metrics", program=PROGRAMS[name])
        self.name = name

    @property
    def environment(self) -> Mapping[str, str]:
        return module_environment()


def main() -> None:
    """Compare, and print one JSON object."""
    parser = option_parser(__doc__)
    parser.add_argument("--engine", choices=("fake", "vllm"), default="fake")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        clips = alike(Path(directory), 8, 5)
        make(clips)
        paths = [clips[number % len(clips)].path for number in range(options.requests)]
        with Service("instrumented", options.engine) as first, Service("bare", options.engine) as second:
            _scrape(first.url)
            rates: dict[str, list[float]] = {first.name: [], second.name: []}
            for number in range(options.rounds + 1):
                for service in (first, second) if number % 2 else (second, first):
                    target = Target(f"{service.url}/v1/chat/completions", MODEL_NAME, options.tokens)
                    rate = _rate(Load(target, paths, options.concurrency), options.requests)
                    if number:  # the first round warms up
                        rates[service.name].append(rate)
    ratios = [with_ / without for with_, without in zip(rates["instrumented"], rates["bare"], strict=True)]
    result = {
        "conditions": vars(options),
        "requests_per_s": {name: round(statistics.median(of), 2) for name, of in rates.items()},
        "ratio": {
            "median": round(statistics.median(ratios), 4),
            "least": round(min(ratios), 4),
            "greatest": round(max(ratios), 4),
        },
    }
    print(json.dumps(result, indent=1))


def _rate(load: Load, requests: int) -> float:
    began = time.perf_counter()
    load.run()
    took_s = time.perf_counter() - began
    load.answers()  # raises unless each is right
    return requests / took_s


def _scrape(url: str) -> None:
    """Read the metrics again and again, as Prometheus does."""

    def read_forever() -> None:
        while True:
            try:
                with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:  # noqa: S310 - our own address
                    answer.read()
            except OSError:
                return
            time.sleep(5)

    threading.Thread(target=read_forever, daemon=True).start()


if __name__ == "__main__":
    main()
