"""Rolling updates under load, one after another, in which no request may be lost.

    python -m benchmarks.cluster.updates [--updates 20]

Real Ray Serve on this machine, as an operator runs it: `ray start --head`, then `serve deploy` with the file of
deploy/serve, in which one setting changes each time. Each change replaces every frontend and every engine replica.
Locust (`callers.py`) sends requests in both dialects, streamed and not, and checks every answer; whatever is not a
complete right answer counts as lost. Writes results/updates.json, or OUT.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from benchmarks.cluster.callers import Callers
from benchmarks.cluster.runner import Cluster
from benchmarks.program import BIN, RESULTS, ROOT, option_parser, write_json

if TYPE_CHECKING:
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

DEPLOY = ROOT / "deploy" / "serve"
USERS, TOKENS = 6, 24
DRAINING_S = 5
"""Least time that a stopping frontend stays reachable; the default of 30 s is reduced to shorten the run."""

SETTINGS = {
    "auth": False,
    "engine": "fake",
    "fake_ttft_s": 0.3,
    "fake_tpot_s": 0.05,
    "fake_tokens": TOKENS,
    "min_frontends": 2,
    "max_frontends": 2,
    "min_engine_replicas": 2,
    "max_engine_replicas": 2,
    "audio_workers": 1,
    "frontend_cpus": 0.2,
    "engine_cpus": 0.2,
    "shutdown_grace_s": 120,
}


def environment() -> dict[str, str]:
    """Return the variables that deploy/serve sets for Ray's processes."""
    lines = (DEPLOY / "ray.env").read_text().splitlines()
    return dict(line.replace('"', "").split("=", 1) for line in lines if line and not line.startswith("#"))


def configuration(port: int, **changes: Any) -> dict[str, Any]:
    """Return deploy/serve's file for this machine, with some settings changed."""
    config: dict[str, Any] = yaml.safe_load((DEPLOY / "captioner.yaml").read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    config["applications"][0]["args"] = SETTINGS | changes
    return config


def head_command(port: int) -> tuple[list[str], int]:
    """Return the command that starts Ray's head on ports after `port`, and the port of its dashboard."""
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1"]
    command += [f"--port={port + 10}", "--dashboard-host=127.0.0.1", f"--dashboard-port={port + 11}"]
    command += [f"--ray-client-server-port={port + 12}", f"--dashboard-agent-listen-port={port + 13}"]
    command += [f"--metrics-export-port={port + 14}", "--disable-usage-stats"]
    # Ray waits 15 s for the next two processes to choose a port, too little on a busy machine.
    command += [f"--dashboard-agent-grpc-port={port + 15}", f"--runtime-env-agent-port={port + 16}"]
    return command, port + 11


def is_deployed(client: ServeSubmissionClient) -> bool:
    """Return whether the last deployment is complete. Raises `RuntimeError` if it has failed."""
    application = client.get_serve_details()["applications"].get("captioner", {})
    if application.get("status") in ("DEPLOY_FAILED", "UNHEALTHY"):
        raise RuntimeError(application["message"])
    deployments = application.get("deployments", {}).values()
    states = [replica["state"] for each in deployments for replica in each["replicas"]]
    return application.get("status") == "RUNNING" and all(state == "RUNNING" for state in states)


def update(client: ServeSubmissionClient, config: dict[str, Any], timeout_s: float = 400) -> float:
    """Deploy, and wait until every replica has been replaced; return the seconds that took."""
    began = time.monotonic()
    client.deploy_applications(config)
    time.sleep(2)
    while not is_deployed(client):
        if time.monotonic() - began > timeout_s:
            raise TimeoutError(json.dumps(client.get_serve_details(), default=str)[:3000])
        time.sleep(1)
    return round(time.monotonic() - began, 1)


def main() -> None:
    """Update, account, and write the result."""
    parser = option_parser(__doc__)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--port", type=int, default=8300)
    parser.add_argument("--out", type=Path, default=RESULTS / "updates.json")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="updates-"))
    print(f"logs in {directory}", flush=True)
    command, dashboard = head_command(options.port)
    draining = {"RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAINING_S)}
    result: dict[str, Any] = {
        "users": USERS,
        "draining_s": DRAINING_S,
        "load_average": [os.getloadavg()],
        "updates": [],
    }
    with Cluster(command, directory, options.port, environment() | draining) as cluster:
        os.environ.update({name: cluster.environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")})
        client = connect(f"http://127.0.0.1:{dashboard}")
        result["first_s"] = update(client, configuration(options.port))
        cluster.wait_ready()
        with Callers(cluster.url, directory, USERS, max_pause_s=0.6, tokens=TOKENS) as callers:
            time.sleep(10)
            for number in range(options.updates):
                before = _replicas(cluster)
                took_s = update(client, configuration(options.port, heartbeat_s=10 + number))
                lost = [entry for entry in callers.ended() if entry["result"] != "answered"]
                kept = len(before & _replicas(cluster))
                result["updates"].append({"took_s": took_s, "kept": kept, "lost_so_far": len(lost)})
                print(f"{number + 1}: {result['updates'][-1]} {lost[-3:]}", flush=True)
            time.sleep(10)
    result["account"] = callers.account()
    result["load_average"].append(os.getloadavg())
    write_json(options.out, result)
    print(json.dumps(result, indent=1), flush=True)


def _replicas(cluster: Cluster) -> set[int]:
    """Return the process ids of frontends and engines."""
    processes = cluster.processes()
    return {process.pid for kind in ("frontend", "engine") for process in processes[kind]}


def connect(address: str, timeout_s: float = 200) -> ServeSubmissionClient:
    """Wait for Ray's dashboard, and return a client."""
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient  # noqa: PLC0415 - reads the environment

    began = time.monotonic()
    while True:
        try:
            client = ServeSubmissionClient(address)
            client.get_serve_details()
        except Exception:
            if time.monotonic() - began > timeout_s:
                raise
            time.sleep(1)
        else:
            return client


if __name__ == "__main__":
    main()
