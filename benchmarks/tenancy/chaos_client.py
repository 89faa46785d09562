"""Requests of the chaos in both dialects, with random endings, and what their clients received."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from benchmarks.load.wav import wav_data_url
from benchmarks.load.wire import chat_body

KEY = "sk-chaos-chaos-chaos-chaos-chaos-chaos"
CLIENT_S = 90
TOKENS = 40
"""Words of a complete caption."""
ENDLESS = 3000

ENDINGS = {
    "finished": 40,
    "limited": 12,
    "leave_at_once": 6,
    "leave_waiting": 8,
    "leave_midstream": 14,
    "slow_reader": 4,
    "stops_reading": 3,
    "half_body": 3,
    "deadline": 2,
    "no_audio": 3,
    "bad_url": 2,
    "bad_json": 2,
    "wrong_key": 1,
}
"""Kinds of requests, with their weights."""
LEAVES = {"leave_at_once", "leave_waiting", "leave_midstream", "stops_reading", "half_body"}


@dataclass(slots=True)
class Received:
    """One request as its client saw it."""

    kind: str
    dialect: str
    stream: bool
    clip: int
    server: int
    began: float
    ended: float = 0.0
    status: int = 0
    request_id: str = ""
    code: str = ""
    body: bytes = b""
    complete: bool = False
    text: str = ""
    usage: tuple[int, int] | None = None
    """Input and output tokens by the answer's last usage."""
    terminal: bool = False
    """The answer has a finish reason."""


def clips(count: int = 12) -> list[str]:
    """Return clips of noise, all different, of 0.3 to 3 s."""
    chance = random.Random(7)
    return [wav_data_url(chance.randbytes(2 * round(16_000 * (0.3 + 2.7 * n / count)))) for n in range(count)]


CLIPS = clips()


def compose(kind: str, dialect: str, clip: int, chance: random.Random, *, stream: bool) -> bytes:
    """Return a request as bytes."""
    audio = CLIPS[clip]
    if kind == "no_audio":
        audio = "data:audio/wav;base64,bm8gYXVkaW8="
    elif kind == "bad_url":
        audio = "http://127.0.0.1:9/clip.wav"
    options: dict[str, Any] = {}
    if kind == "limited":
        options["max_tokens"] = chance.randint(1, TOKENS)
    elif kind == "deadline":
        options |= {"max_tokens": ENDLESS, "ignore_eos": True}
    headers = {"host": "x", "authorization": f"Bearer {KEY}", "connection": "close", "content-type": "application/json"}
    if kind == "wrong_key":
        headers["authorization"] = "Bearer sk-of-nobody"
    body: dict[str, Any]
    if dialect == "openai":
        path = "/v1/chat/completions"
        body = chat_body(audio, **options)
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
    else:
        path = "/api/v1/services/aigc/multimodal-generation/generation"
        message = {"role": "user", "content": [{"audio": audio}]}
        parameters = {"incremental_output": True, **options} if stream else options
        body = {"model": chat_body("")["model"], "input": {"messages": [message]}, "parameters": parameters}
        if stream:
            headers["x-dashscope-sse"] = "enable"
    content = json.dumps(body).encode()
    if kind == "bad_json":
        content = content[:-1]
    headers["content-length"] = str(len(content))
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + content


async def request(server: int, port: int, kind: str, chance: random.Random) -> Received:
    """Send a request that ends in the way of `kind`. Raises `OSError` if nobody listens."""
    dialect, stream = chance.choice(("openai", "dashscope")), chance.random() < 0.5
    if kind in {"leave_midstream", "slow_reader", "stops_reading"}:
        stream = True
    received = Received(kind, dialect, stream, chance.randrange(len(CLIPS)), server, time.time())
    data = compose(kind, dialect, received.clip, chance, stream=stream)
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**14)
    try:
        with suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(_patience_s(kind, chance)):
                if kind == "half_body":
                    writer.write(data[: -len(data) // 3])
                    await writer.drain()
                    await asyncio.sleep(CLIENT_S)
                writer.write(data)
                await writer.drain()
                await _read(reader, received, chance)
    finally:
        writer.transport.abort()
        received.ended = time.time()
    parse(received)
    return received


def _patience_s(kind: str, chance: random.Random) -> float:
    longest = {"leave_at_once": 0.002, "leave_waiting": 0.1, "half_body": 2.0, "stops_reading": 4.0}
    return longest[kind] * chance.random() if kind in longest else CLIENT_S


async def _read(reader: asyncio.StreamReader, received: Received, chance: random.Random) -> None:
    data, head, length = b"", b"", None
    leave_after = chance.randint(1, 8) if received.kind == "leave_midstream" else None
    while piece := await reader.read(65_536):
        data += piece
        if not head and b"\r\n\r\n" in data:
            head, _, data = data.partition(b"\r\n\r\n")
            received.status = int(head.split(b" ", 2)[1])
            found = re.search(rb"(?i)x-request-id: (\S+)", head)
            received.request_id = found[1].decode() if found else ""
            sized = re.search(rb"(?i)content-length: (\d+)", head)
            length = int(sized[1]) if sized else None
        received.body = data if length is not None or not head else unchunk(data)
        if leave_after is not None and data.count(b"data:") >= leave_after:
            return
        if received.kind == "slow_reader" and head:
            await asyncio.sleep(0.5 * chance.random())
        if received.kind == "stops_reading" and head:
            await asyncio.sleep(CLIENT_S)
    received.complete = bool(head) and (data.endswith(b"0\r\n\r\n") if length is None else len(data) == length)


def unchunk(data: bytes) -> bytes:
    """Return the content of the complete chunks."""
    content = b""
    while b"\r\n" in data:
        size, _, rest = data.partition(b"\r\n")
        count = int(size, 16)
        if len(rest) < count + 2:
            break
        content, data = content + rest[:count], rest[count + 2 :]
    return content


def parse(received: Received) -> None:
    """Fill in the text, the usage and the error's code of an answer."""
    if received.status == 200 and received.stream:
        payloads = re.findall(rb"data: ?(\{.*\})", received.body)
    else:
        payloads = [received.body] if received.complete else []
    for payload in payloads:
        try:
            _add(received, json.loads(payload))
        except (ValueError, KeyError, IndexError, TypeError):
            received.code = "not parsed"


def _add(received: Received, answer: dict[str, Any]) -> None:
    error = answer.get("error") or (answer if "code" in answer and "message" in answer else None)
    if error:
        received.code = str(error["code"])
        return
    for choice in (answer.get("output") or answer)["choices"]:
        content = (choice["message"] if "message" in choice else choice["delta"]).get("content") or ""
        received.text += content if isinstance(content, str) else "".join(part["text"] for part in content)
        received.terminal |= choice.get("finish_reason") not in {None, "null"}
    if usage := answer.get("usage"):
        prefix, suffix = ("prompt", "completion") if received.dialect == "openai" else ("input", "output")
        received.usage = usage[f"{prefix}_tokens"], usage[f"{suffix}_tokens"]
