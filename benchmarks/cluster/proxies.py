"""What each way into the cluster costs: CPU per request by process, idle and under load.

    python benchmarks/proxies.py [--requests 200] [--rounds 3]

Real Ray Serve on this machine, a fake engine, 256 tokens streamed for clips of 1 s. The ways differ in Ray's settings
alone; "frontend's own port" is the third way without HAProxy's hop: direct ingress, as far as Ray offers it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from clips import Clip, alike, make
from clusters import BIN, Cluster
from load import Load, Target
from processes import Family, Snapshot

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/proxies.json"
MODEL, TOKENS = "qwen3-omni-30b-a3b-captioner", 256
FLAGS = (
    f"--no-auth --allow-ignore-eos --log-level=warning --engine=fake --fake-ttft-s=0.2 --fake-tpot-s=0.01 "
    f"--fake-tokens={TOKENS} --min-frontends=1 --max-frontends=1 --min-engine-replicas=1 --max-engine-replicas=1 --audio-workers=1 --frontend-cpus=0.2 "
    "--engine-cpus=0.2 --shutdown-grace-s=10"
)
WAYS = {
    "one process": None,
    "Ray's proxy": ("0", "0"),
    "HAProxy": ("1", "0"),
    "HAProxy, throughput": ("1", "1"),
}
"""Values of RAY_SERVE_ENABLE_HA_PROXY and RAY_SERVE_THROUGHPUT_OPTIMIZED; the last is the service's own choice."""


def figures(family: Family, target: Target, clips: list[Clip], concurrency: int, rounds: int) -> dict[str, Any]:
    """Requests/s and CPU-ms per request, by part, of each round."""
    found = []
    for _ in range(rounds):
        load = Load(target, [clip.path for clip in clips], concurrency)
        before = Snapshot.of(family)
        load.run()
        use = before.until(Snapshot.of(family))
        count = len(load.answers())
        by_part = {part: round(1000 * seconds / count, 2) for part, seconds in use.cpu_s.items()}
        found.append({"requests_per_s": round(count / use.wall_s, 2), "cpu_ms": by_part})
        found[-1]["cpu_ms_all"] = round(sum(by_part.values()), 2)
    return {"rounds": found}


def measure(way: str, port: int, clips: list[Clip], given: argparse.Namespace) -> dict[str, Any]:
    """Start the service one way, and measure it idle and under load."""
    switches = WAYS[way]
    directory = Path(tempfile.mkdtemp(prefix="proxies-"))
    command = [str(BIN / "captioner"), "cluster" if switches else "serve", f"--port={port}", *FLAGS.split()]
    environment = {"RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg")}
    if switches:
        environment |= dict(zip(("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED"), switches, strict=True))
    with Cluster(command, directory, port, environment) as running:
        running.wait_ready()
        time.sleep(given.settle_s)
        family = Family(psutil.Process(running.process.pid), running.mark)
        before = Snapshot.of(family)
        time.sleep(given.idle_s)
        use = before.until(Snapshot.of(family))
        told: dict[str, Any] = {"idle_cores": round(sum(use.cpu_s.values()) / use.wall_s, 4)}
        told["idle_cores_by_part"] = {part: round(each / use.wall_s, 4) for part, each in use.cpu_s.items()}
        target = Target(f"{running.url}/v1/chat/completions", MODEL, TOKENS)
        Load(target, [clip.path for clip in clips[:8]], 8).run()  # warm-up
        told |= figures(family, target, clips, given.concurrency, given.rounds)
        if switches == ("1", "1"):
            (config,) = directory.glob("*/haproxy.cfg")
            address = re.findall(r"^ *server \S+ (\S+:\d+) check(?!.* backup)", config.read_text(), re.MULTILINE)[0]
            direct = Target(f"http://{address}/v1/chat/completions", MODEL, TOKENS)
            told["frontend's own port"] = figures(family, direct, clips, given.concurrency, given.rounds)
    return told


def main() -> None:
    """Run it all, and write the result."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--requests", type=int, default=200)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--concurrency", type=int, default=16)
    arguments.add_argument("--idle-s", type=float, default=30)
    arguments.add_argument("--settle-s", type=float, default=30, help="Ray still starts processes after it is ready")
    arguments.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    arguments.add_argument("--port", type=int, default=8700)
    arguments.add_argument("--out", type=Path, default=RESULT)
    given = arguments.parse_args()
    clips = alike(ROOT / ".cache/benchmark-clips", given.requests, 1)
    make(clips)
    result: dict[str, Any] = {"settings": FLAGS, "concurrency": given.concurrency, "load_average": [os.getloadavg()]}
    for way in given.ways:
        result[way] = measure(way, given.port, clips, given)
        print(way, json.dumps(result[way]), flush=True)
    result["load_average"].append(os.getloadavg())
    given.out.parent.mkdir(exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
