"""A real Prometheus over the cluster: sums over processes equal a client's counts, also after some have died."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx
import psutil
import pytest

from tests.cluster.running import ENGINE, FRONTEND, METRICS_TOKEN, SCRAPE, RunningCluster
from tests.cluster.test_cluster import ask, caption
from tests.observability.chain import Chain
from tests.observability.test_live import all_expressions, documented
from tests.support.programs import program
from tests.support.wire import data_url, wav

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.cluster

CLIPS = {seconds: data_url(wav(seconds)) for seconds in (0.5, 1.0, 2.25)}
WORKER = "serving.audio.worker"

NOT_HERE = {"captioner_tenant_requests_rate_limited_total"}
"""Metrics that appear with the first refusal by a tenant's limit, which `tests/observability` covers."""

FIGURES = {
    "requests": 'captioner_requests_total{outcome="finished"}',
    "native requests": 'captioner_requests_total{outcome="finished",dialect="dashscope"}',
    "refused": 'captioner_requests_total{outcome="rejected"}',
    "audio": "captioner_audio_seconds_total",
    "decoded": "captioner_audio_decoded_seconds_total",
    "output tokens": 'captioner_tokens_total{kind="output"}',
    "audio tokens": 'captioner_tokens_total{kind="audio"}',
    "first tokens": "captioner_time_to_first_token_seconds_count",
    "durations": 'captioner_request_duration_seconds_count{outcome="finished"}',
    "ledger": "captioner_ledger_records_total",
}


class Counted:
    """A cluster with its chain of Prometheus and Alertmanager, and the counts of a client since."""

    def __init__(self, cluster: RunningCluster, chain: Chain) -> None:
        self.cluster = cluster
        self.chain = chain
        self.client = dict.fromkeys(FIGURES, 0.0)
        self._before = {name: chain.value(f"sum({figure})") for name, figure in FIGURES.items()}

    def reported(self) -> dict[str, float]:
        """Return the same counts from Prometheus: the last value of each process, ended ones included."""
        return {
            name: round(self.chain.value(f"sum(max_over_time({figure}[1h]))") - self._before[name], 9)
            for name, figure in FIGURES.items()
        }

    def load(self, requests: int) -> None:
        """Send requests in both dialects, streamed and not; wait until Prometheus has the same counts, and no more."""
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(self._ask, range(requests)))
        for frontend in self.cluster.frontends():
            refused = ask(frontend, "native", audio="file:///etc/passwd")
            assert refused.status_code == 400
            self.client["refused"] += 1
        try:
            self.chain.until(lambda: self.reported() == self.client)
        except TimeoutError:
            assert self.reported() == self.client
        time.sleep(3)
        assert self.reported() == self.client

    def _ask(self, number: int) -> None:
        dialect = ("native", "compatible")[number % 2]
        seconds = list(CLIPS)[number % len(CLIPS)]
        answer = ask(self.cluster.url, dialect, audio=CLIPS[seconds], stream=number % 4 > 1)
        _, tokens = caption(answer)
        counted = {
            "requests": 1,
            "native requests": dialect == "native",
            "audio": seconds,
            "decoded": seconds,
            "output tokens": tokens,
            "audio tokens": audio_tokens(answer),
            "first tokens": 1,
            "durations": 1,
            "ledger": 1,
        }
        for name, value in counted.items():
            self.client[name] += value


def audio_tokens(answer: httpx.Response) -> int:
    """Return the billed audio tokens of a response; each dialect has them once, at the end."""
    return int(re.findall(r'"audio_tokens": ?(\d+)', answer.text)[-1])


@pytest.fixture(scope="module")
def counted(running_cluster: RunningCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Counted]:
    """The session's complete cluster, all of which Prometheus has scraped before the first request is counted."""
    running_cluster.wait(running_cluster.complete)
    with Chain(running_cluster.url, tmp_path_factory.mktemp("chain"), every="2s", token=METRICS_TOKEN) as chain:
        roles = 'count by (role) (up{job="captioner"} == 1)'

        def seen() -> bool:
            up = {each["metric"]["role"]: int(each["value"][1]) for each in chain.query(roles)}
            return {role: up.get(role) for role in ("frontend", "engine")} == {"frontend": 2, "engine": 2}

        chain.until(seen)
        yield Counted(running_cluster, chain)


