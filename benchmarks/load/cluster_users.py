"""Locust users that ask for captions in both dialects, whole and streamed, and judge every answer.

    locust --headless -f benchmarks/cluster_users.py --host http://127.0.0.1:8000 …

The file that `OUTCOMES` names gets two lines of JSON per request: `{"sent": number, …}` before it, and afterwards how
it ended. Every request that was sent has exactly one ending:

    answered   200, all of the text, the right usage, the end of the stream
    told       an error in the caller's dialect: a status, or the last event of a stream that had begun
    proxied    an error from the proxy in front, in no dialect
    lost       the connection was refused, reset, or closed in the middle of a message
    abandoned  the caller was stopped while it asked, at the end of the run
    defect     anything else: an answer that looks right and is not, a stream cut off cleanly, two request ids
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import time
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import requests
from locust import HttpUser, between

MODEL = "qwen3-omni-30b-a3b-captioner"
NATIVE = "/api/v1/services/aigc/multimodal-generation/generation"
COMPATIBLE = "/compatible-mode/v1/chat/completions"
CLIPS_S = (0.3, 0.45, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0)
"""The shortest fit into one buffer of HAProxy's with their request, the others do not."""

WAYS = (("native", False), ("native", True), ("compatible", False), ("compatible", True))
"""Dialect, and whether streamed."""

TOKENS = int(os.environ.get("FAKE_TOKENS", "24"))
"""Of every caption."""


@dataclass(frozen=True)
class Ending:
    """How a request ended."""

    outcome: str
    detail: str = ""
    text: str = ""
    audio_tokens: int = 0


def clip(number: int) -> str:
    """One of the clips as a data URL: noise, 16 kHz mono WAV."""
    samples = np.random.default_rng(number).integers(-8000, 8000, round(16_000 * CLIPS_S[number]), np.int16)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(samples.tobytes())
    return f"data:;base64,{base64.b64encode(buffer.getvalue()).decode()}"


CLIPS = [clip(number) for number in range(len(CLIPS_S))]
_numbers = itertools.count()
_journal = Path(os.environ.get("OUTCOMES", os.devnull)).open("a", buffering=1)  # noqa: SIM115 - as long as the process


def body_of(dialect: str, audio: str, *, stream: bool) -> dict[str, Any]:
    """A request."""
    if dialect == "native":
        return {"model": MODEL, "input": {"messages": [{"role": "user", "content": [{"audio": audio}]}]}}
    part = {"type": "input_audio", "input_audio": {"data": audio}}
    streamed = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    return {"model": MODEL, "messages": [{"role": "user", "content": [part]}], **streamed}


def judge(dialect: str, response: requests.Response, body: str, *, stream: bool) -> Ending:
    """What a message that arrived in full amounts to."""
    request_id = response.headers.get("x-request-id", "")
    try:
        if response.status_code != 200:
            return _refusal(dialect, response.status_code, json.loads(body))
        if len(request_id) != 36:
            return Ending("defect", f"request id {request_id!r}")
        ending = _streamed(dialect, body) if stream else _whole(dialect, json.loads(body))
    except (ValueError, KeyError, IndexError, TypeError) as error:
        return Ending(
            "proxied" if response.status_code >= 500 else "defect", f"{response.status_code} {error!r}: {body[-200:]!r}"
        )
    return ending


def _refusal(dialect: str, status: int, body: dict[str, Any]) -> Ending:
    error = body if dialect == "native" else body["error"]
    if not (body["request_id"] and error["message"] and error["code"]):
        return Ending("defect", f"{status} {body}")
    return Ending("told" if status in (429, 500, 502, 503) else "defect", f"{status} {error['code']}")


def _whole(dialect: str, body: dict[str, Any]) -> Ending:
    if dialect == "native":
        choice = body["output"]["choices"][0]
        return _caption(dialect, choice["message"]["content"][0]["text"], choice["finish_reason"], body["usage"])
    choice = body["choices"][0]
    return _caption(dialect, choice["message"]["content"], choice["finish_reason"], body["usage"])


