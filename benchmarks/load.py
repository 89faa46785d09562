"""A closed-loop load generator for OpenAI-compatible chat completions with streamed answers.

It must not become what is measured: bodies are made beforehand, and what arrives is only stamped and kept; it is parsed
and checked when the round is over.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import time
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

SAMPLING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
"""The model card's, sent explicitly so that no server's own defaults count."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One checked answer. Times count from just before the request is sent; TTFT is to the first text."""

    ttft_s: float
    e2e_s: float
    events: int
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Target:
    """Where to send requests, and what each of them asks for."""

    url: str
    model: str
    max_tokens: int


class BadAnswerError(Exception):
    """An answer that is not what every request of a benchmark must get."""


class Load:
    """Every clip once, `concurrency` at a time."""

    def __init__(self, target: Target, clips: Sequence[Path], concurrency: int) -> None:
        self._target = target
        self._bodies = [_body(target, clip) for clip in clips]
        self._concurrency = concurrency
        self._raw: list[_RawAnswer] = []

    def run(self) -> None:
        """Send everything; return when the last answer has ended."""
        asyncio.run(self._run())

    def answers(self) -> list[Answer]:
        """What came. Raises `BadAnswerError` unless each is a 200 with text, the asked number of tokens, and usage."""
        return [raw.check(self._target.max_tokens) for raw in self._raw]

    async def _run(self) -> None:
        waiting = iter(self._bodies)

        async def send_in_turn(session: aiohttp.ClientSession) -> None:
            for body in waiting:
                self._raw.append(await _send(session, self._target.url, body))

        async with (
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=600),
                headers={"content-type": "application/json"},
            ) as session,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(self._concurrency):
                group.create_task(send_in_turn(session))


def _body(target: Target, clip: Path) -> bytes:
    audio = {"data": base64.b64encode(clip.read_bytes()).decode(), "format": clip.suffix.removeprefix(".")}
    return json.dumps(
        {
            "model": target.model,
            "messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": audio}]}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": target.max_tokens,
            "ignore_eos": True,
            **SAMPLING,
        }
    ).encode()


async def _send(session: aiohttp.ClientSession, url: str, body: bytes) -> _RawAnswer:
    began = time.perf_counter()
    async with session.post(url, data=aiohttp.BytesPayload(body)) as response:
        pieces = [(time.perf_counter() - began, piece) async for piece in response.content.iter_any()]
        return _RawAnswer(response.status, pieces, time.perf_counter() - began)


@dataclass(frozen=True, slots=True)
class _RawAnswer:
    status: int
    pieces: list[tuple[float, bytes]]
    e2e_s: float

    def check(self, max_tokens: int) -> Answer:
        """The figures of this answer. Raises `BadAnswerError`."""
        body = b"".join(piece for _, piece in self.pieces)
        if self.status != 200:
            raise BadAnswerError(f"HTTP {self.status}: {body[:500]!r}")
        if not body.endswith(b"data: [DONE]\n\n"):
            raise BadAnswerError(f"the stream does not end as it should: {body[-500:]!r}")
        events = list(_events(body))
        choices = [(end, choice) for end, event in events for choice in event["choices"]]
        text_ends = [end for end, choice in choices if choice["delta"].get("content")]
        usage = events[-1][1]["usage"]
        if not text_ends or choices[-1][1]["finish_reason"] != "length" or usage["completion_tokens"] != max_tokens:
            raise BadAnswerError(f"expected text of {max_tokens} tokens: {body[-1000:]!r}")
        arrived = list(itertools.accumulate(len(piece) for _, piece in self.pieces))
        ttft_s, _ = self.pieces[bisect_left(arrived, text_ends[0])]
        return Answer(ttft_s, self.e2e_s, len(events), usage["prompt_tokens"], usage["completion_tokens"])


def _events(body: bytes) -> Iterator[tuple[int, Any]]:
    """Each event's JSON with the position where it ends."""
    end = 0
    for frame in body.split(b"\n\n"):
        end += len(frame) + 2
        if frame.startswith(b"data: {"):
            event = json.loads(frame.removeprefix(b"data: "))
            if "error" in event:
                raise BadAnswerError(f"in-stream error: {event}")
            yield end, event
