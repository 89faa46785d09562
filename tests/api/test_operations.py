"""The operator's view: settings, probes, metrics, logs."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.api.app import create_app
from serving.config import Settings
from serving.engine.admission_control import AdmissionControl
from serving.engine.fake import FakeEngine, Faults
from serving.observability.request_record import STAGES
from tests.support.service import RunningService
from tests.support.wire import (
    COMPATIBLE,
    NATIVE,
    ask_compatible,
    ask_native,
    compatible_body,
    data_url,
    native_body,
    wav,
)

if TYPE_CHECKING:
    from tests.support.media import MediaServer


@pytest.mark.usefixtures("in_process")
async def test_probes_follow_the_engine() -> None:
    """Loading: alive, not ready, captions refused with the time of a retry. Loaded: ready. Dead: neither."""
    settings = Settings(auth=False, audio_workers=1)
    engine = _SlowToLoad(settings)
    app = create_app(settings, engine)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
    ):
        while app.state.components.keys.waiting_for is not None:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.01)
        assert [(await client.get(path)).status_code for path in ("/healthz", "/readyz")] == [200, 503]
        refused = await client.post(NATIVE, json=native_body(data_url(wav(1))))
        assert (refused.status_code, refused.json()["code"]) == (503, "ModelUnavailable")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        engine.may_load.set()
        while (await client.get("/readyz")).status_code != 200:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.01)
        assert (await client.get("/healthz")).status_code == 200
        engine.die()
        assert [(await client.get(path)).status_code for path in ("/healthz", "/readyz")] == [503, 503]
        failed = await client.post(COMPATIBLE, json=compatible_body(data_url(wav(1))))
        assert (failed.status_code, failed.json()["error"]["code"]) == (500, "internal_error")


class _SlowToLoad(FakeEngine):
    """An engine that loads when the test lets it."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.may_load = asyncio.Event()

    async def start(self) -> None:
        await self.may_load.wait()
        await super().start()


@pytest.mark.usefixtures("in_process")
async def test_a_stalled_engine_is_reported() -> None:
    """An engine that stalls ends its captions, and the probes report it."""
    settings = Settings(auth=False, audio_workers=1, engine_stall_timeout_s=0.5)
    engine = AdmissionControl(FakeEngine(settings, faults=Faults(hang_after_tokens=3)), settings)
    app = create_app(settings, engine)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        while (await client.get("/readyz")).status_code != 200:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.01)
        answers = [client.post(NATIVE, json=native_body(data_url(wav(1)))) for _ in range(3)]
        for answer in await asyncio.gather(*answers):
            assert (answer.status_code, answer.json()["code"]) == (500, "InternalError.Algo")
        assert [(await client.get(path)).status_code for path in ("/healthz", "/readyz")] == [503, 503]
        refused = await client.post(NATIVE, json=native_body(data_url(wav(1))))
        assert refused.status_code == 500
        metrics = (await client.get("/metrics")).text
    stalled = 'captioner_requests_total{code="engine_stalled",dialect="dashscope",outcome="%s"} %.1f'
    assert {stalled % ("failed_midstream", 3), stalled % ("failed", 1)} <= {*metrics.splitlines()}


async def test_overload_is_refused_and_counted() -> None:
    """A caption over the engine's queue is refused in its dialect, with the time of a retry; others succeed."""
    flags = ("--engine=fake", "--audio-workers=1", "--max-num-seqs=1", "--max-engine-queue=2", "--fake-ttft-s=4")
    with RunningService(*flags) as service:
        audio = data_url(wav(2))
        async with httpx.AsyncClient(base_url=service.url, timeout=60) as client:
            native = [client.post(NATIVE, json=native_body(audio)) for _ in range(4)]
            compatible = [client.post(COMPATIBLE, json=compatible_body(audio)) for _ in range(4)]
            running = asyncio.gather(*native, *compatible)
            async with asyncio.timeout(20):
                while service.metric("captioner_engine_waiting") < 2:  # noqa: ASYNC110 - there is no event for it
                    await asyncio.sleep(0.05)
            assert service.metric("captioner_engine_running") == 2
            assert service.metric("captioner_engine_running_audio_seconds") == 4
            assert service.metric("captioner_engine_waiting_audio_seconds") == 4
            assert 0 < service.metric("captioner_engine_kv_tokens") < 2000
            assert service.metric("captioner_engine_kv_capacity_tokens") == 1_000_000
            answers = await running
        refused = [answer for answer in answers if answer.status_code == 503]
        assert [answer.status_code for answer in answers].count(200) == 4
        assert len(refused) == 4
        for answer in refused:
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            body = answer.json()
            assert body.get("code") == "ModelServingError" or body["error"]["code"] == "service_unavailable"
        service.settle()
        assert service.metric("captioner_requests_shed_total", reason="engine_queue") == 4
        assert service.metric("captioner_engine_kv_tokens") == service.metric("captioner_engine_waiting") == 0


