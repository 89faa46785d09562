"""Throughput by number of replicas: requests/s with 1, 2 and 4 engines of a fixed speed, and 1 and 2 audio workers.

    python -m benchmarks.cluster.scaling [--requests 40] [--rounds 3] [--out FILE.json]

Real Ray Serve on this machine for the engines, one process for the audio workers; fake engines. Writes
results/scaling.json, a run for `report/page.py`: `series` of `points`, each a count and the requests/s of its rounds.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.cluster.runner import SMALL, Cluster, captioner_command, replicas
from benchmarks.conditions import conditions, machine_load
from benchmarks.load.clips import Clip, alike, make
from benchmarks.load.closed_loop import Load, Target
from benchmarks.load.wire import MODEL_NAME
from benchmarks.program import CLIPS, RESULTS, option_parser, write_json

TOKENS, AT_ONCE = 24, 4
ENGINE = ("--fake-ttft-s=0.4", "--fake-tpot-s=0.1", f"--max-num-seqs={AT_ONCE}")
"""An engine that makes `AT_ONCE` captions in 2.8 s, 1.4 a second, and takes next to no CPU."""

INSTANT = ("--fake-ttft-s=0", "--fake-tpot-s=0")
COMMON = (f"--fake-tokens={TOKENS}", "--allow-ignore-eos", "--log-level=warning", "--shutdown-grace-s=10")
WORKER_CALLERS = 8


def requests_per_s(command: list[str], port: int, clips: list[Clip], concurrency: int, rounds: int) -> list[float]:
    """Start a service; return the requests/s of each round. All answers are checked."""
    directory = Path(tempfile.mkdtemp(prefix="scaling-"))
    target = Target(f"http://127.0.0.1:{port}/v1/chat/completions", MODEL_NAME, TOKENS)
    paths = [clip.path for clip in clips]
    with Cluster(command, directory, port) as running:
        running.wait_ready()
        time.sleep(15 if "cluster" in command else 1)  # until every replica has started
        Load(target, paths[:concurrency], concurrency).run()  # warm-up
        found = []
        for _ in range(rounds):
            load = Load(target, paths, concurrency)
            began = time.monotonic()
            load.run()
            found.append(round(len(load.answers()) / (time.monotonic() - began), 3))
    return found


def engines(port: int, requests: int, rounds: int, counts: tuple[int, ...]) -> dict[str, Any]:
    """Return the requests/s by number of engine replicas, all saturated."""
    points = []
    for count in counts:
        clips = alike(CLIPS, requests * count, 1)
        make(clips)
        command = captioner_command("cluster", port, *COMMON, *ENGINE, *replicas(1, count), *SMALL)
        found = requests_per_s(command, port, clips, AT_ONCE * count * 2, rounds)
        points.append({"count": count, "requests_per_s": found})
        print("engines", points[-1], flush=True)
    note = f"each makes {AT_ONCE} captions at a time, 2.8 s each (1.43/s); clips of 1 s; Ray Serve, one frontend"
    return {"name": "engine replicas", "note": note, "points": points}


def workers(port: int, requests: int, rounds: int) -> dict[str, Any]:
    """Return the requests/s by number of audio workers, with an engine that answers at once."""
    clips = alike(CLIPS, requests, 30)
    make(clips)
    points = []
    for count in (1, 2):
        command = captioner_command("serve", port, *COMMON, *INSTANT, f"--audio-workers={count}")
        found = requests_per_s(command, port, clips, WORKER_CALLERS, rounds)
        points.append({"count": count, "requests_per_s": found})
        print("audio workers", points[-1], flush=True)
    note = f"30 s MP3, 48 kHz stereo; {os.cpu_count()} cores, which frontend and callers share"
    return {"name": "audio workers", "note": note, "points": points}


def main() -> None:
    """Measure engines and audio workers, and write the result."""
    parser = option_parser(__doc__)
    parser.add_argument("--requests", type=int, default=40, help="per round, and per engine")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--port", type=int, default=8600)
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling.json")
    options = parser.parse_args()
    result: dict[str, Any] = {"kind": "scaling", "title": "More replicas", "load_average": [os.getloadavg()]}
    result["conditions"] = conditions()
    result["series"] = [
        engines(options.port, options.requests, options.rounds, tuple(options.counts)),
        workers(options.port, 2 * options.requests, options.rounds),
    ]
    result["load_average"].append(os.getloadavg())
    result["conditions"]["machine load"] = machine_load(result["load_average"][0][0])
    write_json(options.out, result)


if __name__ == "__main__":
    main()
