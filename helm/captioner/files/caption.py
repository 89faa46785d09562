"""`helm test`: send a real clip in both dialects, streamed and not streamed, and check the captions.

    python caption.py ORIGIN TIMEOUT_S [embedded]

Uses the first of the API keys in CAPTIONER_TEST_KEYS. Standard library only.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ORIGIN, TIMEOUT_S = sys.argv[1].rstrip("/"), float(sys.argv[2])
EMBEDDED = "embedded" in sys.argv[3:]
KEY = os.environ.get("CAPTIONER_TEST_KEYS", "").replace(",", " ").split()
NATIVE = "/api/v1/services/aigc/multimodal-generation/generation"


def clip() -> str:
    """Return five seconds of dialled keys and a woman who speaks, as a data URL."""
    package = importlib.util.find_spec("serving")
    if package is None or not package.submodule_search_locations:
        sys.exit("the package `serving` is missing from this image, so there is no sample to send")
    sample = Path(package.submodule_search_locations[0], "embedded", "sample.mp3").read_bytes()
    return "data:audio/mpeg;base64," + base64.b64encode(sample).decode()


def request_text(path: str, body: dict[str, Any] | None = None, **headers: str) -> str:
    """Return the body of a response. Retry 503 and refused connections until `TIMEOUT_S` has passed."""
    headers |= {"content-type": "application/json"} | ({"authorization": f"Bearer {KEY[0]}"} if KEY else {})
    data = None if body is None else json.dumps(body).encode()
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            request = urllib.request.Request(ORIGIN + path, data, headers)  # noqa: S310 - the origin is the chart's
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:  # noqa: S310
                return str(response.read().decode())
        except urllib.error.HTTPError as error:
            reply = error.read().decode(errors="replace")
            if error.code != 503 or time.monotonic() > deadline:
                sys.exit(f"{path}: {error.code} {reply}")
        except OSError as error:
            if time.monotonic() > deadline:
                sys.exit(f"{path}: {error}")
        time.sleep(2)


def events(stream: str) -> list[dict[str, Any]]:
    """Return the data of a stream's SSE events."""
    lines = [line.removeprefix("data:").strip() for line in stream.splitlines() if line.startswith("data:")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def check(name: str, text: str, finish_reason: str, audio_tokens: int) -> None:
    """Exit with an error unless this is a complete caption of the clip."""
    wrong = []
    if len(text.split()) < 5:
        wrong.append("too short for a caption")
    if finish_reason not in {"stop", "length"}:
        wrong.append(f"finish reason {finish_reason!r}")
    if audio_tokens != 70:  # 5.5 s at 12.5 a second
        wrong.append(f"{audio_tokens} audio tokens instead of 70")
    if EMBEDDED and "speaking" not in text:
        wrong.append("the voice is missing")
    print(f"{name}: {text!r}", flush=True)
    if wrong:
        sys.exit(f"{name}: {'; '.join(wrong)}")


def main() -> None:
    """Request four captions and check each."""
    if not ORIGIN:
        sys.exit("test.url is required with incremental upgrades: set it to the Gateway's address, as http://ADDRESS")
    model = json.loads(request_text("/v1/models"))["data"][0]["id"]
    audio = clip()
    chat = {
        "model": model,
        "temperature": 0,
        "messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": audio}}]}],
    }
    native = {
        "model": model,
        "parameters": {"temperature": 0},
        "input": {"messages": [{"role": "user", "content": [{"audio": audio}]}]},
    }

    answer = json.loads(request_text("/v1/chat/completions", chat))
    choice, usage = answer["choices"][0], answer["usage"]
    tokens = usage["prompt_tokens_details"]["audio_tokens"]
    check("OpenAI", choice["message"]["content"], choice["finish_reason"], tokens)

    *chunks, last = events(
        request_text("/v1/chat/completions", chat | {"stream": True, "stream_options": {"include_usage": True}})
    )
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    tokens = last["usage"]["prompt_tokens_details"]["audio_tokens"]
    check("OpenAI, streamed", text, chunks[-1]["choices"][0]["finish_reason"], tokens)

    answers = [
        json.loads(request_text(NATIVE, native)),
        events(request_text(NATIVE, native, **{"x-dashscope-sse": "enable"}))[-1],
    ]
    for name, answer in zip(("DashScope", "DashScope, streamed"), answers, strict=True):
        choice = answer["output"]["choices"][0]
        tokens = answer["usage"]["input_tokens_details"]["audio_tokens"]
        check(name, choice["message"]["content"][0]["text"], choice["finish_reason"], tokens)


if __name__ == "__main__":
    main()
