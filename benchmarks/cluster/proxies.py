"""Cost of each way into the cluster: CPU per request by process, idle and under load.

    python -m benchmarks.cluster.proxies [--requests 200] [--rounds 3] [--out FILE.json]

Real Ray Serve on this machine, a fake engine, 256 tokens streamed for clips of 1 s. The ways differ in Ray's settings
alone; "frontend's own port" is the third way without HAProxy's hop: direct ingress, as far as Ray offers it. Writes
results/proxies.json.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cluster.runner import SMALL, Cluster, captioner_command, replicas
from benchmarks.load.clips import Clip, alike, make
from benchmarks.load.closed_loop import Load, Target
from benchmarks.load.wire import MODEL_NAME
from benchmarks.processes import Family, Snapshot
from benchmarks.program import CLIPS, RESULTS, option_parser, write_json

if TYPE_CHECKING:
    import argparse

TOKENS = 256
FLAGS = (
    *("--allow-ignore-eos", "--log-level=warning", "--shutdown-grace-s=10"),
    *("--fake-ttft-s=0.2", "--fake-tpot-s=0.01", f"--fake-tokens={TOKENS}"),
    *replicas(1, 1),
    *SMALL,
)
WAYS = {
    "one process": None,
    "Ray's proxy": ("0", "0"),
    "HAProxy": ("1", "0"),
    "HAProxy, throughput": ("1", "1"),
}
"""Values of RAY_SERVE_ENABLE_HA_PROXY and RAY_SERVE_THROUGHPUT_OPTIMIZED; the service sets the last pair."""


def figures(family: Family, target: Target, clips: list[Clip], concurrency: int, rounds: int) -> dict[str, Any]:
    """Return the requests/s and the CPU-ms per request, by part, of each round."""
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


def measure(way: str, port: int, clips: list[Clip], options: argparse.Namespace) -> dict[str, Any]:
    """Start the service one way, and measure it idle and under load."""
    switches = WAYS[way]
    directory = Path(tempfile.mkdtemp(prefix="proxies-"))
    command = captioner_command("cluster" if switches else "serve", port, *FLAGS)
    environment = {"RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg")}
    if switches:
        environment |= dict(zip(("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED"), switches, strict=True))
    with Cluster(command, directory, port, environment) as running:
        running.wait_ready()
        time.sleep(options.settle_s)
        before = Snapshot.of(running.family)
        time.sleep(options.idle_s)
        use = before.until(Snapshot.of(running.family))
        found: dict[str, Any] = {"idle_cores": round(sum(use.cpu_s.values()) / use.wall_s, 4)}
        found["idle_cores_by_part"] = {part: round(each / use.wall_s, 4) for part, each in use.cpu_s.items()}
        target = Target(f"{running.url}/v1/chat/completions", MODEL_NAME, TOKENS)
        Load(target, [clip.path for clip in clips[:8]], 8).run()  # warm-up
        found |= figures(running.family, target, clips, options.concurrency, options.rounds)
        if switches == ("1", "1"):
            (config,) = directory.glob("*/haproxy.cfg")
            address = re.findall(r"^ *server \S+ (\S+:\d+) check(?!.* backup)", config.read_text(), re.MULTILINE)[0]
            direct = Target(f"http://{address}/v1/chat/completions", MODEL_NAME, TOKENS)
            found["frontend's own port"] = figures(running.family, direct, clips, options.concurrency, options.rounds)
    return found


def main() -> None:
    """Measure each way, and write the result."""
    parser = option_parser(__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--idle-s", type=float, default=30)
    parser.add_argument("--settle-s", type=float, default=30, help="Ray starts processes even after it is ready")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--port", type=int, default=8700)
    parser.add_argument("--out", type=Path, default=RESULTS / "proxies.json")
    options = parser.parse_args()
    clips = alike(CLIPS, options.requests, 1)
    make(clips)
    result: dict[str, Any] = {"settings": " ".join(FLAGS), "concurrency": options.concurrency}
    result["load_average"] = [os.getloadavg()]
    for way in options.ways:
        result[way] = measure(way, options.port, clips, options)
        print(way, json.dumps(result[way]), flush=True)
    result["load_average"].append(os.getloadavg())
    write_json(options.out, result)


if __name__ == "__main__":
    main()
