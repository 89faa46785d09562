"""Access to metrics: strangers read none, and tenants are named only to those who may know them."""

from __future__ import annotations

import hmac
import os
import subprocess
import time
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from pydantic import SecretStr, ValidationError

from serving.api.app import create_app
from serving.config import Settings
from serving.observability.metrics import Metrics
from serving.observability.scrape_access import ScrapeAccess
from serving.observability.service_discovery import MetricsListener
from tests.cluster.running import free_port
from tests.observability.chain import Chain
from tests.support.programs import program
from tests.support.service import RunningService
from tests.support.wire import ask_compatible, data_url, wav

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

TOKEN = "scrape-token"  # noqa: S105 - of this test
BEARER = {"authorization": f"Bearer {TOKEN}"}
KEY = {"authorization": "Bearer sk-of-the-settings"}
TARGETS = [{"targets": ["10.0.0.1:9464"], "labels": {"role": "frontend"}}]
ANY = "0.0.0.0"  # noqa: S104 - listened on by nobody here
PATHS = ("/metrics", "/metrics/targets")


@asynccontextmanager
async def scraper(
    tmp_path: Path,
    *,
    peer: str = "127.0.0.1",
    origin: str = "http://127.0.0.1:8000",
    cluster: bool = False,
    **settings: Any,
) -> AsyncIterator[httpx.AsyncClient]:
    """Run a client that connects to the application from the address `peer`, with one finished request of `acme`."""
    given = Settings(engine="fake", audio_workers=1, data_dir=tmp_path, **settings)
    app = create_app(given, targets=(lambda: TARGETS) if cluster else None)  # type: ignore[arg-type,return-value]
    metrics: Metrics = app.state.components.metrics
    record = metrics.begin("r", "openai")
    record.caller = "acme"
    metrics.finish(record, None)
    transport = httpx.ASGITransport(app, client=(peer, 50_000))
    async with httpx.AsyncClient(transport=transport, base_url=origin) as client:
        yield client


def tenants(text: str) -> set[str]:
    """Return the tenants that an exposition names."""
    lines = [line for line in text.splitlines() if line.startswith("captioner_tenant_requests_total")]
    return {line.partition('tenant="')[2].partition('"')[0] for line in lines}


RULES = [
    # settings, in a cluster -> tenants are named, direct scrapes are answered, all scrapes are answered
    ({}, False, (False, True, False)),
    ({"host": ANY}, False, (False, True, False)),
    ({"metrics_token": TOKEN}, False, (True, True, False)),
    ({"metrics_port": 9464}, False, (True, False, False)),
    ({"metrics_port": 9464, "metrics_host": "::1"}, False, (True, False, False)),
    ({"metrics_port": 9464, "metrics_host": ANY}, False, (False, False, False)),
    ({"metrics_port": 9464, "metrics_host": ANY, "metrics_token": TOKEN}, False, (True, False, False)),
    ({"auth": False}, False, (True, True, False)),
    ({}, True, (False, False, False)),
    ({"metrics_port": 9464}, True, (False, False, False)),
    ({"metrics_token": TOKEN}, True, (True, False, False)),
    ({"auth": False}, True, (True, False, True)),
]


@pytest.mark.parametrize(("settings", "cluster", "rule"), RULES, ids=[str(number) for number in range(len(RULES))])
def test_the_rule_of_each_combination(
    settings: dict[str, Any], rule: tuple[bool, bool, bool], *, cluster: bool, tmp_path: Path
) -> None:
    """Token, separate port, cluster and authentication decide who may scrape, and whether tenants are named."""
    access = ScrapeAccess.of(Settings(data_dir=tmp_path, **settings), in_cluster=cluster)
    assert (access.names_tenants, access.local, access.open) == rule


