"""`captioner doctor` and the services that the settings name: hub, database, Redis; and the clock."""

from __future__ import annotations

import json
import socket
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from serving.cli.doctor.weights import hub_of, skew
from serving.config import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

CAPTIONER = "Qwen/Qwen3-Omni-30B-A3B-Captioner"
PASSWORD = "hunter2-is-a-password"  # noqa: S105


@contextmanager
def hub(status: int, date: str = "") -> Iterator[tuple[str, list[str | None]]]:
    """A hub that answers each request with this status, and its `Authorization` headers."""
    seen: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization"))
            self.send_response_only(status)
            self.send_header("Date", date or self.date_time_string())
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", seen
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "token", "message"),
    [
        (401, "hf_wrong_token_0001", "refused the token of HF_TOKEN (HTTP 401)"),
        (403, "", f"needs a token for {CAPTIONER} (HTTP 403)"),
        (404, "", f"has no model {CAPTIONER} (HTTP 404)"),
        (502, "", "answers HTTP 502"),
    ],
)
def test_a_hub_that_refuses(
    doctor: Any, monkeypatch: pytest.MonkeyPatch, status: int, token: str, message: str
) -> None:
    """A wrong token, a missing one, an unknown model and a broken hub differ; the token is sent and never printed."""
    with hub(status) as (address, seen):
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", token)
        code, found = doctor("--part=engine", f"--model={CAPTIONER}")
    assert code == 1
    ((level, text, _),) = found["hub"]
    assert (level, text) == ("error", f"Hugging Face ({address.removeprefix('http://')}) {message}")
    assert seen == [f"Bearer {token}" if token else None]
    assert not token or token not in json.dumps(found)
    assert found["clock"][0][0] == "ok"


def test_the_hub_is_the_one_that_vllm_uses(monkeypatch: pytest.MonkeyPatch, machine: None) -> None:
    """ModelScope by the variable and the values that vLLM reads; at Hugging Face the pinned revision is looked up."""
    plain, pinned = Settings(model=CAPTIONER), Settings(model=CAPTIONER, revision="refs/pr/1")
    assert hub_of(plain).url == f"https://huggingface.co/api/models/{CAPTIONER}"
    assert hub_of(pinned).url == f"https://huggingface.co/api/models/{CAPTIONER}/revision/refs%2Fpr%2F1"
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "yes")  # vLLM takes this for false
    assert hub_of(plain).name == "Hugging Face"
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "True")
    assert hub_of(pinned).url == f"https://www.modelscope.cn/api/v1/models/{CAPTIONER}"
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "https://www.modelscope.ai/")
    assert hub_of(plain).url == f"https://www.modelscope.ai/api/v1/models/{CAPTIONER}"


def test_modelscope_without_its_package(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable alone would end the start in vLLM's import."""
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(sys.modules, "modelscope", None)
    status, found = doctor("--part=engine", f"--model={CAPTIONER}")
    assert status == 1
    expected = ("error", "VLLM_USE_MODELSCOPE is set, and the package modelscope is not installed",
                "install modelscope, or use the cuda image, which has it")  # fmt: skip
    assert expected in found["weights"]


def test_engine_arguments_are_checked(doctor: Any) -> None:
    """The problem that the start would have is a finding, without the value."""
    status, found = doctor("--part=engine", '--engine-args={"kv_cache_dtpe": "hunter2-hunter2"}')
    assert status == 1
    message = "engine_args: kv_cache_dtpe: vLLM 0.32.0 has no such argument (did you mean kv_cache_dtype?)"
    assert ("error", message, "correct engine_args") in found["settings"]


def test_no_dns(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub, a database, a Redis and a receiver of traces whose names are not found are one finding each."""
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    monkeypatch.setenv("CAPTIONER_DATABASE_URL", f"postgresql://captioner:{PASSWORD}@database.invalid/captioner")
    monkeypatch.setenv("CAPTIONER_REDIS_URL", f"redis://:{PASSWORD}@redis.invalid:6379/0")
    status, found = doctor(f"--model={CAPTIONER}", "--otlp-endpoint=http://collector.invalid:4318")
    assert status == 1
    assert [(name, *found[name][0][:2]) for name in ("hub", "database", "redis", "traces")] == [
        ("hub", "error", "Hugging Face (hub.invalid) cannot be reached: its name is not found (DNS)"),
        ("database", "error", "database.invalid:5432/captioner cannot be used: host name not found"),
        ("redis", "error", "redis.invalid:6379 cannot be used: its name is not found (DNS)"),
        ("traces", "warning", "collector.invalid:4318 cannot be reached: its name is not found (DNS)"),
    ]
    assert PASSWORD not in json.dumps(found)


def test_nobody_listens(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database and a Redis that are not running are named by address and reason."""
    monkeypatch.setenv("CAPTIONER_DATABASE_URL", f"postgresql://captioner:{PASSWORD}@127.0.0.1:9/captioner")
    monkeypatch.setenv("CAPTIONER_REDIS_URL", f"redis://:{PASSWORD}@127.0.0.1:9/0")
    status, found = doctor("--part=frontend")
    assert status == 1
    reason = "cannot be used: connection refused: no server listens there"
    assert found["database"][0][:2] == ("error", f"127.0.0.1:9/captioner {reason}")
    assert found["redis"][0][:2] == ("error", f"127.0.0.1:9 {reason}")
    assert PASSWORD not in json.dumps(found)


@contextmanager
def server(*answers: bytes) -> Iterator[int]:
    """A server that sends one of these to each message of a client; its port."""

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client:
                for answer in answers:
                    if not client.recv(4096):
                        break
                    client.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def test_a_wrong_password(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database and a Redis that refuse the password are no network faults."""
    fields = b"SFATAL\0C28P01\0Mpassword authentication failed for user captioner\0\0"
    refusal = b"E" + (len(fields) + 4).to_bytes(4, "big") + fields
    wrong = b"-WRONGPASS invalid username-password pair or user is disabled.\r\n"
    with server(refusal) as database, server(wrong * 3, wrong, wrong) as redis:
        url = f"postgresql://captioner:{PASSWORD}@127.0.0.1:{database}/captioner?sslmode=disable&gssencmode=disable"
        monkeypatch.setenv("CAPTIONER_DATABASE_URL", url)
        monkeypatch.setenv("CAPTIONER_REDIS_URL", f"redis://:{PASSWORD}@127.0.0.1:{redis}/0")
        status, found = doctor("--part=frontend")
    assert status == 1
    message = f"127.0.0.1:{database}/captioner cannot be used: wrong user or password"
    assert found["database"][0][:2] == ("error", message)
    assert found["redis"][0][:2] == ("error", f"127.0.0.1:{redis} cannot be used: wrong user or password")
    assert PASSWORD not in json.dumps(found)


def test_a_wrong_clock(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub's date that is years away is an error; seconds are a warning."""
    with hub(200, "Thu, 01 Jan 2015 00:00:00 GMT") as (address, _):
        monkeypatch.setenv("HF_ENDPOINT", address)
        _, found = doctor("--part=engine", f"--model={CAPTIONER}")
    ((level, message, remedy),) = found["clock"]
    assert level == "error"
    assert message.startswith("this machine's clock differs by ")
    assert remedy.startswith("synchronize the clocks")
    assert [skew(seconds, "x").level for seconds in (0, 4.9, -5, 59, -60)] == [
        "ok",
        "ok",
        "warning",
        "warning",
        "error",
    ]
