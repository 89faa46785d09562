"""The rendered Serve config and container command start Ray Serve and vLLM with the embedded stand-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.chart.kuberay import start_command
from tests.chart.rendering import CHART, group, only, serve_config, template
from tests.cluster.running import BIN, PORTS, RunningCluster, free_port

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.cluster, pytest.mark.engine]

START_S = 500
IMAGE = "/opt/captioner/app/"


def environment(manifests: list[dict[str, Any]], component: str, volumes: Path) -> dict[str, str]:
    """Return a container's variables, with the Secret's values and with paths of volumes moved below `volumes`."""
    container = group(manifests, component)["template"]["spec"]["containers"][0]
    ray = only(manifests, "ConfigMap", "x-captioner-ray")["data"]
    found = {name: moved(value, volumes) for name, value in ray.items()}
    secret = only(manifests, "Secret")["data"]
    for each in container["env"]:
        if "value" in each:
            found[each["name"]] = moved(each["value"], volumes)
        else:
            found[each["name"]] = secret[each["valueFrom"]["secretKeyRef"]["key"]]  # base64; any text works
    return found


def moved(value: str, volumes: Path) -> str:
    """Return the path in this test of a path in a volume or in the image's code."""
    if value.startswith(IMAGE):
        return str(CHART.parents[1] / value.removeprefix(IMAGE))
    for mount in ("/tmp", "/var/lib/captioner"):  # noqa: S108 - the pod's
        if value == mount or value.startswith(f"{mount}/"):
            path = volumes / value.lstrip("/")
            path.mkdir(parents=True, exist_ok=True)
            return str(path)
    return value


@pytest.mark.timeout(900)
def test_the_embedded_profile_starts_and_captions(helm: Path, tmp_path: Path) -> None:
    """The three pods' parts run on one node, and the chart's test accepts the captions.

    Container command and Serve config are as KubeRay runs them, except for ports and paths of volumes.
    """
    manifests = template(helm, {}, "cpu-embedded")
    head, frontend, engine = (group(manifests, each) for each in ("head", "frontend", "engine"))
    containers = [each["template"]["spec"]["containers"][0] for each in (head, frontend, engine)]
    assert len({json.dumps([each["command"], each["args"]]) for each in containers}) == 1
    node = head | {
        "resources": {
            "CPU": "2",
            **{name: each["resources"][name] for name, each in (("frontend", frontend), ("engine", engine))},
        }
    }

    port, dashboard = free_port(), free_port()
    ports = {name: free_port() for name in ("port", "dashboard_agent_listen_port", "metrics_export_port")}
    variables = environment(manifests, "frontend", tmp_path) | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    variables["KUBERAY_GEN_RAY_START_CMD"] = start_command(node, head=True, dashboard_port=dashboard, **ports)
    config = serve_config(manifests)
    config["http_options"]["port"] = port
    args = config["applications"][0]["args"]
    args |= {name: moved(args[name], tmp_path) for name in ("uploads_dir", "data_dir", "download_dir")}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))

    command = [*containers[0]["command"], *containers[0]["args"]]
    cluster = RunningCluster(command, port, **{key: value for key, value in variables.items() if key not in PORTS})
    with cluster:

        def deployed() -> bool:
            serve = [BIN / "serve", "deploy", tmp_path / "serve.yaml", "--address", f"http://127.0.0.1:{dashboard}"]
            done = subprocess.run(
                [str(each) for each in serve], env=cluster.environment, capture_output=True, check=False
            )
            return done.returncode == 0

        cluster.wait(deployed, START_S)
        cluster.wait(cluster.ready, START_S)
        keys = {"CAPTIONER_TEST_KEYS": variables["CAPTIONER_API_KEYS"]}
        script = [sys.executable, str(CHART / "files" / "caption.py"), cluster.url, "60", "embedded"]
        done = subprocess.run(script, env=os.environ | keys, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr + cluster.log()
        assert len(done.stdout.splitlines()) == 4
