"""Kill processes of a cluster at random, under load, and account for every request.

    python -m benchmarks.cluster.chaos [--kills 100]

Real Ray Serve on this machine, fake engines of a fixed speed. Every process of the service and of its Ray is a target:
engine and frontend replicas, audio workers, the directory, Serve's controller, HAProxy, HAProxy's manager, Ray's proxy
behind it, idle Ray workers. The head (GCS) is killed last: without an external Redis its loss ends a cluster, and the
result says after how many seconds. Writes results/chaos.json, or OUT.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.cluster.callers import Callers
from benchmarks.cluster.runner import SMALL, Cluster, brief, captioner_command, replicas
from benchmarks.program import RESULTS, option_parser, write_json

TARGETS = (
    ("engine", 20),
    ("frontend", 20),
    ("audio worker", 14),
    ("haproxy", 10),
    ("proxy manager", 6),
    ("proxy", 4),
    ("controller", 10),
    ("directory", 10),
    ("idle worker", 6),
)
"""Kinds of processes, and their share of a hundred kills."""

USERS, TOKENS = 6, 24
FLAGS = (
    *(f"--fake-tokens={TOKENS}", "--fake-ttft-s=0.3", "--fake-tpot-s=0.05", "--shutdown-grace-s=60"),
    *replicas(2, 2),
    *SMALL,
)


def plan(kills: int, seed: int) -> list[str]:
    """Return the kinds to kill in random order, each by its share."""
    shares = [kind for kind, share in TARGETS for _ in range(share)]
    kinds = [shares[number * len(shares) // kills] for number in range(kills)]
    random.Random(seed).shuffle(kinds)
    return kinds


class Chaos:
    """Kills of processes, and the recovery after each."""

    def __init__(self, cluster: Cluster, callers: Callers, seed: int) -> None:
        self.kills: list[dict[str, Any]] = []
        self._cluster = cluster
        self._callers = callers
        self._random = random.Random(seed)
        self._full = cluster.counts()

    def kill(self, kind: str, *, patience_s: float) -> None:
        """Kill one process of a kind; wait for its replacement, at most `patience_s`."""
        processes = self._cluster.processes()[kind]
        if not processes:
            self.kills.append({"kind": kind, "at": time.time(), "killed": 0, "replaced_s": None})
            return
        victim = self._random.choice(processes)
        with suppress(psutil.NoSuchProcess):
            victim.kill()
        at = time.time()
        replaced_s = None
        while time.time() - at < patience_s:
            time.sleep(0.5)
            alive = {process.pid for process in self._cluster.processes()[kind]} - {victim.pid}
            if len(alive) >= min(self._full[kind], len(processes)):
                replaced_s = round(time.time() - at, 1)
                break
        self.kills.append({"kind": kind, "at": at, "killed": victim.pid, "replaced_s": replaced_s})
        print(f"{len(self.kills)}: {kind} {victim.pid}, replaced after {replaced_s} s", flush=True)
        time.sleep(self._random.uniform(1, 4))

    def recoveries(self) -> None:
        """Add to each kill the seconds until a request that was sent after it was answered."""
        answered = self._callers.answered()
        for kill in self.kills:
            after = [entry["ended"] for entry in answered if entry["sent"] > kill["at"]]
            kill["answers_again_s"] = round(min(after) - kill["at"], 2) if after else None


def summary(kills: list[dict[str, Any]]) -> dict[str, Any]:
    """Return recovery times by kind."""
    by_kind = defaultdict(list)
    for kill in kills:
        if kill["killed"]:
            by_kind[kill["kind"]].append(kill)
    found = {}
    for kind, of_kind in by_kind.items():
        again = [kill["answers_again_s"] for kill in of_kind if kill["answers_again_s"] is not None]
        replaced = [kill["replaced_s"] for kill in of_kind if kill["replaced_s"] is not None]
        found[kind] = {
            "kills": len(of_kind),
            "replaced_s_median": statistics.median(replaced) if replaced else None,
            "replaced_s_max": max(replaced, default=None),
            "not_replaced_in_time": len(of_kind) - len(replaced),
            "answers_again_s_median": statistics.median(again) if again else None,
            "answers_again_s_max": max(again, default=None),
        }
    return found


def main() -> None:
    """Kill, account, and write the result."""
    parser = option_parser(__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--port", type=int, default=8200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--patience-s", type=float, default=45)
    parser.add_argument("--out", type=Path, default=RESULTS / "chaos.json")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    print(f"logs in {directory}", flush=True)
    command = captioner_command("cluster", options.port, *FLAGS)
    result: dict[str, Any] = {"settings": " ".join(FLAGS), "users": USERS, "load_average": [os.getloadavg()]}
    with Cluster(command, directory, options.port) as cluster:
        result["ready_s"] = round(cluster.wait_ready(), 1)
        time.sleep(10)  # until the second frontend and engine have started
        with Callers(cluster.url, directory, USERS, max_pause_s=0.6, tokens=TOKENS) as callers:
            time.sleep(10)
            chaos = Chaos(cluster, callers, options.seed)
            try:
                for kind in plan(options.kills, options.seed):
                    chaos.kill(kind, patience_s=options.patience_s)
                time.sleep(20)
            except KeyboardInterrupt:
                print("stopped early", flush=True)
        chaos.recoveries()
        result["load_average"].append(os.getloadavg())
        result |= {"account": callers.account(), "by_kind": summary(chaos.kills), "kills": chaos.kills}
        _write(options.out, result)
        result["head"] = kill_all(cluster, "head (GCS)")
    _write(options.out, result)


def kill_all(cluster: Cluster, kind: str) -> dict[str, Any]:
    """Kill a kind of process that a cluster of one machine needs, and measure how long requests are still answered."""
    with Callers(cluster.url, cluster.directory, USERS, max_pause_s=0.6, tokens=TOKENS, name="head") as callers:
        time.sleep(15)
        at = time.time()
        for process in cluster.processes()[kind]:
            process.kill()
        time.sleep(60)
    answered = [entry["ended"] - at for entry in callers.answered()]
    return {
        "kind": kind,
        "last_answer_after_s": round(max(answered, default=0.0), 1),
        "answers_after": sum(each > 0 for each in answered),
        "command_still_runs": cluster.process.poll() is None,
        "account": callers.account(),
    }


def _write(out: Path, result: dict[str, Any]) -> None:
    write_json(out, result)
    print(json.dumps(brief(result, "kills"), indent=1), flush=True)


if __name__ == "__main__":
    main()