@pytest.mark.parametrize("auth", [True, False])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "header",
    [
        "Forwarded: for=127.0.0.1",
        "X-Forwarded-For: 127.0.0.1",
        "X-Forwarded-Proto: https",
        "X-Forwarded-Host: 127.0.0.1:8000",
        "x-forwarded-for:",
        "Via: 1.1 proxy",
        "X-Real-IP: 127.0.0.1",
        "X-Client-IP: 127.0.0.1",
        "CF-Connecting-IP: 127.0.0.1",
        "X-Envoy-External-Address: 127.0.0.1",
        "Host: captions.example.com",
        "Host: 127.0.0.1",
        "Host: 127.0.0.1:8001",
        "Host: 127.0.0.1:port",
        "Host: [",
    ],
)
async def test_a_forwarded_scrape_is_refused(tmp_path: Path, header: str, path: str, *, auth: bool) -> None:
    """A request through a proxy of this machine is a stranger's, whatever address it states."""
    name, _, value = header.partition(":")
    async with scraper(tmp_path, auth=auth) as client:
        assert (await client.get(path)).status_code == 200
        answer = await client.get(path, headers={name: value.strip()})
    assert (answer.status_code, answer.json()["code"]) == (403, "AccessDenied")
    assert "metrics_token" in answer.json()["message"]


@pytest.mark.parametrize(
    ("peer", "origin", "status"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000", 200),
        ("127.8.8.8", "http://localhost:8000", 200),
        ("::1", "http://[::1]:8000", 200),
        ("::ffff:127.0.0.1", "http://127.0.0.1:8000", 200),
        ("127.0.0.1", "http://127.0.0.1", 200),
        ("203.0.113.9", "http://127.0.0.1:8000", 403),
        ("10.0.0.9", "http://10.0.0.8:8000", 403),
        ("::ffff:10.0.0.9", "http://10.0.0.8:8000", 403),
        ("fe80::1", "http://[::1]:8000", 403),
    ],
)
async def test_only_this_machine_scrapes_without_a_token(tmp_path: Path, peer: str, origin: str, status: int) -> None:
    """Without a token and a separate port, direct requests from loopback are answered, and tenants are not named."""
    async with scraper(tmp_path, peer=peer, origin=origin) as client:
        answers = [await client.get(path) for path in PATHS]
    assert [answer.status_code for answer in answers] == [status, status]
    assert "acme" not in answers[0].text
    if status == 200:
        assert tenants(answers[0].text) == {"other"}


@pytest.mark.parametrize("settings", [{}, {"host": ANY}, {"metrics_port": 0}])
@pytest.mark.parametrize("cluster", [False, True])
@pytest.mark.parametrize("path", PATHS)
async def test_with_a_token_every_scrape_needs_it(
    tmp_path: Path, path: str, settings: dict[str, Any], *, cluster: bool
) -> None:
    """A scrape with the token is answered from anywhere, one without it from nowhere."""
    for peer, headers in (("127.0.0.1", {}), ("203.0.113.9", {"x-forwarded-for": "10.0.0.1"})):
        async with scraper(tmp_path, peer=peer, cluster=cluster, metrics_token=TOKEN, **settings) as client:
            answer = await client.get(path, headers=headers | BEARER)
            assert answer.status_code == 200
            assert path != "/metrics" or tenants(answer.text) == {"acme"}
            for wrong in (
                "",
                "Bearer",
                f"Bearer {TOKEN}x",
                f"Bearer {TOKEN[:-1]}",
                TOKEN,
                f"Basic {TOKEN}",
                "Bearer \xff",
            ):
                refused = await client.get(path, headers=httpx.Headers({**headers, "authorization": wrong}, "latin-1"))
                assert refused.status_code == 401, wrong
            assert (await client.get(path, headers=headers)).status_code == 401
            both = await client.get(path, headers=[("authorization", "Bearer x"), *BEARER.items()])
            assert both.status_code == 401


