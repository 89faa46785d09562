"""The load tests by Locust, against a server that can lie: a run with one wrong answer is wrong, not fast."""

from __future__ import annotations

import itertools
import json
import os
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
        self.asked: list[tuple[str, str, Any]] = []
        """Path, key and body of each request."""
        self.one_at_a_time = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of callers that have hung up."""


class _Answers(BaseHTTPRequestHandler):
    server: Lying
    protocol_version = "HTTP/1.1"
    answered = 0
    """On this connection."""

    def do_POST(self) -> None:
        fault = self.path.split("/")[1]
        body = self.rfile.read(int(self.headers["content-length"]))
        native = "aigc" in self.path
        self.server.asked.append((self.path, self.headers.get("authorization", ""), json.loads(body)))
        stream = (self.headers.get("x-dashscope-sse") == "enable") if native else b'"stream": true' in body
        text = f"A bell rings {next(self.server.numbers)} times, and rain falls on a roof somewhere far away."
        if fault == "cached":
            time.sleep(0 if body in self.server.kept else 0.3)
            text = self.server.kept.setdefault(body, text)
        texts = {"empty": "", "same": "A bell rings, and rain falls on a roof.", "doubled": f"{text} {text}"}
        text = texts.get(fault, text)
        self.answered += 1
        if fault == "same-on-each-connection":
            text = f"A bell rings {self.answered} times, and rain falls on a roof somewhere far away."
        if fault == "slow":
            with self.server.one_at_a_time:
                time.sleep(0.7)
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
def liar() -> Iterator[Lying]:
    """Serve lies, each as it is told."""
    server = Lying()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def lying(liar: Lying) -> str:
    """URL of a server that lies."""
    liar.asked.clear()
    return f"http://127.0.0.1:{liar.server_port}"


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the sounds that clips are made of are kept."""
    return tmp_path_factory.mktemp("clips")


def command(host: str, clips: Path, journal: Path, *flags: str) -> list[str]:
    """How two callers ask for a moment."""
    locust = [sys.executable, "-m", "locust", "--headless", "-f", str(ROOT / "benchmarks/locustfile.py")]
    own = ["--host", host, "--load=2", "--seconds=1.5", "--warm-up=0", f"--mix={CLIP_S}"]
    return [*locust, *own, f"--clips-dir={clips}", f"--journal={journal}", *flags]


def run(host: str, clips: Path, journal: Path, *flags: str, keys: str = "") -> tuple[int, list[dict[str, Any]], str]:
    """Exit status, journal, and what was printed."""
    ended = subprocess.run(
        command(host, clips, journal, *flags),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=clips,
        env=os.environ | {"BENCHMARK_KEYS": keys},
    )
    return ended.returncode, read(journal), ended.stdout + ended.stderr


