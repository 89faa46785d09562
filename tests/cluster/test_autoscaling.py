"""Engines that scale with the audio under way, by real Ray Serve: up at once, down after a while, to none and back."""

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
    "--engine=fake --fake-ttft-s=0.1 --fake-tpot-s=0.02 --allow-ignore-eos --min-frontends=1 --max-frontends=1 --frontend-cpus=0.1 "
    f"--min-engine-replicas=0 --max-engine-replicas=2 --target-audio-seconds-per-engine=1.5 --scale-down-after-s={DOWN_AFTER_S} --engine-cpus=0.1 "
    "--audio-workers=1 --shutdown-grace-s=10"
)


@pytest.fixture(scope="module")
def sleepy() -> Iterator[RunningCluster]:
    """No engine at least, two at most; an audio of one second is two thirds of what one is meant to have under way."""
    port = free_port()
    with RunningCluster(
        ["captioner", "cluster", f"--port={port}", *FLAGS.split()], port, CAPTIONER_API_KEYS="sesame"
    ) as cluster:
        cluster.wait(lambda: cluster.get("/healthz") and cluster.frontends())
        yield cluster


def engines(cluster: RunningCluster) -> int:
    """Engine replicas as processes."""
    return len(cluster.pids(ENGINE))


@pytest.mark.timeout(600)
def test_engines_come_with_the_load_and_go_without(sleepy: RunningCluster) -> None:
    """Sooner than by Ray's own delays, 30 s up and 600 s down, which would come on top of our policy's."""
    until(lambda: engines(sleepy) == 0, 90)

    until(lambda: sleepy.get("/readyz").status_code == 503)  # type: ignore[union-attr]
    told: list[httpx.Response] = []
    for dialect in ("native", "compatible"):
        told.append(ask(sleepy.url, dialect))
        assert told[-1].status_code == 503, told[-1].text
        assert int(told[-1].headers["retry-after"]) >= 1
    assert {code(answer) for answer in told} == {"ModelUnavailable", "model_unavailable"}

    asked = time.monotonic()
    until(lambda: ask(sleepy.url, "native").status_code == 200)  # as a client that tries again
    assert time.monotonic() - asked < 30

    with ExitStack() as stack:
        streams = [
            stack.enter_context(stream(sleepy.url, "compatible", max_tokens=1000, ignore_eos=True)) for _ in range(2)
        ]
        until(lambda: engines(sleepy) == 2, 20)
        assert [ends(lines) for lines in streams] == ["done", "done"]
    assert caption(ask(sleepy.url, "native"))
    until(lambda: engines(sleepy) == 0, 90)
