"""The service under a real Prometheus and Alertmanager: exact figures, dashboards with data, alerts for faults."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest
import sqlalchemy as sa
from prometheus_client import Gauge

from benchmarks.servers import Postgres
from serving.observability.metrics import CALLBACK_METRICS, Metrics
from serving.tenancy import database as store
from serving.tenancy import schema
from tests.observability.chain import Chain
from tests.observability.test_rules import ALERTS, DEPLOY, load
from tests.support.programs import program
from tests.support.service import RunningService
from tests.support.wire import COMPATIBLE, NATIVE, compatible_body, data_url, events, native_body, upload, wav

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

grafana = load(DEPLOY / "grafana" / "make.py")

ONLY_IN_A_CLUSTER = {
    "captioner_engine_replicas",
    "captioner_engine_replicas_ready",
    "captioner_engine_retries_total",
    "captioner_replicas_lost_total",
}
ONLY_WITH_EVENTS = {"captioner_tenant_requests_rate_limited_total"}
"""Labelled by tenant, so it appears with the first refusal."""
ONLY_WITH_GPUS = {"captioner:gpu_seconds_per_audio_hour"}

CLIPS = {seconds: data_url(wav(seconds)) for seconds in (0.5, 2.0, 31.0)}


class Live:
    """A service with its database, the chain over it, and the file that stalls its engine."""

    def __init__(self, service: RunningService, database: Postgres, chain: Chain, stall: Path) -> None:
        self.service = service
        self.database = database
        self.chain = chain
        self.stall = stall


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A service and its chain, once for all tests of this file."""
    directory = tmp_path_factory.mktemp("chain")
    stall = directory / "stall"
    flags = [
        "--engine=fake",
        "--audio-workers=2",
        "--max-num-seqs=2",
        "--engine-stall-timeout-s=40",
        f"--fake-stall-file={stall}",
    ]
    flags += ["--fake-tpot-s=0.005", "--fake-ttft-s=0.02", "--allow-ignore-eos"]
    with Postgres() as database:
        flags.append(f"--database-url={database.url}")
        with RunningService(*flags) as service, Chain(service.url, directory) as chain:
            yield Live(service, database, chain, stall)


def ask(url: str, number: int) -> tuple[str, float, int]:
    """Send one request, in either dialect, streamed or not; return its dialect, audio seconds and output tokens."""
    seconds = list(CLIPS)[number % len(CLIPS)]
    stream = number % 4 > 1
    if number % 2:
        headers = {"x-dashscope-sse": "enable"} if stream else {}
        answer = httpx.post(url + NATIVE, json=native_body(CLIPS[seconds]), headers=headers, timeout=120)
        body = events(answer.text)[-1] if stream else answer.json()
        return "dashscope", seconds, body["usage"]["output_tokens"]
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = httpx.post(url + COMPATIBLE, json=compatible_body(CLIPS[seconds], **options), timeout=120)
    body = events(answer.text)[-1] if stream else answer.json()
    return "openai", seconds, body["usage"]["completion_tokens"]


def test_sums_are_what_a_client_counted(live: Live) -> None:
    """Requests, audio-seconds and tokens in Prometheus equal the client's exactly; every documented metric exists."""
    url, chain = live.service.url, live.chain
    with ThreadPoolExecutor(6) as pool:
        answered = list(pool.map(lambda number: ask(url, number), range(48)))
    for _ in range(3):
        assert httpx.post(url + NATIVE, json=native_body("file:///etc/passwd")).status_code == 400
    stored = upload(url, wav(2))
    headers = {"x-dashscope-ossresourceresolve": "enable"}
    answer = httpx.post(url + NATIVE, json=native_body(stored), headers=headers, timeout=120).json()
    answered.append(("dashscope", 2.0, answer["usage"]["output_tokens"]))
    live.service.settle()
    finished = 'captioner_requests_total{outcome="finished"}'
    chain.until(lambda: chain.value(f"sum({finished})") == len(answered))
    time.sleep(2.5)  # no later scrape may change it
    for dialect in ("openai", "dashscope"):
        mine = [entry for entry in answered if entry[0] == dialect]
        assert chain.value(f'sum(captioner_requests_total{{outcome="finished",dialect="{dialect}"}})') == len(mine)
        heard_s = sum(seconds for _, seconds, _ in mine)
        assert chain.value(f'captioner_audio_seconds_total{{dialect="{dialect}"}}') == heard_s
        assert chain.value(f'captioner_audio_decoded_seconds_total{{dialect="{dialect}"}}') == heard_s
    output = sum(tokens for _, _, tokens in answered)
    assert chain.value('captioner_tokens_total{kind="output"}') == output
    assert chain.value('sum(captioner_tenant_tokens_total{kind="output"})') == output
    assert chain.value('sum(captioner_requests_total{outcome="rejected",code="invalid_audio_url"})') == 3
    assert chain.value("sum(captioner_tenant_requests_total)") == len(answered) + 3
    assert chain.value("sum(captioner_time_to_first_token_seconds_count)") == len(answered)
    assert chain.value('captioner_uploads_total{code="stored"}') == 1
    assert chain.value("sum(captioner_ledger_records_total)") >= len(answered)
    billed = chain.value('sum(captioner_tenant_cost_total{currency="CNY"})')
    assert billed == pytest.approx(ledger_nanos(live) / 1e9)
    assert billed > 0
    missing = documented() - chain.names() - ONLY_IN_A_CLUSTER - ONLY_WITH_EVENTS
    assert not missing


