"""A node that leaves costs no request: running requests finish, replacements answer new ones."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from serving.cluster.ray_env import RAY_ENVIRONMENT
from tests.cluster.running import BIN, ENGINE, FRONTEND, RunningCluster, free_port, until
from tests.cluster.test_cluster import KEY, ask, caption, ends, stream

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.cluster

SETTINGS = {
    "engine": "fake",
    "fake_ttft_s": 0.1,
    "fake_tpot_s": 0.02,
    "allow_ignore_eos": True,
    "frontend_cpus": 0.1,
    "engine_cpus": 0.1,
    "max_frontends": 1,
    "max_engine_replicas": 1,
    "audio_workers": 1,
    "shutdown_grace_s": 60,
    "pin_roles_to_nodes": True,
}
SERVE = """
import json, sys, ray
from ray import serve
from serving.cluster.deployments import build
ray.init(address=sys.argv[1], logging_level="WARNING")
serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
serve.run(build(json.loads(sys.argv[3])), name="captioner", route_prefix="/", blocking=False)
"""


def start(*flags: str) -> list[str]:
    """Return the command that starts Ray on one node, with its own ports."""
    names = (
        "dashboard-agent-grpc-port",
        "dashboard-agent-listen-port",
        "runtime-env-agent-port",
        "metrics-export-port",
    )
    return ["ray", "start", "--block", *flags, *(f"--{name}={free_port()}" for name in names)]


class Nodes:
    """A head without work, and nodes with a slot for a frontend and an engine each, all on this machine."""

    def __init__(self, cluster: RunningCluster, address: str, stack: ExitStack) -> None:
        self.cluster = cluster
        self.address = address
        self._stack = stack
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def add(self, name: str) -> None:
        """Start a node."""
        command = start(f"--address={self.address}", "--num-cpus=1", '--resources={"frontend": 1, "engine": 1}')
        environment = self.cluster.environment | {"RAY_CLOUD_INSTANCE_ID": name}
        with (self.cluster.directory / name).open("w") as log:
            self._started[name] = self._stack.enter_context(
                subprocess.Popen([str(BIN / command[0]), *command[1:]], env=environment, stdout=log, stderr=log)
            )

    def died(self) -> str:
        """Return the last output of the nodes that have ended."""
        ended = [name for name, node in self._started.items() if node.poll() is not None]
        return "\n".join((self.cluster.directory / name).read_text()[-5000:] for name in ended)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """Cluster whose first node runs the service; the second node is new and empty."""
    port, gcs = free_port(), free_port()
    head = start("--head", "--num-cpus=0", f"--port={gcs}", "--include-dashboard=false")
    secrets = {"CAPTIONER_API_KEYS": "sesame", "CAPTIONER_UPLOAD_SECRET": "s"}
    # Processes that are left end with the cluster, and are then waited for.
    with ExitStack() as stack, RunningCluster(head, port, **RAY_ENVIRONMENT | secrets) as cluster:
        cluster.environment["CAPTIONER_DATA_DIR"] = str(cluster.directory / "data")
        nodes = Nodes(cluster, f"127.0.0.1:{gcs}", stack)
        serve = [sys.executable, "-c", SERVE, nodes.address, str(port), json.dumps(SETTINGS)]

        def up() -> bool:
            with subprocess.Popen(serve, env=cluster.environment) as serving:
                while serving.poll() is None:
                    if died := nodes.died():
                        serving.kill()
                        raise RuntimeError(died)
                    time.sleep(0.5)
            return serving.returncode == 0

        time.sleep(5)  # for the head's ports
        nodes.add("one")
        cluster.wait(up)
        cluster.wait(cluster.ready)
        nodes.add("two")
        yield nodes


@pytest.mark.timeout(900)
def test_a_node_that_leaves_costs_no_request(nodes: Nodes) -> None:
    """A running stream finishes, and every request that arrives during the drain is answered."""
    running = nodes.cluster
    ended = threading.Event()
    answers: list[int] = []

    def callers() -> None:
        while not ended.is_set():
            answers.append(ask(running.url, "native").status_code)
            time.sleep(0.2)

    with ThreadPoolExecutor(1) as pool:
        calling = pool.submit(callers)
        before = running.pids(FRONTEND) | running.pids(ENGINE)
        try:
            with stream(running.url, "native", max_tokens=500, ignore_eos=True) as lines:
                leave = [str(BIN / "captioner"), "leave", "--address", nodes.address, "--instance=one"]
                leave += ["--within-s=200"]
                done = subprocess.run(leave, env=running.environment, capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stderr
                assert ends(lines) == "done"
        finally:
            ended.set()
        calling.result()
    assert len(answers) > 5
    assert set(answers) == {200}, answers
    until(running.ready)
    assert caption(ask(running.url, "compatible", headers=KEY))
    after = running.pids(FRONTEND) | running.pids(ENGINE)
    assert len(after) == 2
    assert not before & after
