"""One cluster for all tests: two frontends, two fake engines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.cluster.running import RunningCluster, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

FLAGS = (
    "--engine=fake --fake-ttft-s=0.1 --fake-tpot-s=0.02 --allow-ignore-eos --log-format=json "
    "--min-frontends=2 --max-frontends=2 --frontend-cpus=0.1 --min-engine-replicas=2 --max-engine-replicas=2 --engine-cpus=0.1 "
    # Little room, so that a test can fill it.
    "--audio-workers=1 --max-num-seqs=8 --max-engine-queue=2 --shutdown-grace-s=10"
)


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[RunningCluster]:
    """Started once."""
    port = free_port()
    command = ["captioner", "cluster", f"--port={port}", *FLAGS.split()]
    with RunningCluster(command, port, CAPTIONER_API_KEYS="sesame") as cluster:
        cluster.wait(cluster.whole)
        yield cluster


@pytest.fixture
def cluster(running_cluster: RunningCluster) -> RunningCluster:
    """Whole again after whatever the test before has broken."""
    running_cluster.wait(running_cluster.whole)
    return running_cluster