def ledger_nanos(live: Live) -> int:
    """Return the exact sum that the ledger has billed."""
    database = store.connect(live.database.url)
    with database.connect() as connection:
        nanos = connection.scalar(sa.select(sa.func.sum(schema.usage_records.c.amount_nanos)))
    database.dispose()
    return int(nanos or 0)


def documented() -> set[str]:
    """Return the name of one series of every metric of ours."""
    names = set(CALLBACK_METRICS)
    for family in Metrics().registry.collect():
        suffix = {"counter": "_total", "histogram": "_count"}.get(family.type, "")
        names.add(family.name + suffix)
    return names


def test_the_exposition_is_clean(live: Live) -> None:
    """`promtool check metrics` finds no fault in the metrics of a loaded service."""
    text = httpx.get(f"{live.service.url}/metrics", timeout=30).text
    done = subprocess.run(
        [program("promtool"), "check", "metrics"], input=text, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_documented_table_is_the_code() -> None:
    """The table of metrics in the documentation has every metric with the meaning that the code gives."""
    table = re.findall(r"^\| `(\w+)` \| \w+ \| (.*) \|$", (DEPLOY / "observability.md").read_text(), re.MULTILINE)
    meanings = {family.name: family.documentation for family in Metrics().registry.collect()}
    meanings = {name: text for name, text in meanings.items() if not name.startswith("process_")} | {
        name.removesuffix("_total"): text for name, text in CALLBACK_METRICS.items()
    }
    assert {name.removesuffix("_total"): text for name, text in table} == meanings


@pytest.mark.parametrize("board", grafana.BOARDS, ids=lambda board: str(board.uid))
def test_committed_dashboards_equal_the_generated_ones(board: Any) -> None:
    """Each JSON equals the output of `make.py`, and every panel has an expression."""
    text = (DEPLOY / "grafana" / "dashboards" / f"{board.uid}.json").read_text()
    assert text == grafana.make(board)
    panels = [panel for panel in json.loads(text)["panels"] if panel["type"] != "row"]
    assert all(panel["targets"] for panel in panels)


def test_every_dashboard_expression_returns_data(live: Live) -> None:
    """On a loaded service every expression returns data, except those of a cluster, of vLLM, and of rare events."""
    exprs = {expr for expr in all_expressions() if shows_here(expr)}
    assert len(exprs) > 50
    assert not empty_under_load(live.chain, exprs, live.service.url)


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"])
async def test_names_of_vllm_keep_their_colon(accept: str) -> None:
    """A colon in a name is kept both in the plain format and in the one that Prometheus requests."""
    metrics = Metrics()
    Gauge("vllm:num_requests_running", "Of vLLM.", registry=metrics.registry)
    body, _ = await metrics.expose(partial(asyncio.sleep, 0), accept)
    assert b"\nvllm:num_requests_running 0.0\n" in body


@pytest.mark.engine
def test_dashboards_of_the_real_engine_have_data(embedded_service: RunningService, tmp_path: Path) -> None:
    """The panels use the names under which vLLM exports its metrics."""
    exprs = {expr for expr in all_expressions() if "vllm:" in expr}
    assert len(exprs) >= 6
    with Chain(embedded_service.url, tmp_path) as chain:
        assert not empty_under_load(chain, exprs, embedded_service.url)


def empty_under_load(chain: Chain, exprs: set[str], url: str) -> set[str]:
    """Return the expressions that have returned no data within a minute of captions."""
    empty = exprs
    deadline = time.monotonic() + 60
    while empty and time.monotonic() < deadline:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda number: ask(url, number), range(12)))
        empty = {expr for expr in empty if not chain.query(expr.replace("$__rate_interval", "20s"))}
    return empty


def all_expressions() -> Iterator[str]:
    """Yield the expressions of every panel of every dashboard."""
    for board in grafana.BOARDS:
        for panels in board.rows.values():
            for panel in panels:
                yield from panel.exprs.values()


