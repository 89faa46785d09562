"""A step and a spike of load on a cluster whose engines scale: how many there are, how long new ones take, who waits.

    python benchmarks/autoscaling.py

Real Ray Serve on this machine, fake engines of a fixed speed. The load is Locust's (cluster_users.py), every answer is
checked.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

from clusters import BIN, Callers, Cluster

RESULT = Path(__file__).parent / "results" / "autoscaling.json"
TOKENS, FEW, MANY = 24, 2, 24
FLAGS = (
    "--no-auth --engine=fake --fake-ttft-s=0.3 --fake-tpot-s=0.1 --max-num-seqs=6 --min-engine-replicas=1 --max-engine-replicas=4 "
    "--target-audio-seconds-per-engine=10 --scale-down-after-s=20 --min-frontends=1 --max-frontends=1 --audio-workers=1 --frontend-cpus=0.2 "
    "--engine-cpus=0.2 --shutdown-grace-s=60"
)
PHASES = (("quiet", 20, FEW), ("step", 90, MANY), ("quiet", 60, FEW), ("spike", 10, MANY), ("quiet", 60, FEW))
"""Name, seconds, users."""


class Watch(threading.Thread):
    """Writes down once a second how many engines there are as processes, and how many the frontend finds ready."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(daemon=True)
        self.samples: list[dict[str, Any]] = []
        self._cluster = cluster
        self._ended = threading.Event()

    def run(self) -> None:
        """Until it is told to end."""
        while not self._ended.wait(1):
            with suppress(OSError):  # Ray's proxy is busy, or the frontend
                self.samples.append(
                    {
                        "at": time.time(),
                        "engines": len(self._cluster.processes()["engine"]),
                        "ready": int(self._metrics()["captioner_engine_replicas_ready"]),
                    }
                )

    def end(self) -> None:
        """Stop."""
        self._ended.set()
        self.join()

    def _metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"{self._cluster.url}/metrics", timeout=5) as answer:  # noqa: S310 - of ours
            lines = [line.split() for line in answer.read().decode().splitlines() if "{" not in line]
        return {line[0]: float(line[1]) for line in lines if len(line) == 2 and line[0] != "#"}


def main() -> None:
    """Run it all, and write the result."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--port", type=int, default=8400)
    given = arguments.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="autoscaling-"))
    print(f"logs in {directory}", flush=True)
    command = [str(BIN / "captioner"), "cluster", f"--port={given.port}", f"--fake-tokens={TOKENS}", *FLAGS.split()]
    result: dict[str, Any] = {"settings": FLAGS, "load_average": [os.getloadavg()], "phases": []}
    with Cluster(command, directory, given.port, {}) as cluster:
        result["ready_s"] = round(cluster.wait_ready(), 1)
        watch = Watch(cluster)
        watch.start()
        for number, (name, length_s, users) in enumerate(PHASES):
            began = time.time()
            with Callers(cluster, users, max_pause_s=0.2, tokens=TOKENS, name=f"phase-{number}") as callers:
                time.sleep(length_s)
                ended = time.time()
            account = callers.account()
            samples = [sample for sample in watch.samples if began <= sample["at"] < ended]
            if not samples:
                raise RuntimeError("nothing was seen of the engines: does /metrics answer?")
            waits_s = [ending["seconds"] for ending in callers.endings() if ending["outcome"] == "answered"]
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
                    "account": {key: value for key, value in account.items() if key != "by_kind"},
                }
            )
            print(result["phases"][-1], flush=True)
        watch.end()
    result["samples"] = watch.samples
    result["load_average"].append(os.getloadavg())
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


def rise(samples: list[dict[str, Any]], name: str, began: float) -> float | None:
    """Seconds until the first sample that is above the first one."""
    return next((round(each["at"] - began, 1) for each in samples if each[name] > samples[0][name]), None)


if __name__ == "__main__":
    main()
