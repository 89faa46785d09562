"""`serve deploy` of deploy/serve's file, on a Ray cluster that was started as its README says."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.cluster.running import BIN, RunningCluster, free_port
from tests.cluster.test_cluster import ask, caption

pytestmark = pytest.mark.cluster

DEPLOY = Path(__file__).parents[2] / "deploy" / "serve"
FEW = {
    "engine": "fake",
    "min_frontends": 1,
    "max_frontends": 1,
    "frontend_cpus": 0.1,
    "min_engine_replicas": 1,
    "max_engine_replicas": 1,
}
FEW |= {"engine_cpus": 0.1, "engine_on_gpu": False, "audio_workers": 1, "fake_ttft_s": 0.1, "fake_tpot_s": 0.01}


def environment() -> dict[str, str]:
    """Return the environment of Ray's processes in deploy/serve."""
    return dict(each.split("=", 1) for each in shlex.split((DEPLOY / "ray.env").read_text(), comments=True))


@pytest.mark.timeout(900)
def test_the_file_deploys_and_captions_are_made(tmp_path: Path) -> None:
    """The file deploys as it is, except for the engine and the number of replicas: this machine has no GPU."""
    port, gcs, dashboard = free_port(), free_port(), free_port()
    config = yaml.safe_load((DEPLOY / "captioner.yaml").read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    config["applications"][0]["args"] |= FEW
    file = tmp_path / "captioner.yaml"
    file.write_text(yaml.safe_dump(config))
    head = ["ray", "start", "--head", "--block", "--num-cpus=1", f"--port={gcs}", "--dashboard-host=127.0.0.1"]
    head += ["--node-ip-address=127.0.0.1", f"--dashboard-port={dashboard}"]
    names = ("dashboard-agent-grpc-port", "dashboard-agent-listen-port", "runtime-env-agent-port")
    head += [f"--{name}={free_port()}" for name in (*names, "metrics-export-port", "ray-client-server-port")]
    secrets = {"CAPTIONER_API_KEYS": "sesame", "CAPTIONER_UPLOAD_SECRET": "s", "CAPTIONER_DATA_DIR": str(tmp_path)}
    with RunningCluster(head, port, **environment() | secrets) as cluster:
        deploy = [str(BIN / "serve"), "deploy", f"--address=http://127.0.0.1:{dashboard}", str(file)]

        def deployed() -> bool:
            done = subprocess.run(deploy, env=cluster.environment, check=False, timeout=300, capture_output=True)
            return done.returncode == 0

        cluster.wait(deployed)  # the dashboard starts last
        cluster.wait(cluster.ready)
        for dialect in ("native", "compatible"):
            assert caption(ask(cluster.url, dialect))
