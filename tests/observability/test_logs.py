"""Logs: one line per request, the request's id in every line about it, and no secret or audio in any."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING

import httpx
import psutil
import pytest

from serving.observability.context import REQUEST_ID
from serving.observability.logging import JsonFormatter, TextFormatter
from serving.observability.redaction import redact
from serving.observability.request_record import STAGES
from tests.support.service import RunningService
from tests.support.wire import COMPATIBLE, NATIVE, ask_native, compatible_body, data_url, native_body, wav

if TYPE_CHECKING:
    from tests.support.media import MediaServer

AUDIO = data_url(wav(0.2), "audio/wav")

SECRETS = [
    "sk-0123456789abcdefghijklmnopqrstuv",
    "Bearer abc.def.ghi",
    "bearer sk-live_XYZ-123",
    "https://user:hunter2@bucket.example/clip.mp3",
    "postgresql+psycopg://ledger:s3cr3t@db/ledger",
    "redis://:s3cr3t@cache:6379/0",
    "https://bucket.example/clip.mp3?Expires=1&OSSAccessKeyId=LTAI5&Signature=vjbyPxybdZaNmGa%2ByT272YEAiv4%3D",
    "https://s3.example/a?X-Amz-Credential=AKIA%2F1&X-Amz-Signature=deadbeef",
    AUDIO,
    AUDIO.partition(",")[2],
]
TELLTALE = ["0123456789ab", "abc.def", "XYZ-123", "hunter2", "s3cr3t", "LTAI5", "vjbyPx", "AKIA", "deadbeef", "UklGR"]


@pytest.mark.parametrize("secret", SECRETS, ids=[str(number) for number in range(len(SECRETS))])
@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()], ids=["json", "text"])
def test_secrets_are_redacted(secret: str, formatter: logging.Formatter) -> None:
    """Keys, passwords, signatures and audio are redacted in messages, extra fields and tracebacks."""
    record = logging.makeLogRecord({"msg": "refused %s", "args": (secret,), "url": secret, "nested": {"a": [secret]}})
    try:
        raise ValueError(f"what about '{secret}'?")  # noqa: TRY301 - it is to have a traceback
    except ValueError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    line = formatter.format(record)
    assert not [word for word in TELLTALE if word in line.split("raise ValueError")[0] + line.rpartition("about")[2]]
    assert "[redacted]" in line
    if isinstance(formatter, JsonFormatter):
        assert json.loads(line)["nested"]


@pytest.mark.parametrize(
    "text",
    [
        "request 0af7651916cd43dd-8448 ended after 0.25 s",
        "https://media.example:8443/a/b.mp3?page=2",
        "postgresql://db.example/ledger",
        "task-scheduler and disk-usage",
    ],
)
def test_other_text_is_unchanged(text: str) -> None:
    """Text without a secret is unchanged."""
    assert redact(text) == text


def test_lines_have_the_request_id() -> None:
    """A line written while a request is under way has its id, in both formats."""
    record = logging.makeLogRecord({"msg": "something", "count": 3})
    assert "request_id" not in JsonFormatter().format(record)
    token = REQUEST_ID.set("id-1")
    try:
        assert json.loads(JsonFormatter().format(record))["request_id"] == "id-1"
        assert "request_id=id-1" in TextFormatter().format(record)
        own = logging.makeLogRecord({"msg": "of another", "request_id": "id-2"})
        assert json.loads(JsonFormatter().format(own))["request_id"] == "id-2"
    finally:
        REQUEST_ID.reset(token)


def test_each_request_is_one_line(media: MediaServer) -> None:
    """A request, finished or refused, is one line; its stages add up to no more than its duration."""
    media.files["clip.wav?signature=of-the-url"] = wav(1)
    secret = {"authorization": "Bearer sk-very-secret-key-of-mine"}
    with RunningService("--engine=fake", "--audio-workers=1", "--fetch-allow=127.0.0.0/8") as service:
        finished = ask_native(service.url, media.url("clip.wav?signature=of-the-url"), headers=secret)
        refused = httpx.post(service.url + COMPATIBLE, json=compatible_body("file:///etc/shadow"), headers=secret)
        service.settle()
        log = service.log()
    lines = [json.loads(line) for line in log.splitlines()]
    for headers, outcome in ((finished.headers, "finished"), (refused.headers, "rejected")):
        (line,) = [line for line in lines if line.get("request_id") == headers["x-request-id"]]
        assert line["outcome"] == outcome
        assert line["stages_s"].keys() <= set(STAGES)
        within = sum(seconds for stage, seconds in line["stages_s"].items() if stage != "encode")
        assert within <= line["duration_s"] + 0.001
    for word in ("very-secret", "of-the-url", "UklGR", finished.text[:20]):
        assert word not in log, word


async def test_the_line_of_a_dead_worker_names_its_request() -> None:
    """The line about a worker that died with a clip has the id of its request, which another worker finishes."""
    with RunningService("--engine=fake", "--audio-workers=1") as service:
        children = psutil.Process(service.process.pid).children()
        (worker,) = (child for child in children if "serving.audio.worker" in child.cmdline())
        worker.suspend()
        async with httpx.AsyncClient(timeout=60) as client:
            asking = asyncio.create_task(client.post(service.url + NATIVE, json=native_body(data_url(wav(1)))))
            async with asyncio.timeout(30):
                while not await asyncio.to_thread(service.metric, "captioner_audio_workers_busy"):  # noqa: ASYNC110 - of another process
                    await asyncio.sleep(0.05)
            before = await asyncio.to_thread(service.metric, "captioner_cpu_seconds_total", part="audio")
            worker.kill()
            answer = await asking
        assert answer.status_code == 200
        lines = [json.loads(line) for line in service.log().splitlines()]
        (died,) = [line for line in lines if line["message"] == "audio worker died"]
        assert died["request_id"] == answer.headers["x-request-id"] == answer.json()["request_id"]
        # The CPU time of the dead worker and that of its successor both count.
        assert service.metric("captioner_audio_worker_deaths_total") == 1
        assert service.metric("captioner_cpu_seconds_total", part="audio") >= before > 0
        assert service.metric("captioner_requests_total", outcome="finished") == 1