def _streamed(dialect: str, body: str) -> Ending:
    payloads = [line.removeprefix("data:").strip() for line in body.splitlines() if line.startswith("data:")]
    done = bool(payloads) and payloads[-1] == "[DONE]"
    events = [json.loads(payload) for payload in payloads if payload != "[DONE]"]
    if not events:
        return Ending("defect", "an empty stream")
    last = events[-1]
    if dialect == "native":
        if "code" in last:
            return Ending("told", f"in the stream: {last['code']}")
        choice = last["output"]["choices"][0]
        return _caption(dialect, choice["message"]["content"][0]["text"], choice["finish_reason"], last["usage"])
    if "error" in last:
        return Ending("told", f"in the stream: {last['error']['code']}")
    choices = [choice for event in events for choice in event["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    return _caption(dialect, text, choices[-1]["finish_reason"] if done else None, last["usage"])


def _caption(dialect: str, text: str, finish_reason: str | None, usage: dict[str, Any] | None) -> Ending:
    """A word is a token of the fake engine: text that is doubled, cut or another's shows."""
    prefix, suffix = ("input", "output") if dialect == "native" else ("prompt", "completion")
    if usage is None or finish_reason != "stop":
        return Ending("defect", f"finish reason {finish_reason}, usage {usage}")
    audio_tokens, tokens = usage[f"{prefix}_tokens_details"]["audio_tokens"], usage[f"{suffix}_tokens"]
    if not tokens == len(text.split()) == TOKENS or usage["total_tokens"] != usage[f"{prefix}_tokens"] + tokens:
        return Ending("defect", f"{len(text.split())} words, usage {usage}")
    return Ending("answered", text=text, audio_tokens=audio_tokens)


class Caller(HttpUser):  # type: ignore[misc]
    """Asks for one caption after another, in every way in turn. Every other caller opens a connection for each."""

    wait_time = between(0.05, float(os.environ.get("MAX_PAUSE_S", "0.6")))
    connection = itertools.cycle(("keep-alive", "close"))

    def on_start(self) -> None:
        """Choose how to connect."""
        self.headers = {"connection": next(self.connection)}

    def ask(self) -> None:
        """Ask for one caption, and write down how that ended."""
        number = next(_numbers)
        dialect, stream = WAYS[number % len(WAYS)]
        place = number // len(WAYS) % len(CLIPS)
        kind = f"{dialect} {'stream' if stream else 'whole'}"
        headers = self.headers | ({"x-dashscope-sse": "enable"} if dialect == "native" and stream else {})
        body = body_of(dialect, CLIPS[place], stream=stream)
        began = time.time()
        _note(sent=number, at=began, kind=kind)
        request_id, ending = "", Ending("abandoned")
        try:
            request_id, ending = self._send(dialect, body, headers, stream=stream)
        finally:  # locust may have stopped this caller
            _note(
                ended=number,
                at=time.time(),
                seconds=round(time.time() - began, 3),
                kind=kind,
                clip=place,
                request_id=request_id,
                outcome=ending.outcome,
                detail=ending.detail,
                text=ending.text,
                audio_tokens=ending.audio_tokens,
            )

    def _send(self, dialect: str, body: dict[str, Any], headers: dict[str, str], *, stream: bool) -> tuple[str, Ending]:
        """Send a request; return the id and the ending of its answer."""
        request_id, received = "", b""
        with self.client.post(
            NATIVE if dialect == "native" else COMPATIBLE,
            json=body,
            headers=headers,
            stream=True,
            catch_response=True,
            name=f"{dialect} {'stream' if stream else 'whole'}",
            timeout=150,
        ) as response:
            if response.status_code:
                request_id = response.headers.get("x-request-id", "")
                try:
                    for piece in response.iter_content(None):
                        received += piece
                except requests.RequestException as error:
                    ending = Ending("lost", f"after {len(received)} bytes: {type(error).__name__} {error}"[:200])
                else:
                    ending = judge(dialect, response, received.decode(), stream=stream)
            else:
                ending = Ending("lost", f"no status: {response.error}"[:200])
            if ending.outcome == "answered":
                response.success()
            else:
                response.failure(f"{ending.outcome}: {ending.detail}"[:100])
        return request_id, ending

    tasks = (ask,)


def _note(**values: Any) -> None:
    _journal.write(json.dumps(values) + "\n")
