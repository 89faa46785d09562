"""Kill processes of a cluster at random, under load, and account for every request.

    python benchmarks/chaos.py [--kills 100]

Real Ray Serve on this machine, fake engines of a fixed speed. Every process of the service and of Ray's part of it is a
target: engine and frontend replicas, audio workers, the directory, Serve's controller, HAProxy, its manager, Ray's own
proxy behind it, idle Ray workers. The head (GCS) comes last: without an external Redis its loss ends a cluster, and it
is told when.
"""

from __future__ import annotations

import argparse
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
from clusters import BIN, Callers, Cluster

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
"""Kinds of processes, and how many of a hundred kills they get."""

RESULT = Path(__file__).parent / "results" / "chaos.json"
USERS, TOKENS = 6, 24
FLAGS = (
    "--engine=fake --fake-ttft-s=0.3 --fake-tpot-s=0.05 --min-frontends=2 --max-frontends=2 --min-engine-replicas=2 --max-engine-replicas=2 "
    "--audio-workers=1 --frontend-cpus=0.2 --engine-cpus=0.2 --shutdown-grace-s=60"
)


def plan(kills: int, seed: int) -> list[str]:
    """Kinds in random order, each as often as its share says."""
    shares = [kind for kind, share in TARGETS for _ in range(share)]
    kinds = [shares[number * len(shares) // kills] for number in range(kills)]
    random.Random(seed).shuffle(kinds)
    return kinds


class Chaos:
    """The kills, and what became of the processes."""

    def __init__(self, cluster: Cluster, callers: Callers, seed: int) -> None:
        self.kills: list[dict[str, Any]] = []
        self._cluster = cluster
        self._callers = callers
        self._random = random.Random(seed)
        self._full = cluster.counts()

    def kill(self, kind: str, *, patience_s: float) -> None:
        """Kill one process of a kind; wait until there is one in its place, at most `patience_s`."""
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
        """Add to each kill how long it took until a request that was sent after it was answered."""
        answered = [ending for ending in self._callers.endings() if ending["outcome"] == "answered"]
        for kill in self.kills:
            after = [ending["at"] for ending in answered if ending["at"] - ending["seconds"] > kill["at"]]
            kill["answers_again_s"] = round(min(after) - kill["at"], 2) if after else None


def summary(kills: list[dict[str, Any]]) -> dict[str, Any]:
    """Recovery times by kind."""
    by_kind = defaultdict(list)
    for kill in kills:
        if kill["killed"]:
            by_kind[kill["kind"]].append(kill)
    told = {}
    for kind, of_kind in by_kind.items():
        again = [kill["answers_again_s"] for kill in of_kind if kill["answers_again_s"] is not None]
        replaced = [kill["replaced_s"] for kill in of_kind if kill["replaced_s"] is not None]
        told[kind] = {
            "kills": len(of_kind),
            "replaced_s_median": statistics.median(replaced) if replaced else None,
            "replaced_s_max": max(replaced, default=None),
            "not_replaced_in_time": len(of_kind) - len(replaced),
            "answers_again_s_median": statistics.median(again) if again else None,
            "answers_again_s_max": max(again, default=None),
        }
    return told


def main() -> None:
    """Run it all, and write the result."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--kills", type=int, default=100)
    arguments.add_argument("--port", type=int, default=8200)
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--patience-s", type=float, default=45)
    given = arguments.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    print(f"logs in {directory}", flush=True)
    command = [str(BIN / "captioner"), "cluster", "--no-auth", f"--port={given.port}"]
    command += [f"--fake-tokens={TOKENS}", *FLAGS.split()]
    result: dict[str, Any] = {"settings": FLAGS, "users": USERS, "load_average": [os.getloadavg()]}
    with Cluster(command, directory, given.port, {}) as cluster:
        result["ready_s"] = round(cluster.wait_ready(), 1)
        time.sleep(10)  # until the second frontend and engine are there, too
        with Callers(cluster, USERS, max_pause_s=0.6, tokens=TOKENS) as callers:
            time.sleep(10)
            chaos = Chaos(cluster, callers, given.seed)
            try:
                for kind in plan(given.kills, given.seed):
                    chaos.kill(kind, patience_s=given.patience_s)
                time.sleep(20)
            except KeyboardInterrupt:
                print("stopped early", flush=True)
        chaos.recoveries()
        result["load_average"].append(os.getloadavg())
        result |= {"account": callers.account(), "by_kind": summary(chaos.kills), "kills": chaos.kills}
        write(result)
        result["head"] = lose(cluster, "head (GCS)")
    write(result)


def lose(cluster: Cluster, kind: str) -> dict[str, Any]:
    """Kill what a cluster of one machine cannot do without, and see how long it still answers."""
    callers = Callers(cluster, USERS, max_pause_s=0.6, tokens=TOKENS)
    with callers:
        time.sleep(15)
        at = time.time()
        for process in cluster.processes()[kind]:
            process.kill()
        time.sleep(60)
    answered = [ending["at"] - at for ending in callers.endings() if ending["outcome"] == "answered"]
    account = callers.account()
    return {
        "kind": kind,
        "last_answer_after_s": round(max(answered, default=0.0), 1),
        "answers_after": sum(each > 0 for each in answered),
        "command_still_runs": cluster.process.poll() is None,
        "account": account,
    }


def write(result: dict[str, Any]) -> None:
    """Keep it."""
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "kills"}, indent=1), flush=True)


if __name__ == "__main__":
    main()