def read(journal: Path) -> list[dict[str, Any]]:
    """The lines of a journal."""
    return [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []


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


def test_latency_counts_from_when_a_request_was_due(lying: str, clips: Path, tmp_path: Path) -> None:
    """An open loop goes on asking at its rate while a server is slow, and what waits for it is late by that."""
    flags = ("--arrivals=even", "--load=4", "--user-rate=1", "--seconds=3")
    status, told, printed = run(f"{lying}/slow", clips, tmp_path / "journal", *flags)
    assert status == 0, printed
    assert len(told) >= 9
    assert all(one["e2e_s"] == pytest.approx(one["ended"] - one["due"], abs=0.2) for one in told)
    # One after another takes it 0.7 s for each, and it gets a request every quarter second.
    assert max(one["e2e_s"] for one in told) > 2.5
    assert max(one["due"] for one in told) - min(one["due"] for one in told) < 4


def test_workers_share_no_clip(liar: Lying, lying: str, clips: Path, tmp_path: Path) -> None:
    """Each worker process has clips of its own; together they are one run with one journal."""
    status, told, printed = run(f"{lying}/honest", clips, tmp_path / "journal", "--processes=2", "--probe-share=0")
    assert status == 0, printed
    sent = [str(body["messages"]) for _, _, body in liar.asked]
    assert len(sent) == len(set(sent)) == len(told) == len({one["clip"] for one in told})
    assert len({one["clip"] // 1_000_000 for one in told}) == 2


def test_repeats_over_workers_are_noticed(lying: str, clips: Path, tmp_path: Path) -> None:
    """What no worker can see by itself the master does, and the run fails."""
    flags = ("--processes=2", "--probe-share=0", "--seconds=2")
    status, told, printed = run(f"{lying}/same-on-each-connection", clips, tmp_path / "journal", *flags)
    assert status == 3, printed
    wrong = [one for one in told if one["outcome"] != "right"]
    assert {(one["outcome"], one["way"]) for one in wrong} == {("repeated", "all workers")}


def test_configuration_reaches_the_wire(liar: Lying, lying: str, clips: Path, tmp_path: Path) -> None:
    """Another API needs a key, a model's name, and where it has each dialect, be it on other hosts."""
    flags = (
        "--ways=openai-stream,dashscope",
        "--model=another-captioner",
        f"--openai-base-url={lying}/honest/openai/v9",
        "--dashscope-base-url=/native/v9",
    )
    status, told, printed = run(f"{lying}/honest/else", clips, tmp_path / "journal", *flags, keys="sk-a=3,sk-b")
    assert status == 0, printed
    paths = {
        "/honest/openai/v9/chat/completions",
        "/honest/else/native/v9/services/aigc/multimodal-generation/generation",
    }
    assert {path for path, _, _ in liar.asked} == paths
    assert {key for _, key, _ in liar.asked} == {"Bearer sk-a", "Bearer sk-b"}
    assert {body["model"] for _, _, body in liar.asked} == {"another-captioner"}
    tenants = [one["tenant"] for one in told]
    assert tenants.count(0) > tenants.count(1) > 0


CURVE_S = 10
BEFORE_AND_AFTER = {
    "constant": ("poisson", (0.1, 0.5), (0.5, 0.9), 0.5, 1.7),
    "ramp": ("even", (0.0, 0.4), (0.6, 1.0), 0, 0.6),
    "steps": ("poisson", (0.0, 0.4), (0.6, 1.0), 0, 0.6),
    "spike": ("even", (0.0, 0.3), (0.5, 0.6), 0, 0.5),
    "bursts": ("even", (0.65, 0.8), (0.45, 0.6), 0, 0.6),
    "diurnal": ("even", (0.0, 0.2), (0.4, 0.6), 0, 0.6),
}
"""For each curve arrivals, two parts of the run, and between which bounds the first's rate is, in the second's."""


def test_load_follows_its_curve(lying: str, clips: Path, tmp_path: Path) -> None:
    """Requests are due as often as the curve says, be they even or by chance."""
    flags = ("--load=12", "--user-rate=2", f"--seconds={CURVE_S}", "--levels=4,16", "--burst-s=2")
    began = {}
    for curve, (arrivals, *_) in BEFORE_AND_AFTER.items():
        with (tmp_path / f"{curve}.log").open("w") as log:
            asked = command(
                f"{lying}/honest", clips, tmp_path / curve, *flags, f"--curve={curve}", f"--arrivals={arrivals}"
            )
            began[curve] = subprocess.Popen(asked, stdout=log, stderr=log, cwd=clips)
    for curve, (_, first, second, low, high) in BEFORE_AND_AFTER.items():
        assert began[curve].wait(300) == 0, (tmp_path / f"{curve}.log").read_text()
        due = [one["due"] for one in read(tmp_path / curve)]
        at = [(moment - min(due)) / CURVE_S for moment in due]
        rates = [sum(start <= of < end for of in at) / (end - start) for start, end in (first, second)]
        assert low <= rates[0] / rates[1] <= high, curve
