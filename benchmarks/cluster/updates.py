"""Update a cluster again and again under load, and demand that no request is lost.

    python benchmarks/updates.py [--updates 20]

Real Ray Serve on this machine, as an operator runs it: `ray start --head`, then `serve deploy` with deploy/serve's
file, in which one setting changes each time. Each change replaces every frontend and every engine replica. Locust asks in
both dialects, whole and streamed, and checks every answer; whatever is not a right and whole answer counts as lost.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from clusters import BIN, Callers, Cluster

if TYPE_CHECKING:
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

DEPLOY = Path(__file__).parents[1] / "deploy" / "serve"
RESULT = Path(__file__).parent / "results" / "updates.json"
USERS, TOKENS = 6, 24
DRAINING_S = 5
"""How long a frontend stays reachable once it is to go, at least: 30 s by default, made less so that it ends today."""

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
    """What deploy/serve says that Ray's processes need."""
    lines = (DEPLOY / "ray.env").read_text().splitlines()
    return dict(line.replace('"', "").split("=", 1) for line in lines if line and not line.startswith("#"))


def deployed(port: int, **changes: Any) -> dict[str, Any]:
    """deploy/serve's file for this machine."""
    config: dict[str, Any] = yaml.safe_load((DEPLOY / "captioner.yaml").read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    config["applications"][0]["args"] = SETTINGS | changes
    return config


def settled(client: ServeSubmissionClient) -> bool:
    """Whether the last deployment has been carried out; raises `RuntimeError` if it has failed."""
    application = client.get_serve_details()["applications"].get("captioner", {})
    if application.get("status") in ("DEPLOY_FAILED", "UNHEALTHY"):
        raise RuntimeError(application["message"])
    deployments = application.get("deployments", {}).values()
    states = [replica["state"] for each in deployments for replica in each["replicas"]]
    return application.get("status") == "RUNNING" and all(state == "RUNNING" for state in states)


def update(client: ServeSubmissionClient, config: dict[str, Any], timeout_s: float = 400) -> float:
    """Deploy, and wait until every replica has been replaced; return how long that took."""
    began = time.monotonic()
    client.deploy_applications(config)
    time.sleep(2)
    while not settled(client):
        if time.monotonic() - began > timeout_s:
            raise TimeoutError(json.dumps(client.get_serve_details(), default=str)[:3000])
        time.sleep(1)
    return round(time.monotonic() - began, 1)


def main() -> None:
    """Run it all, and write the result."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--updates", type=int, default=20)
    arguments.add_argument("--port", type=int, default=8300)
    given = arguments.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="updates-"))
    print(f"logs in {directory}", flush=True)
    gcs, dashboard = given.port + 10, given.port + 11
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1"]
    command += [f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [f"--ray-client-server-port={given.port + 12}", f"--dashboard-agent-listen-port={given.port + 13}"]
    command += [f"--metrics-export-port={given.port + 14}", "--disable-usage-stats"]
    # Ray waits 15 s for these two to choose a port, too little on a busy machine.
    command += [f"--dashboard-agent-grpc-port={given.port + 15}", f"--runtime-env-agent-port={given.port + 16}"]
    draining = {"RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAINING_S)}
    result: dict[str, Any] = {
        "users": USERS,
        "draining_s": DRAINING_S,
        "load_average": [os.getloadavg()],
        "updates": [],
    }
    with Cluster(command, directory, given.port, environment() | draining) as cluster:
        os.environ.update({name: cluster.environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")})
        client = connect(f"http://127.0.0.1:{dashboard}")
        result["first_s"] = update(client, deployed(given.port))
        cluster.wait_ready()
        with Callers(cluster, USERS, max_pause_s=0.6, tokens=TOKENS) as callers:
            time.sleep(10)
            for number in range(given.updates):
                before = {process.pid for kind in ("frontend", "engine") for process in cluster.processes()[kind]}
                took_s = update(client, deployed(given.port, heartbeat_s=10 + number))
                after = {process.pid for kind in ("frontend", "engine") for process in cluster.processes()[kind]}
                lost = [ending for ending in callers.endings() if ending["outcome"] != "answered"]
                result["updates"].append({"took_s": took_s, "kept": len(before & after), "lost_so_far": len(lost)})
                print(f"{number + 1}: {result['updates'][-1]} {lost[-3:]}", flush=True)
            time.sleep(10)
    result["account"] = callers.account()
    result["load_average"].append(os.getloadavg())
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1), flush=True)


def connect(address: str, timeout_s: float = 200) -> ServeSubmissionClient:
    """Wait for Ray's dashboard."""
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