def test_metrics_add_up(media: MediaServer) -> None:
    """Requests, audio seconds, tokens and stages in `/metrics` equal the client's own counts."""
    media.files["counted.wav"] = wav(2)
    with RunningService("--engine=fake", "--audio-workers=1", "--fetch-allow=127.0.0.0/8") as service:
        answers = [ask_native(service.url, data_url(wav(seconds))) for seconds in (0.5, 1, 6.08)]
        answers.append(ask_native(service.url, media.url("counted.wav")))
        answers.append(ask_compatible(service.url, data_url(wav(3)), max_tokens=5))
        httpx.post(service.url + NATIVE, json=native_body("file:///etc/passwd"))
        httpx.post(service.url + COMPATIBLE, content=b"{")
        service.settle()
        values = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(httpx.get(f"{service.url}/metrics").text)
            for sample in family.samples
        }
    finished = ("outcome", "finished")
    requests = "captioner_requests_total"
    assert values[requests, ("code", "stop"), ("dialect", "dashscope"), finished] == 4
    assert values[requests, ("code", "length"), ("dialect", "openai"), finished] == 1
    refused = ("outcome", "rejected")
    assert values[requests, ("code", "invalid_audio_url"), ("dialect", "dashscope"), refused] == 1
    assert values[requests, ("code", "invalid_request"), ("dialect", "openai"), refused] == 1
    assert values["captioner_audio_seconds_total", ("dialect", "dashscope")] == pytest.approx(0.5 + 1 + 6.08 + 2)
    assert values["captioner_audio_seconds_total", ("dialect", "openai")] == pytest.approx(3)
    usages = [answer.usage for answer in answers]
    output = sum(usage.get("output_tokens", 0) + usage.get("completion_tokens", 0) for usage in usages)
    assert values["captioner_tokens_total", ("kind", "output")] == output
    assert values["captioner_tokens_total", ("kind", "audio")] == 13 + 13 + 76 + 25 + 38
    assert values["captioner_tokens_total", ("kind", "text")] == 5 * 8
    assert values["captioner_time_to_first_token_seconds_count", ("length", "short")] == 5
    stages = {stage: values["captioner_stage_seconds_count", ("stage", stage)] for stage in STAGES}
    assert stages == dict.fromkeys(STAGES, 5) | {"fetch": 1, "admit": 7, "receive": 7}


def test_log_lines(fake_service: RunningService) -> None:
    """Each request leaves one JSON line with its id, its stages and nothing of its audio, caption or key."""
    key = {"authorization": "Bearer sk-very-secret"}
    answer = ask_native(fake_service.url, data_url(wav(1.25)), headers=key)
    fake_service.settle()
    log = fake_service.log()
    lines = [json.loads(line) for line in log.splitlines()]
    mine = [line for line in lines if line.get("request_id") == answer.headers["x-request-id"]]
    assert len(mine) == 1
    assert (mine[0]["outcome"], mine[0]["audio_s"], mine[0]["dialect"]) == ("finished", 1.25, "dashscope")
    assert {"decode", "features", "generate"} <= mine[0]["stages_s"].keys()
    assert "sk-very-secret" not in log
    assert answer.text[:20] not in log
    assert "UklGR" not in log


def test_an_idle_connection_stays_open(fake_service: RunningService) -> None:
    """An idle connection stays open for longer than most servers allow, so that no request meets a closing one."""
    with httpx.Client(base_url=fake_service.url, limits=httpx.Limits(keepalive_expiry=60)) as client:
        client.get("/healthz")
        (connection,) = client._transport._pool.connections  # type: ignore[attr-defined]
        time.sleep(6)
        assert not connection.has_expired(), "the server has closed it"
        assert client.get("/healthz").status_code == 200
        assert client._transport._pool.connections == [connection]  # type: ignore[attr-defined]


def test_settings_come_from_flags_variables_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag wins over a variable, a variable over the file, the file over the default."""
    file = tmp_path / "captioner.toml"
    file.write_text('port = 1\naudio_workers = 2\nheartbeat_s = 3\nfetch_allow = ["10.0.0.0/8"]\n')
    monkeypatch.setenv("CAPTIONER_CONFIG", str(file))
    monkeypatch.setenv("CAPTIONER_PORT", "4")
    monkeypatch.setenv("CAPTIONER_AUDIO_WORKERS", "5")
    monkeypatch.setenv("CAPTIONER_HOST", "")
    settings = Settings.load(["--port", "6"])
    values = (settings.port, settings.audio_workers, settings.heartbeat_s, settings.fetch_allow, settings.host)
    assert values == (6, 5, 3, ("10.0.0.0/8",), "127.0.0.1")


def test_wrong_settings_are_reported(tmp_path: Path) -> None:
    """A setting out of range or unknown, or a missing file, ends the start with a sentence, not a traceback."""
    captioner = str(Path(sys.executable).with_name("captioner"))
    (tmp_path / "typo.toml").write_text("prot = 9000\n")
    for flags, message in (
        (["serve", "--port=70000"], "port: must be a whole number, 0 to 65535, not '70000'"),
        (["serve", "--prot=9000"], "--prot: not a setting (did you mean --port?)"),
        (["serve", f"--config={tmp_path}/none.toml"], "does not exist"),
        (["serve", f"--config={tmp_path}/typo.toml"], "prot"),
        (["serve", "--max-input-tokens=70000"], "leaves no room"),
        (["sevre"], "there is no command 'sevre'"),
    ):
        ended = subprocess.run([captioner, *flags], capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == 2, flags
        assert message in ended.stderr, (flags, ended.stderr)
        assert "Traceback" not in ended.stderr
