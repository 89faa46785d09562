"""A server whose answers a test prescribes, to try the client without a service."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class Answer:
    """One answer: status, body and headers. `cut`: bytes of the body that are sent; the header has its full length."""

    def __init__(self, status: int, body: str = "", *, cut: int | None = None, **headers: str) -> None:
        self.status, self.body, self.cut = status, body.encode(), cut
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def stream(*texts: str, end: bool = True, **last: Any) -> Answer:
    """Return a stream of the texts, with a keep-alive comment, and the last chunk's further members."""
    chunks: list[dict[str, Any]] = [
        {"choices": [{"delta": {"content": text}, "finish_reason": None}]} for text in texts
    ]
    if end:
        chunks.append({"choices": [{"delta": {"content": ""}, "finish_reason": "stop"}], **last})
        chunks.append({"choices": [], "usage": {"total_tokens": 3}})
    events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return Answer(200, ": keep-alive\n\n" + "".join(events) + ("data: [DONE]\n\n" if end else ""))


class ScriptedService:
    """A server on loopback that answers caption requests with `answers` in turn, the last one again. A context."""

    def __init__(self, *answers: Answer, models: tuple[str, ...] = (), ready: Answer | None = None) -> None:
        self.answers = list(answers)
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        listing = Answer(200, json.dumps({"data": [{"id": model} for model in models]}))
        fixed = {"/v1/models": listing, "/readyz": ready or Answer(200, '{"ready": true}')}
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(fixed.get(self.path, Answer(404)))

            def do_POST(self) -> None:
                service.headers.append({name.lower(): value for name, value in self.headers.items()})
                service.requests.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                answers = service.answers
                self._answer(answers.pop(0) if len(answers) > 1 else answers[0])

            def _answer(self, answer: Answer) -> None:
                self.close_connection = True
                self.send_response(answer.status)
                for name, value in ({"content-length": str(len(answer.body))} | answer.headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer.body[: answer.cut])

            def log_message(self, *_: Any) -> None:
                """Log nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()