@pytest.mark.parametrize("path", PATHS)
async def test_the_callers_port_of_a_cluster_needs_a_token(tmp_path: Path, path: str) -> None:
    """HAProxy forwards without a mark, from loopback: without a token nothing is answered as soon as keys exist."""
    async with scraper(tmp_path, cluster=True) as client:
        assert (await client.get(path)).status_code == 403
    async with scraper(tmp_path, cluster=True, auth=False) as client:
        assert (await client.get(path)).status_code == 200


async def test_a_separate_port_takes_metrics_off_the_callers_port(tmp_path: Path) -> None:
    """With `metrics_port` the port of callers answers no scrape without a token."""
    async with scraper(tmp_path, metrics_port=0) as client:
        assert [(await client.get(path)).status_code for path in PATHS] == [403, 403]


async def test_a_bounded_number_of_tenants_is_named() -> None:
    """The first 100 of 101 tenants are named."""
    metrics = Metrics(tenants=100)
    for number in range(101):
        record = metrics.begin("r", "openai")
        record.caller = f"t{number}"
        metrics.finish(record, None)

    async def healthy() -> None:
        return None

    body, _ = await metrics.expose(healthy)
    assert tenants(body.decode()) == {*(f"t{number}" for number in range(100)), "other"}


@pytest.mark.parametrize("token", [None, TOKEN])
@pytest.mark.parametrize("targets", [None, TARGETS])
async def test_the_listener_needs_the_token(token: str | None, targets: Any) -> None:
    """Both paths of a separate metrics port need the token, if there is one; others do not exist."""

    async def expose(_: str) -> tuple[bytes, str]:
        return b"captioner_ready 1.0\n", "text/plain"

    listener = MetricsListener(expose, SecretStr(token) if token else None, (lambda: targets) if targets else None)
    address = await listener.start("127.0.0.1", 0)
    try:
        async with httpx.AsyncClient(base_url=f"http://{address}") as client:
            right = await client.get("/metrics", headers=BEARER)
            assert (right.status_code, right.text) == (200, "captioner_ready 1.0\n")
            listed = (await client.get("/metrics/targets", headers=BEARER)).json()
            assert listed == (targets or [{"targets": [address], "labels": {"role": "server"}}])
            for path in PATHS:
                for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": TOKEN}):
                    assert (await client.get(path, headers=headers)).status_code == (401 if token else 200)
            assert (await client.get("/healthz", headers=BEARER)).status_code == 404
    finally:
        await listener.stop()


