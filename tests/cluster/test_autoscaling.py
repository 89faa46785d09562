"""Engine replicas under real Ray Serve scale with the audio under way: up at once, down later, to none and back."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from tests.cluster.running import ENGINE, RunningCluster, free_port, until
from tests.cluster.test_cluster import ask, caption, code, ends, stream

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

pytestmark = pytest.mark.cluster

DOWN_AFTER_S = 3
FLAGS = (
    "--engine=fake --fake-ttft-s=0.1 --fake-tpot-s=0.02 --allow-ignore-eos "
    "--min-frontends=1 --max-frontends=1 --frontend-cpus=0.1 --min-engine-replicas=0 --max-engine-replicas=2 "
    f"--target-audio-seconds-per-engine=1.5 --scale-down-after-s={DOWN_AFTER_S} --engine-cpus=0.1 "
    "--audio-workers=1 --shutdown-grace-s=10"
)


@pytest.fixture(scope="module")
def sleepy() -> Iterator[RunningCluster]:
    """Cluster of 0 to 2 engines; audio of one second is two thirds of the work that one engine is meant to have."""
    port = free_port()
    with RunningCluster(
        ["captioner", "cluster", f"--port={port}", *FLAGS.split()], port, CAPTIONER_API_KEYS="sesame"
    ) as cluster:
        cluster.wait(lambda: cluster.get("/healthz") and cluster.frontends())
        yield cluster


def engines(cluster: RunningCluster) -> int:
    """Return the number of processes of engine replicas."""
    return len(cluster.pids(ENGINE))


@pytest.mark.timeout(600)
def test_engines_come_with_the_load_and_go_without(sleepy: RunningCluster) -> None:
    """Engines start and stop sooner than Ray's own delays, 30 s up and 600 s down, would allow."""
    until(lambda: engines(sleepy) == 0, 90)

    until(lambda: sleepy.get("/readyz").status_code == 503)  # type: ignore[union-attr]
    responses: list[httpx.Response] = []
    for dialect in ("native", "compatible"):
        responses.append(ask(sleepy.url, dialect))
        assert responses[-1].status_code == 503, responses[-1].text
        assert int(responses[-1].headers["retry-after"]) >= 1
    assert {code(response) for response in responses} == {"ModelUnavailable", "model_unavailable"}

    asked = time.monotonic()
    until(lambda: ask(sleepy.url, "native").status_code == 200)  # as a client that retries
    assert time.monotonic() - asked < 30

    with ExitStack() as stack:
        streams = [
            stack.enter_context(stream(sleepy.url, "compatible", max_tokens=1000, ignore_eos=True)) for _ in range(2)
        ]
        until(lambda: engines(sleepy) == 2, 20)
        assert [ends(lines) for lines in streams] == ["done", "done"]
    assert caption(ask(sleepy.url, "native"))
    until(lambda: engines(sleepy) == 0, 90)
