"""What more replicas bring: requests/s with 1, 2 and 4 engines of a fixed speed, and with 1 and 2 audio workers.

    python benchmarks/scaling.py [--requests 40] [--rounds 3]

Real Ray Serve on this machine for the engines, one process for the audio workers; fake engines. The result is for a
report: `series` of `points`, each a count and the requests/s of its rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from clips import Clip, alike, make
from clusters import BIN, Cluster
from conditions import conditions
from load import Load, Target

ROOT = Path(__file__).parents[1]
CLIPS = ROOT / ".cache/benchmark-clips"
RESULT = ROOT / "benchmarks/results/scaling.json"
MODEL = "qwen3-omni-30b-a3b-captioner"
TOKENS, AT_ONCE = 24, 4
ENGINE = f"--engine=fake --fake-ttft-s=0.4 --fake-tpot-s=0.1 --fake-tokens={TOKENS} --max-num-seqs={AT_ONCE}"
"""An engine that makes `AT_ONCE` captions in 2.8 s, 1.4 a second, and takes next to no CPU."""

INSTANT = f"--engine=fake --fake-ttft-s=0 --fake-tpot-s=0 --fake-tokens={TOKENS}"
COMMON = "--no-auth --allow-ignore-eos --log-level=warning --shutdown-grace-s=10"
WORKER_CALLERS = 8


def requests_per_s(command: str, port: int, clips: list[Clip], concurrency: int, rounds: int) -> list[float]:
    """Start a service; return the requests/s of each round. All answers are checked."""
    directory = Path(tempfile.mkdtemp(prefix="scaling-"))
    arguments = [str(BIN / "captioner"), *command.split(), *COMMON.split(), f"--port={port}"]
    target = Target(f"http://127.0.0.1:{port}/v1/chat/completions", MODEL, TOKENS)
    paths = [clip.path for clip in clips]
    with Cluster(arguments, directory, port, {}) as running:
        running.wait_ready()
        time.sleep(15 if "cluster" in command else 1)  # until every replica is there
        Load(target, paths[:concurrency], concurrency).run()  # warm-up
        found = []
        for _ in range(rounds):
            load = Load(target, paths, concurrency)
            began = time.monotonic()
            load.run()
            found.append(round(len(load.answers()) / (time.monotonic() - began), 3))
    return found


def engines(port: int, requests: int, rounds: int, counts: tuple[int, ...]) -> dict[str, Any]:
    """Requests/s by the number of engine replicas, each as busy as it can be."""
    points = []
    for count in counts:
        clips = alike(CLIPS, requests * count, 1)
        make(clips)
        command = f"cluster {ENGINE} --min-engine-replicas={count} --max-engine-replicas={count} --min-frontends=1 --max-frontends=1 "
        command += "--audio-workers=1 --frontend-cpus=0.2 --engine-cpus=0.2"
        found = requests_per_s(command, port, clips, AT_ONCE * count * 2, rounds)
        points.append({"count": count, "requests_per_s": found})
        print("engines", points[-1], flush=True)
    note = f"each makes {AT_ONCE} captions at a time, 2.8 s each (1.43/s); clips of 1 s; Ray Serve, one frontend"
    return {"name": "engine replicas", "note": note, "points": points}


def workers(port: int, requests: int, rounds: int) -> dict[str, Any]:
    """Requests/s by the number of audio workers, with an engine that answers at once."""
    clips = alike(CLIPS, requests, 30)
    make(clips)
    points = []
    for count in (1, 2):
        found = requests_per_s(f"serve {INSTANT} --audio-workers={count}", port, clips, WORKER_CALLERS, rounds)
        points.append({"count": count, "requests_per_s": found})
        print("audio workers", points[-1], flush=True)
    note = f"30 s MP3, 48 kHz stereo; {os.cpu_count()} cores, which frontend and callers share"
    return {"name": "audio workers", "note": note, "points": points}


def main() -> None:
    """Run it all, and write the result."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--requests", type=int, default=40, help="per round, and per engine")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4])
    arguments.add_argument("--port", type=int, default=8600)
    arguments.add_argument("--out", type=Path, default=RESULT)
    given = arguments.parse_args()
    result: dict[str, Any] = {"kind": "scaling", "title": "More replicas", "load_average": [os.getloadavg()]}
    result["conditions"] = conditions(ROOT)
    result["series"] = [
        engines(given.port, given.requests, given.rounds, tuple(given.counts)),
        workers(given.port, 2 * given.requests, given.rounds),
    ]
    result["load_average"].append(os.getloadavg())
    before, after = (of[0] for of in result["load_average"])
    result["conditions"]["machine load"] = f"{before:.1f} before, {after:.1f} after"
    given.out.parent.mkdir(exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
