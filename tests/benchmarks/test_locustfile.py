"""The load tests by Locust, against a server that can lie: a run with one wrong answer is wrong, not fast."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
CLIP_S = 2
AUDIO_TOKENS = 25
"""12.5 of a second, of clips that are a packet shorter than `CLIP_S`."""
TOO_MUCH_USAGE = 90


class Lying(ThreadingHTTPServer):
    """Answers at once in both dialects; `/FAULT` before the path names what is wrong with its answers."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.numbers = itertools.count()
        self.kept: dict[bytes, str] = {}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of callers that have hung up."""


class _Answers(BaseHTTPRequestHandler):
    server: Lying
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        fault = self.path.split("/")[1]
        body = self.rfile.read(int(self.headers["content-length"]))
        native = "aigc" in self.path
        stream = (self.headers.get("x-dashscope-sse") == "enable") if native else b'"stream": true' in body
        text = f"A bell rings {next(self.server.numbers)} times, and rain falls on a roof somewhere far away."
        if fault == "cached":
            time.sleep(0 if body in self.server.kept else 0.3)
            text = self.server.kept.setdefault(body, text)
        texts = {"empty": "", "same": "A bell rings, and rain falls on a roof.", "doubled": f"{text} {text}"}
        text = texts.get(fault, text)
        if fault == "refused":
            self._send(429, b"{}", "application/json")
            return
        name = "the-same" if fault == "same-id" else uuid4().hex
        of = {} if fault == "no-id" else {"request_id" if native else "id": name}
        answer = [of | event for event in (_native if native else _openai)(text, fault, stream=stream)]
        if fault == "changing-id":
            answer = [
                event | {name: f"{value}{number}" for name, value in of.items()} for number, event in enumerate(answer)
            ]
        if fault == "error-200":
            answer = [of | ({"code": "InternalError", "message": "x"} if native else {"error": {"message": "x"}})]
        if not stream:
            self._send(200, json.dumps(answer[0]).encode(), "application/json", fault)
            return
        frames = [f"data: {json.dumps(event)}\n\n".encode() for event in answer]
        frames += [] if native else [b"data: [DONE]\n\n"]
        if fault == "breaks-off":
            frames = frames[:1]
        if fault == "no-done":
            frames = frames[:-1]
        self._send(200, b"".join(frames), "text/event-stream", fault)

    def _send(self, status: int, body: bytes, kind: str, fault: str = "") -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        if fault == "x-cache":
            self.send_header("x-cache", "HIT")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _counts(text: str, fault: str) -> tuple[int, int, int, int]:
    """Audio, input, output and all tokens."""
    audio = TOO_MUCH_USAGE if fault == "bills-more" else AUDIO_TOKENS
    output = 1 if fault == "few-tokens" else max(1, len(text) // 4)
    return audio, audio + 8, output, audio + 8 + output + (fault == "bad-sum")


def _openai(text: str, fault: str, *, stream: bool) -> list[dict[str, Any]]:
    audio, asked, said, total = _counts(text, fault)
    details = {"audio_tokens": audio, "cached_tokens": 16 if fault == "cached-tokens" else 0}
    usage = {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": total, "prompt_tokens_details": details}
    reason = "length" if fault == "truncates" else "stop"
    if not stream:
        return [{"choices": [{"message": {"content": text}, "finish_reason": reason}], "usage": usage}]
    return [
        {"choices": [{"delta": {"content": text}, "finish_reason": None}]},
        {"choices": [{"delta": {}, "finish_reason": reason}]},
        {"choices": [], "usage": usage},
    ]


def _native(text: str, fault: str, *, stream: bool) -> list[dict[str, Any]]:
    audio, asked, said, total = _counts(text, fault)
    details = {"audio_tokens": audio, "text_tokens": 8}
    usage = {"input_tokens": asked, "output_tokens": said, "total_tokens": total, "input_tokens_details": details}
    reason = "length" if fault == "truncates" else "stop"

    def event(words: str, end: str) -> dict[str, Any]:
        content = [{"text": words}] if words else []
        return {"output": {"choices": [{"message": {"content": content}, "finish_reason": end}]}, "usage": usage}

    return [event(text, "null"), event("", reason)] if stream else [event(text, reason)]


@pytest.fixture(scope="module")
def lying() -> Iterator[str]:
    """URL of a server that lies as it is told."""
    server = Lying()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the sounds that clips are made of are kept."""
    return tmp_path_factory.mktemp("clips")


def run(host: str, clips: Path, journal: Path, *flags: str) -> tuple[int, list[dict[str, Any]], str]:
    """Two callers for a moment: exit status, journal, and what was printed."""
    command = [sys.executable, "-m", "locust", "--headless", "-f", str(ROOT / "benchmarks/locustfile.py")]
    command += ["--host", host, "--load=2", "--seconds=1.5", "--warm-up=0", f"--mix={CLIP_S}"]
    command += [f"--clips-dir={clips}", f"--journal={journal}", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=clips)
    told = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    return ended.returncode, told, ended.stdout + ended.stderr


def test_an_honest_server_passes_in_all_ways(lying: str, clips: Path, tmp_path: Path) -> None:
    """Both dialects, whole and streamed, become entries of their own, and every figure that a way has."""
    ways = "openai,openai-stream,dashscope,dashscope-stream"
    status, told, printed = run(f"{lying}/honest", clips, tmp_path / "journal", f"--ways={ways}")
    assert status == 0, printed
    assert {one["way"] for one in told} == set(ways.split(","))
    assert {one["outcome"] for one in told} == {"right"}
    assert all(("ttft_s" in one) == one["way"].endswith("-stream") for one in told)
    for entry in ("E2E", "TTFT", "audio"):
        assert f"\n{entry} " in printed


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("empty", "empty"),
        ("same", "repeated"),
        ("doubled", "repeated"),
        ("truncates", "cut"),
        ("breaks-off", "cut"),
        ("no-done", "cut"),
        ("cached", "cached"),
        ("x-cache", "cached"),
        ("cached-tokens", "cached"),
        ("bills-more", "usage"),
        ("bad-sum", "usage"),
        ("few-tokens", "usage"),
        ("same-id", "id"),
        ("changing-id", "id"),
        ("no-id", "id"),
        ("error-200", "failed"),
    ],
)
def test_a_planted_fault_makes_the_run_fail(lying: str, clips: Path, tmp_path: Path, fault: str, kind: str) -> None:
    """The exit status says that the run is wrong, and the journal which answers and why."""
    # Only OpenAI's dialect tells of cached tokens, and ends with a word of its own.
    ways = "openai-stream" if fault in ("cached-tokens", "no-done") else "openai-stream,dashscope-stream"
    flags = (f"--ways={ways}", f"--probe-share={int(fault == 'cached')}", "--seconds=1")
    status, told, printed = run(f"{lying}/{fault}", clips, tmp_path / "journal", *flags)
    assert status == 3, printed
    wrong = [one for one in told if one["outcome"] != "right"]
    assert {one["outcome"] for one in wrong} == {kind}
    assert all(one["detail"] for one in wrong)
    # Of those that are wrong only beside another one, the first is right.
    if fault not in ("same", "same-id", "cached"):
        assert {one["way"] for one in wrong} == set(ways.split(",")) == {one["way"] for one in told}


def test_a_run_without_a_right_answer_is_no_figure(lying: str, clips: Path, tmp_path: Path) -> None:
    """A server may refuse some when it is full, but not all."""
    status, told, printed = run(f"{lying}/refused", clips, tmp_path / "journal")
    assert status == 4, printed
    assert {one["outcome"] for one in told} == {"refused"}