def test_sums_over_frontends_are_what_a_client_counted(counted: Counted) -> None:
    """Requests, audio-seconds and tokens are exact, both frontends had some, and every documented metric exists."""
    counted.load(24)
    assert len(counted.chain.query(f"sum by (instance) ({FIGURES['requests']}) > 0")) == 2
    assert not documented() - counted.chain.names() - NOT_HERE


def test_a_killed_audio_worker_takes_no_count_with_it(counted: Counted) -> None:
    """Sums stay exact, and no counter of a frontend goes back: the frontend counts for its workers."""
    deaths = counted.chain.value("sum(captioner_audio_worker_deaths_total)")
    workers = [
        child.pid
        for frontend in counted.cluster.pids(FRONTEND)
        for child in psutil.Process(frontend).children(recursive=True)
        if WORKER in " ".join(child.cmdline())
    ]
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    counted.load(12)
    counted.chain.until(lambda: counted.chain.value("sum(captioner_audio_worker_deaths_total)") == deaths + 2)
    for counter in ("captioner_cpu_seconds_total", "captioner_audio_workers_busy_seconds_total"):
        assert counted.chain.query(f"resets({counter}[1h])")
        assert not counted.chain.query(f"resets({counter}[1h]) > 0")


def test_a_killed_frontend_leaves_its_counts_behind(counted: Counted) -> None:
    """Its counts stay in sums over time, its successor starts at zero, and it is counted as lost."""
    lost = counted.chain.value('max(captioner_replicas_lost_total{replica="frontend"})')
    victim = min(counted.cluster.pids(FRONTEND))
    os.kill(victim, signal.SIGKILL)
    counted.cluster.wait(lambda: victim not in counted.cluster.pids(FRONTEND) and counted.cluster.complete())
    counted.load(12)
    counted.chain.until(lambda: counted.chain.value('max(captioner_replicas_lost_total{replica="frontend"})') > lost)


def test_engines_that_are_lost_repeatedly_raise_an_alert(counted: Counted) -> None:
    """Four engines lost within the alert's window fire one page, which names the role."""
    chain, page = counted.chain, ("pages", "CaptionerReplicaCrashLoop", "firing")
    chain.until(lambda: page[1] not in chain.firing())
    chain.notifications.clear()
    for _ in range(2):
        victims = counted.cluster.pids(ENGINE)
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        counted.cluster.wait(lambda killed=victims: len(counted.cluster.pids(ENGINE) - killed) == 2)  # type: ignore[misc]
        counted.cluster.wait(counted.cluster.complete)  # only an engine that has registered counts as lost
    chain.until(lambda: page in chain.notifications)
    fired = chain.query(f'max_over_time(ALERTS{{alertname="{page[1]}",alertstate="firing"}}[1m])')
    assert [each["metric"]["replica"] for each in fired] == ["engine"]
    counted.cluster.wait(counted.cluster.complete)


def test_expositions_of_all_processes_are_clean(counted: Counted) -> None:
    """`promtool check metrics` has no complaint about any frontend or engine replica."""
    targets = httpx.get(f"{counted.cluster.url}/metrics/targets", headers=SCRAPE, timeout=30).json()
    ours = [each["targets"][0] for each in targets if each["labels"]["role"] in ("frontend", "engine")]
    assert len(ours) >= 4
    command = [program("promtool"), "check", "metrics"]
    for target in ours:
        try:
            text = httpx.get(f"http://{target}/metrics", headers=SCRAPE, timeout=30).text
        except httpx.ConnectError:  # of a killed process, until it counts as lost
            continue
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
        assert (target, done.returncode, done.stdout + done.stderr) == (target, 0, "")


def test_dashboards_of_a_cluster_have_data(counted: Counted) -> None:
    """Every panel that needs a cluster has data: replicas, lost processes, Ray Serve's own metrics."""
    exprs = {expr for expr in all_expressions() if re.search(r"ray_|replicas|retries", expr)}
    assert len(exprs) >= 6
    chain = counted.chain

    def empty() -> set[str]:
        return {expr for expr in exprs if not chain.query(expr.replace("$__rate_interval", "30s"))}

    try:
        chain.until(lambda: not empty(), 60)
    except TimeoutError:
        assert not empty()
