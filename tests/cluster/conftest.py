"""One cluster for all tests: two frontends, two fake engines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.cluster.running import RunningCluster, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

FLAGS = (
    "--engine=fake --fake-ttft-s=0.1 --fake-tpot-s=0.02 --allow-ignore-eos --log-format=json "
    "--min-frontends=2 --max-frontends=2 --frontend-cpus=0.1 "
    "--min-engine-replicas=2 --max-engine-replicas=2 --engine-cpus=0.1 "
    # Small bounds, so that a test can fill them.
    "--audio-workers=1 --max-num-seqs=8 --max-engine-queue=2 --shutdown-grace-s=10"
)


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[RunningCluster]:
    """Cluster that is started once per session."""
    port = free_port()
    command = ["captioner", "cluster", f"--port={port}", *FLAGS.split()]
    with RunningCluster(command, port, CAPTIONER_API_KEYS="sesame") as cluster:
        cluster.wait(cluster.complete)
        yield cluster


@pytest.fixture
def cluster(running_cluster: RunningCluster) -> RunningCluster:
    """The session's cluster, complete again after what the test before has broken."""
    running_cluster.wait(running_cluster.complete)
    return running_cluster