def shows_here(expr: str) -> bool:
    """Return whether one process with the fake engine has data for an expression."""
    names = set(re.findall(r"(?:captioner|vllm|ray)[_:][a-zA-Z0-9_:]+", expr))
    failed = (
        'captioner_tenant_requests_total{outcome=~"failed|failed_midstream"}' in expr
    )  # no request of this run fails so
    elsewhere = names & (ONLY_IN_A_CLUSTER | ONLY_WITH_EVENTS | ONLY_WITH_GPUS)
    return not failed and not elsewhere and not any(name.startswith(("vllm:", "ray_")) for name in names)


@contextmanager
def only(live: Live, receiver: str, alert: str) -> Iterator[None]:
    """Check that the fault within sends this alert, and no other, to this receiver, and resolves it afterwards."""
    chain = live.chain
    chain.until(lambda: not chain.firing())
    chain.notifications.clear()
    assert ALERTS[alert]["labels"]["severity"] == receiver.removesuffix("s")
    yield
    assert chain.notifications == [(receiver, alert, "firing")]
    # After the fault an alert on the budget that it has burnt may be sent as well, and rightly.
    chain.until(lambda: (receiver, alert, "resolved") in chain.notifications)


def test_a_stalled_engine_pages(live: Live) -> None:
    """A stall while requests are running sends one page, which is resolved when the engine continues."""
    with ThreadPoolExecutor(2) as pool, only(live, "pages", "CaptionerEngineStalled"):
        body = compatible_body(CLIPS[2.0], stream=True)
        running = [
            pool.submit(httpx.post, live.service.url + COMPATIBLE, json=body | {"max_tokens": 24}, timeout=120)
            for _ in range(2)
        ]
        time.sleep(0.06)
        live.stall.touch()
        live.chain.until(lambda: ("pages", "CaptionerEngineStalled", "firing") in live.chain.notifications)
        live.stall.unlink()
        assert all(each.result().text.endswith("data: [DONE]\n\n") for each in running)


def test_dying_workers_make_a_ticket(live: Live) -> None:
    """Killing audio workers one after the other sends one ticket, which is resolved when they stay alive."""
    with only(live, "tickets", "CaptionerAudioWorkersDying"):
        for _ in range(4):
            before = live.service.metric("captioner_audio_worker_deaths_total")
            children = psutil.Process(live.service.process.pid).children()
            worker = next(child for child in children if "serving.audio.worker" in child.cmdline())
            os.kill(worker.pid, signal.SIGKILL)
            live.chain.until(lambda: live.service.metric("captioner_audio_worker_deaths_total") > before)  # noqa: B023
            time.sleep(1)
        live.chain.until(lambda: ("tickets", "CaptionerAudioWorkersDying", "firing") in live.chain.notifications)
    assert ask(live.service.url, 0)[1]


def test_a_stopped_database_makes_a_ticket(live: Live) -> None:
    """Stopping PostgreSQL sends one ticket, though ledger and keys lag; captions continue and are written later."""
    follows = {"CaptionerLedgerLagging", "CaptionerKeysOutdated"}
    with only(live, "tickets", "CaptionerDatabaseDown"):
        live.database.stop()
        assert ask(live.service.url, 0)[2] == 24
        live.chain.until(lambda: ("tickets", "CaptionerDatabaseDown", "firing") in live.chain.notifications)
        live.chain.until(lambda: follows <= live.chain.firing())
        assert ask(live.service.url, 1)[2] == 24
        live.database.start()
    live.chain.until(lambda: live.chain.value("captioner_ledger_pending") == 0)


def test_a_growing_backlog_pages(live: Live) -> None:
    """A load beyond capacity sends one page, which is resolved when the queue is empty.

    Callers meanwhile wait too long; that follows from the backlog and is silenced.
    """
    body = native_body(CLIPS[31.0], max_tokens=200, ignore_eos=True)

    def send(_: int) -> int:
        return httpx.post(live.service.url + NATIVE, json=body, timeout=240).status_code

    with only(live, "pages", "CaptionerBacklogGrowing"), ThreadPoolExecutor(40) as pool:
        answers = pool.map(send, range(120))
        live.chain.until(lambda: ("pages", "CaptionerBacklogGrowing", "firing") in live.chain.notifications)
        assert set(answers) == {200}


def test_a_stopped_service_pages(live: Live) -> None:
    """A stopped service sends one page. This is the last test of the file, since it stops the service.

    An alert on the budget that the backlog before has burnt may still be sent.
    """
    live.chain.notifications.clear()
    live.service.stop()
    live.chain.until(lambda: ("pages", "CaptionerNothingScraped", "firing") in live.chain.notifications)
    time.sleep(3)
    sent = {entry for entry in live.chain.notifications if "Slow" not in entry[1] and "Backlog" not in entry[1]}
    assert sent == {("pages", "CaptionerNothingScraped", "firing")}
