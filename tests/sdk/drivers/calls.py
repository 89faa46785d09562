"""Calls of a test and outcomes of a client: the one format of all drivers.

A driver is a process in a client's own environment. It reads one `Call` as a line of JSON, performs it with the real
client, and writes one `Outcome` as a line of JSON. Standard library only: this runs in every environment.
"""

from __future__ import annotations

import base64
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

MODEL = "qwen3-omni-30b-a3b-captioner"


@dataclass(frozen=True)
class Call:
    """One use of a client. Streams are `default` (no instruction about increments), `delta` or `cumulative`."""

    origin: str
    api_key: str = "sk-test"
    action: str = "caption"
    audio: str = ""
    inline_file: str = ""
    """A file to send as a data URL, instead of `audio`."""
    stream: str = ""
    model: str = MODEL
    asynchronous: bool = False
    protocol: str = ""
    """Protocol of `dashscope.Client`: `native` or `openai`."""
    parameters: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    leave_after: int | None = None
    """Number of pieces after which to break off."""
    retries: int = 0
    timeout_s: float = 60

    @property
    def reference(self) -> str:
        """The audio reference of the request."""
        if not self.inline_file:
            return self.audio
        return f"data:;base64,{base64.b64encode(Path(self.inline_file).read_bytes()).decode()}"


@dataclass(frozen=True)
class Piece:
    """One chunk as the client yielded it, and the time (the machine's monotonic clock, in seconds)."""

    text: str
    finish_reason: str | None
    at_s: float


@dataclass
class Outcome:
    """The client's results. `error` is the class of the exception, if one was raised."""

    pieces: list[Piece] = field(default_factory=list)
    usage: dict[str, Any] | None = None
    request_id: str | None = None
    status: int | None = None
    code: str | None = None
    message: str | None = None
    error: str | None = None
    models: list[str] = field(default_factory=list)
    elapsed_s: float = 0.0

    def add(self, text: str | None, finish_reason: str | None) -> None:
        """Record a piece that the client has just yielded."""
        self.pieces.append(Piece(text or "", finish_reason, time.monotonic()))

    def left(self, call: Call) -> bool:
        """Return `True` if the driver must break off now."""
        return call.leave_after is not None and len(self.pieces) >= call.leave_after

    @property
    def text(self) -> str:
        """All pieces of a response that is not streamed, or of a stream of deltas."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def tokens(self) -> tuple[int, int, int]:
        """Input, output and total tokens, under either dialect's names."""
        usage = self.usage or {}
        # Some clients have both names, and leave one empty.
        read, written = usage.get("input_tokens"), usage.get("output_tokens")
        return read or usage["prompt_tokens"], written or usage["completion_tokens"], usage["total_tokens"]

    @property
    def finish_reason(self) -> str | None:
        """The last finish reason that the client reported."""
        return next((piece.finish_reason for piece in reversed(self.pieces) if piece.finish_reason), None)


def perform_calls(perform: Callable[[Call, Outcome], None]) -> None:
    """Serve calls from standard input until it ends. All other prints go to standard error."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        call, outcome, began = Call(**json.loads(line)), Outcome(), time.monotonic()
        try:
            perform(call, outcome)
        except Exception as error:  # noqa: BLE001
            reported = vars(error) | {
                name: getattr(error, name, None) for name in ("status_code", "code", "request_id")
            }
            outcome.error = type(error).__name__
            outcome.status, outcome.code, outcome.request_id = (
                reported["status_code"],
                reported["code"],
                reported["request_id"],
            )
            outcome.message = str(reported.get("message") or error)
        outcome.elapsed_s = time.monotonic() - began
        answers.write(json.dumps(asdict(outcome)) + "\n")
        answers.flush()
