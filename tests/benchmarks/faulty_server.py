"""A server of captions with planted faults, in both dialects."""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from uuid import uuid4

AUDIO_TOKENS = 25
"""12.5 of a second, of clips that are a packet shorter than `CLIP_S`."""
TOO_MUCH_USAGE = 90
THROTTLING = {"code": "Throttling", "message": "x"}
INTERNAL_ERROR = {"code": "InternalError", "message": "x"}


class FaultyServer(ThreadingHTTPServer):
    """Answers at once in both dialects; `/FAULT` before the path names the fault of its answers."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.numbers = itertools.count()
        self.kept: dict[bytes, str] = {}
        self.requests: list[tuple[str, str, Any]] = []
        """Path, key and body of each request."""
        self.one_at_a_time = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore callers that have disconnected."""


class _Answers(BaseHTTPRequestHandler):
    server: FaultyServer
    protocol_version = "HTTP/1.1"
    answered = 0
    """Requests on this connection."""

    def do_POST(self) -> None:
        fault = self.path.split("/")[1]
        body = self.rfile.read(int(self.headers["content-length"]))
        native = "aigc" in self.path
        self.server.requests.append((self.path, self.headers.get("authorization", ""), json.loads(body)))
        self.answered += 1
        if not self._fails(fault, native=native):
            stream = (self.headers.get("x-dashscope-sse") == "enable") if native else b'"stream": true' in body
            self._answer(self._text(fault, body), fault, native=native, stream=stream)

    def _fails(self, fault: str, *, native: bool) -> bool:
        """Send what is no answer at all; return whether the fault is such a one."""
        if fault in ("closes", "breaks"):
            if fault == "breaks":
                self.send_response(200)
                self.send_header("content-length", "1000")
                self.end_headers()
                self.wfile.write(b"data: {")
            self.close_connection = True
        elif fault == "proxy":
            self._send(502, b"<html>Bad Gateway</html>", "text/html")
        elif fault == "busy":
            error = {"request_id": "r"} | (THROTTLING if native else {"error": THROTTLING})
            self._send(503, json.dumps(error).encode(), "application/json")
        elif fault == "refused":
            self._send(429, b"{}", "application/json")
        else:
            return False
        return True

    def _text(self, fault: str, body: bytes) -> str:
        """Return the caption, after the time that it takes."""
        text = f"A bell rings {next(self.server.numbers)} times, and rain falls on a roof somewhere far away."
        if fault == "cached":
            time.sleep(0 if body in self.server.kept else 0.3)
            text = self.server.kept.setdefault(body, text)
        if fault == "slow":
            with self.server.one_at_a_time:
                time.sleep(0.7)
        texts = {
            "empty": "",
            "same": "A bell rings, and rain falls on a roof.",
            "doubled": f"{text} {text}",
            "by-clip": f"A bell rings {hashlib.sha256(body).hexdigest()[:6]} times, and rain falls on a roof far away.",
            "same-on-each-connection": f"A bell rings {self.answered} times, and rain falls on a roof far away.",
        }
        return texts.get(fault, text)

    def _answer(self, text: str, fault: str, *, native: bool, stream: bool) -> None:
        name = "the-same" if fault == "same-id" else uuid4().hex
        of = {} if fault == "no-id" else {"request_id" if native else "id": name}
        answer = [of | event for event in (_native if native else _openai)(text, fault, stream=stream)]
        error = INTERNAL_ERROR if native else {"error": INTERNAL_ERROR}
        if fault == "changing-id":
            answer = [
                event | {name: f"{value}{number}" for name, value in of.items()} for number, event in enumerate(answer)
            ]
        if fault == "error-200":
            answer = [of | error]
        if not stream:
            self._send(200, json.dumps(answer[0]).encode(), "application/json", fault)
            return
        frames = [f"data: {json.dumps(event)}\n\n".encode() for event in answer]
        frames += [] if native else [b"data: [DONE]\n\n"]
        if fault in ("breaks-off", "error-in-stream"):
            frames = frames[:1]
        if fault == "error-in-stream":
            frames.append(f"data: {json.dumps(error)}\n\n".encode())
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
        """Log nothing."""


def _counts(text: str, fault: str) -> tuple[int, int, int, int]:
    """Return the numbers of audio, input, output and all tokens."""
    audio = TOO_MUCH_USAGE if fault == "bills-more" else AUDIO_TOKENS
    output = 1 if fault == "few-tokens" else max(1, len(text) // 4)
    return audio, audio + 8, output, audio + 8 + output + (fault == "bad-sum")


def _openai(text: str, fault: str, *, stream: bool) -> list[dict[str, Any]]:
    audio, prompt, completion, total = _counts(text, fault)
    details = {"audio_tokens": audio, "cached_tokens": 16 if fault == "cached-tokens" else 0}
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": total,
        "prompt_tokens_details": details,
    }
    reason = "length" if fault == "truncates" else "stop"
    if not stream:
        return [{"choices": [{"message": {"content": text}, "finish_reason": reason}], "usage": usage}]
    return [
        {"choices": [{"delta": {"content": text}, "finish_reason": None}]},
        {"choices": [{"delta": {}, "finish_reason": reason}]},
        {"choices": [], "usage": usage},
    ]


def _native(text: str, fault: str, *, stream: bool) -> list[dict[str, Any]]:
    audio, prompt, completion, total = _counts(text, fault)
    details = {"audio_tokens": audio, "text_tokens": 8}
    usage = {
        "input_tokens": prompt,
        "output_tokens": completion,
        "total_tokens": total,
        "input_tokens_details": details,
    }
    reason = "length" if fault == "truncates" else "stop"

    def event(words: str, end: str) -> dict[str, Any]:
        content = [{"text": words}] if words else []
        return {"output": {"choices": [{"message": {"content": content}, "finish_reason": end}]}, "usage": usage}

    return [event(text, "null"), event("", reason)] if stream else [event(text, reason)]
