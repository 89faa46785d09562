"""Stop of a cluster on one machine."""

from __future__ import annotations

import signal
import time

import pytest

from tests.cluster.running import RunningCluster, free_port
from tests.cluster.test_cluster import ends, stream

pytestmark = pytest.mark.cluster

FLAGS = (
    "--engine=fake --fake-ttft-s=0.1 --fake-tpot-s=0.02 --allow-ignore-eos --log-format=json "
    "--max-frontends=1 --frontend-cpus=0.1 --max-engine-replicas=1 --engine-cpus=0.1 --audio-workers=1 "
    "--shutdown-grace-s=60"
)


@pytest.mark.timeout(600)
def test_a_stop_lets_streams_finish() -> None:
    """Streams that run at SIGTERM finish; then all processes end, and the command exits with status 0."""
    port = free_port()
    command = ["captioner", "cluster", f"--port={port}", *FLAGS.split()]
    with RunningCluster(command, port, CAPTIONER_API_KEYS="sesame") as cluster:
        cluster.wait(lambda: cluster.complete(frontends=1, engines=1))
        with stream(cluster.url, "compatible", max_tokens=500, ignore_eos=True) as lines:
            cluster.process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            assert ends(lines) == "done"
            assert time.monotonic() - began > 5  # it went on: 500 tokens take ten seconds
        assert cluster.process.wait(timeout=60) == 0
