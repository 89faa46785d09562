"""A step and a spike of load on a cluster whose engines scale: number of engines, time to new ones, waiting callers.

    python -m benchmarks.cluster.autoscaling

Real Ray Serve on this machine, fake engines of a fixed speed. The load is Locust's (`callers.py`), and every answer is
checked. Writes results/autoscaling.json, or OUT.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.cluster.callers import Callers
from benchmarks.cluster.runner import SMALL, Cluster, brief, captioner_command
from benchmarks.program import RESULTS, option_parser, write_json

TOKENS, FEW, MANY = 24, 2, 24
FLAGS = (
    *(f"--fake-tokens={TOKENS}", "--fake-ttft-s=0.3", "--fake-tpot-s=0.1", "--max-num-seqs=6"),
    *("--min-engine-replicas=1", "--max-engine-replicas=4", "--min-frontends=1", "--max-frontends=1"),
    *("--target-audio-seconds-per-engine=10", "--scale-down-after-s=20", "--shutdown-grace-s=60", *SMALL),
)
PHASES = (("quiet", 20, FEW), ("step", 90, MANY), ("quiet", 60, FEW), ("spike", 10, MANY), ("quiet", 60, FEW))
"""Name, seconds, callers."""


class EngineCounter(threading.Thread):
    """Samples once a second the number of engine processes, and of engines that the frontend finds ready."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(daemon=True)
        self.samples: list[dict[str, Any]] = []
        self._cluster = cluster
        self._stopped = threading.Event()

    def run(self) -> None:
        """Sample until `stop`."""
        while not self._stopped.wait(1):
            with suppress(OSError):  # Ray's proxy or the frontend is busy
                self.samples.append(
                    {
                        "at": time.time(),
                        "engines": len(self._cluster.processes()["engine"]),
                        "ready": int(self._metrics()["captioner_engine_replicas_ready"]),
                    }
                )

    def stop(self) -> None:
        """Stop sampling."""
        self._stopped.set()
        self.join()

    def _metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"{self._cluster.url}/metrics", timeout=5) as answer:  # noqa: S310 - our own address
            lines = [line.split() for line in answer.read().decode().splitlines() if "{" not in line]
        return {line[0]: float(line[1]) for line in lines if len(line) == 2 and line[0] != "#"}


def main() -> None:
    """Run all phases, and write the result."""
    parser = option_parser(__doc__)
    parser.add_argument("--port", type=int, default=8400)
    parser.add_argument("--out", type=Path, default=RESULTS / "autoscaling.json")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="autoscaling-"))
    print(f"logs in {directory}", flush=True)
    command = captioner_command("cluster", options.port, *FLAGS)
    result: dict[str, Any] = {"settings": " ".join(FLAGS), "load_average": [os.getloadavg()], "phases": []}
    with Cluster(command, directory, options.port) as cluster:
        result["ready_s"] = round(cluster.wait_ready(), 1)
        counter = EngineCounter(cluster)
        counter.start()
        for number, (name, length_s, users) in enumerate(PHASES):
            began = time.time()
            callers = Callers(cluster.url, directory, users, max_pause_s=0.2, tokens=TOKENS, name=f"phase-{number}")
            with callers:
                time.sleep(length_s)
                ended = time.time()
            samples = [sample for sample in counter.samples if began <= sample["at"] < ended]
            if not samples:
                raise RuntimeError(f"phase {number} ({name}) has no sample of the engines: does /metrics answer?")
            waits_s = [entry["e2e_s"] for entry in callers.answered()]
            result["phases"].append(
                {
                    "name": name,
                    "users": users,
                    "began": began,
                    "seconds": round(ended - began),
                    "engines_at_the_end": samples[-1]["ready"],
                    "first_new_process_s": rise(samples, "engines", began),
                    "first_new_ready_s": rise(samples, "ready", began),
                    "answer_s_median": statistics.median(waits_s) if waits_s else None,
                    "account": brief(callers.account(), "by_way"),
                }
            )
            print(result["phases"][-1], flush=True)
        counter.stop()
    result["samples"] = counter.samples
    result["load_average"].append(os.getloadavg())
    write_json(options.out, result)


def rise(samples: list[dict[str, Any]], name: str, began: float) -> float | None:
    """Return the seconds until the first sample above that of the start."""
    return next((round(each["at"] - began, 1) for each in samples if each[name] > samples[0][name]), None)


if __name__ == "__main__":
    main()