async def test_tokens_are_compared_in_constant_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ports compare the complete header by `hmac.compare_digest`."""
    compared: list[tuple[bytes, bytes]] = []

    def compare(ours: bytes, theirs: bytes) -> bool:
        compared.append((ours, theirs))
        return ours == theirs

    monkeypatch.setattr(hmac, "compare_digest", compare)
    async with scraper(tmp_path, metrics_token=TOKEN) as client:
        await client.get("/metrics", headers={"authorization": "Bearer guess"})

    async def expose(_: str) -> tuple[bytes, str]:
        return b"", "text/plain"

    listener = MetricsListener(expose, SecretStr(TOKEN))
    address = await listener.start("127.0.0.1", 0)
    async with httpx.AsyncClient() as client:
        await client.get(f"http://{address}/metrics", headers={"authorization": "Bearer guess"})
    await listener.stop()
    assert compared == [(b"Bearer guess", b"Bearer scrape-token")] * 2


@pytest.mark.parametrize("taken", [{"port": 9470}, {"admin_port": 9495, "admin_token": "a" * 16}])
def test_metrics_ports_leave_out_the_other_ports(tmp_path: Path, taken: dict[str, Any]) -> None:
    """The range of metrics ports may not include a port that the service needs."""
    with pytest.raises(ValidationError, match="metrics_port: 9464 to 9495 include"):
        Settings(data_dir=tmp_path, metrics_port=9464, **taken)
    Settings(data_dir=tmp_path, metrics_port=9496, **taken)


NGINX = """
{user}daemon off; pid {directory}/nginx.pid; error_log {directory}/error.log warn; worker_processes 1;
events {{ worker_connections 64; }}
http {{
  access_log off;
  client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy; fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;
  upstream captioner {{ server 127.0.0.1:{upstream}; keepalive 1; }}
  server {{ listen 127.0.0.1:{ports[0]}; location / {{ proxy_pass http://127.0.0.1:{upstream}; }} }}
  server {{ listen 127.0.0.1:{ports[1]}; location / {{
    proxy_pass http://captioner; proxy_http_version 1.1; proxy_set_header Connection "";
  }} }}
  server {{ listen 127.0.0.1:{ports[2]}; location / {{
    proxy_pass http://captioner; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $host;
  }} }}
  server {{ listen 127.0.0.1:{ports[3]}; location / {{
    proxy_pass http://captioner; proxy_http_version 1.1; proxy_set_header Connection "";
    proxy_set_header Host 127.0.0.1:{upstream}; proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
  }} }}
}}
"""
"""As nginx is without options; kept connections; the client's host; and what most guides set."""


@contextmanager
def nginx(directory: Path, upstream: str) -> Iterator[list[str]]:
    """Run nginx in front of the service; yield the origins of its servers."""
    ports = [free_port() for _ in range(4)]
    user = "user root; " if os.geteuid() == 0 else ""  # another user's worker cannot write to root's directories
    configuration = directory / "nginx.conf"
    configuration.write_text(NGINX.format(user=user, directory=directory, ports=ports, upstream=upstream))
    process = subprocess.Popen([program("nginx"), "-e", str(directory / "error.log"), "-c", str(configuration)])
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{ports[-1]}/healthz")
                break
            except httpx.ConnectError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield [f"http://127.0.0.1:{port}" for port in ports]
    finally:
        process.terminate()
        process.wait(60)


def test_no_scrape_passes_a_proxy_of_this_machine(tmp_path: Path) -> None:
    """A real nginx on the same machine passes captions on, but no scrape without the token."""
    with (
        RunningService("--engine=fake", "--audio-workers=1", "--api-keys=sk-of-the-settings") as service,
        nginx(tmp_path, service.url.rpartition(":")[2]) as origins,
    ):
        for origin in origins:
            assert ask_compatible(origin, data_url(wav(1)), headers=KEY).text
            for path in PATHS:
                assert httpx.get(origin + path).status_code == 403, (origins.index(origin), path)
        local = httpx.get(f"{service.url}/metrics").text
        assert tenants(local) <= {"other", "none"}


def test_prometheus_sees_tenants_with_the_token(tmp_path: Path) -> None:
    """With the committed configuration a real Prometheus sends the token, for discovery and for scrapes."""
    flags = ("--engine=fake", "--audio-workers=1", "--api-keys=sk-of-the-settings", f"--metrics-token={TOKEN}")
    with RunningService(*flags) as service, Chain(service.url, tmp_path, token=TOKEN) as chain:
        assert ask_compatible(service.url, data_url(wav(1)), headers=KEY).text
        chain.until(lambda: chain.value('captioner_tenant_requests_total{tenant="default",outcome="finished"}') == 1)


def test_metrics_on_a_separate_port() -> None:
    """On one machine `metrics_port` serves metrics that name tenants, on loopback, and lists itself as the target."""
    port = free_port()
    flags = ("--engine=fake", "--audio-workers=1", "--api-keys=sk-of-the-settings", f"--metrics-port={port}")
    with RunningService(*flags) as service:
        assert ask_compatible(service.url, data_url(wav(1)), headers=KEY).text
        assert httpx.get(f"{service.url}/metrics").status_code == 403
        here = f"http://127.0.0.1:{port}"
        assert "default" in tenants(httpx.get(f"{here}/metrics").text)
        assert httpx.get(f"{here}/metrics/targets").json() == [
            {"targets": [f"127.0.0.1:{port}"], "labels": {"role": "server"}}
        ]
