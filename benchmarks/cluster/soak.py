"""Hours of steady load with rolling updates: nothing may grow with the number of requests, and none may be lost.

    python -m benchmarks.cluster.soak [--minutes 120]

Real Ray Serve on this machine, as in `updates.py`, with keys and a ledger. Locust's callers first find the largest
rate, then send 70 % of it, in both dialects, streamed and not, in clips of eight lengths. Every ten minutes a rolling
update replaces all frontends and engines. Every few seconds each process's memory, descriptors and threads, and the
files and bytes of the data directory, are noted with the number of answers so far.

Growth is the slope of a straight line through a process's samples, per 1,000 answers, after a first minute that fills
caches; a slope below twice its standard error, or one that adds up to little over the process's life, is noise. Writes
results/soak.json, or OUT; the exit status is 1 if a request was lost or something grows.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from benchmarks.cluster.callers import Callers
from benchmarks.cluster.runner import Cluster, brief
from benchmarks.cluster.updates import TOKENS, configuration, connect, environment, head_command, update
from benchmarks.program import RESULTS, option_parser, write_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

USERS = 8
LOAD_SHARE = 0.7
KEY = "sk-soak-soak-soak-soak-soak-soak-soak"
WARM_UP_S, CALIBRATION_S, UPDATE_EVERY_S, SAMPLE_EVERY_S = 60, 60, 600, 5
MIN_SAMPLES = 20
GROWING = {"rss_bytes": 16 * 2**20, "descriptors": 8, "threads": 4}
"""Least growth over a process's life that counts: an allocator's and a pool's own movements are smaller."""

WATCHED = (
    *("frontend", "engine", "directory", "controller", "proxy manager", "proxy", "haproxy"),
    *("audio worker", "download process"),
)


def slope(requests: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Return the slope per request of the straight line through the samples, and its standard error.

    Neighbouring samples are alike, so the error is that of a tenth of the samples.
    """
    x, y = np.asarray(requests, float), np.asarray(values, float)
    spread = float(((x - x.mean()) ** 2).sum())
    if len(x) < MIN_SAMPLES or not spread:
        return 0.0, float("inf")
    steepness = float(((x - x.mean()) * (y - y.mean())).sum()) / spread
    residual = y - y.mean() - steepness * (x - x.mean())
    independent = max(len(x) / 10, 3.0)
    error = float(np.sqrt((residual**2).mean() * len(x) / spread / independent))
    return steepness, error


def growth(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a process gained per 1,000 answers, by resource; `grows` names the resources that do grow.

    Each sample has `at` and `answers`, and a value of each resource of `GROWING`.
    """
    settled = [each for each in samples if each["at"] - samples[0]["at"] >= WARM_UP_S]
    if len(settled) < MIN_SAMPLES:
        return {"samples": len(settled), "grows": []}
    answers = [each["answers"] for each in settled]
    found: dict[str, Any] = {"samples": len(settled), "answers": answers[-1] - answers[0], "grows": []}
    for resource, least in GROWING.items():
        steepness, error = slope(answers, [each[resource] for each in settled])
        found[f"{resource}_per_1000"] = round(1000 * steepness, 3)
        if steepness > 2 * error and steepness * found["answers"] > least:
            found["grows"].append(resource)
    return found


class Watch:
    """Samples of every process of a cluster, and of its data directory."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        self.processes: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
        self.data: list[dict[str, Any]] = []
        self._cluster = cluster
        self._directory = directory

    def sample(self, answers: int) -> None:
        """Note the state of every process and of the data directory."""
        now = time.time()
        for kind, processes in self._cluster.processes().items():
            for process in processes if kind in WATCHED else ():
                with suppress(psutil.Error):
                    values = {
                        "rss_bytes": process.memory_info().rss,
                        "descriptors": process.num_fds(),
                        "threads": process.num_threads(),
                    }
                    self.processes[kind, process.pid].append({"at": now, "answers": answers} | values)
        files = [path for path in self._directory.rglob("*") if path.is_file()]
        nbytes = 0
        for path in files:
            with suppress(FileNotFoundError):
                nbytes += path.stat().st_size
        self.data.append({"at": now, "answers": answers, "files": len(files), "bytes": nbytes})

    def result(self) -> dict[str, Any]:
        """Return the growth of each process, and of the data directory per answer."""
        found = [
            {"kind": kind, "pid": pid} | growth(samples)
            for (kind, pid), samples in self.processes.items()
            if samples[-1]["at"] - samples[0]["at"] > WARM_UP_S
        ]
        first, last = self.data[0], self.data[-1]
        answers = max(1, last["answers"] - first["answers"])
        data = {
            "files": [first["files"], last["files"]],
            "bytes_per_answer": round((last["bytes"] - first["bytes"]) / answers),
        }
        return {"processes": found, "data": data, "grows": [each for each in found if each["grows"]]}


def main() -> int:
    """Load, update, watch, and write the result. Returns the exit status."""
    parser = option_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--update-every-s", type=float, default=UPDATE_EVERY_S)
    parser.add_argument("--port", type=int, default=8400)
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.json")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"logs in {directory}", flush=True)
    os.environ["BENCHMARK_KEYS"] = KEY
    changes = {"auth": True, "api_keys": [KEY], "fake_ttft_s": 0.1, "fake_tpot_s": 0.01}
    result: dict[str, Any] = {"minutes": options.minutes, "users": USERS, "load_average": [os.getloadavg()]}
    command, dashboard = head_command(options.port)
    with Cluster(command, directory, options.port, environment()) as cluster:
        os.environ.update({name: cluster.environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")})
        client = connect(f"http://127.0.0.1:{dashboard}")
        update(client, configuration(options.port, **changes))
        cluster.wait_ready()
        with Callers(cluster.url, directory, USERS, max_pause_s=0, tokens=TOKENS, name="calibration") as callers:
            time.sleep(CALIBRATION_S)
            answered = len(callers.answered())
        most_per_s = answered / CALIBRATION_S
        # A closed loop: each caller's time for one request, and a pause of 0.05 s to twice the mean pause.
        pause_s = USERS / (LOAD_SHARE * most_per_s) - USERS / most_per_s
        result |= {"most_per_s": round(most_per_s, 2), "mean_pause_s": round(pause_s, 3), "updates_s": []}
        print(brief(result), flush=True)
        watch = Watch(cluster, directory / "data")
        until, update_at = time.time() + 60 * options.minutes, time.time() + options.update_every_s
        with Callers(cluster.url, directory, USERS, max_pause_s=2 * pause_s, tokens=TOKENS) as callers:
            while time.time() < until:
                if time.time() >= update_at:
                    number = len(result["updates_s"])
                    result["updates_s"].append(
                        update(client, configuration(options.port, **changes, heartbeat_s=10 + number))
                    )
                    update_at = time.time() + options.update_every_s
                watch.sample(len(callers.answered()))
                time.sleep(SAMPLE_EVERY_S)
        result |= {"account": callers.account()} | watch.result()
    result["load_average"].append(os.getloadavg())
    lost = result["account"]["sent"] - result["account"]["answered"] - result["account"]["abandoned"]
    result["lost"] = lost
    write_json(options.out, result)
    print(json.dumps(brief(result, "processes"), indent=1), flush=True)
    return int(bool(lost or result["grows"]))


if __name__ == "__main__":
    sys.exit(main())
