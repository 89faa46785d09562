"""Closed-loop load generator for OpenAI-compatible chat completions with streamed answers.

Measured code must not wait for the generator: bodies are made beforehand, and received bytes are only time-stamped and
kept; they are parsed and checked after the round.
"""

from __future__ import annotations

import asyncio
import base64
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import aiohttp

from benchmarks.load.checks import Expected, check
from benchmarks.load.wire import prepare, read

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from benchmarks.load.wire import Answer, Pieces


@dataclass(frozen=True, slots=True)
class Target:
    """URL of the chat completions, and the options of every request."""

    url: str
    model: str
    max_tokens: int

    @property
    def expected(self) -> Expected:
        """Options as the checks know them. Compared servers count input tokens by rules of their own."""
        return Expected(self.model, self.max_tokens, "any")


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
        """Return the answers. Raises `BadAnswerError` unless each is right."""
        return [raw.checked(self._target.expected) for raw in self._raw]

    async def _run(self) -> None:
        unsent = iter(self._bodies)

        async def send_in_turn(session: aiohttp.ClientSession) -> None:
            for body in unsent:
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
    audio = base64.b64encode(clip.read_bytes())
    # OpenAI has these two formats, and vLLM accepts no others; all systems detect the actual format themselves.
    named = "mp3" if clip.suffix == ".mp3" else "wav"
    return prepare(target.expected, "openai", audio, stream=True, bare=named).body


async def _send(session: aiohttp.ClientSession, url: str, body: bytes) -> _RawAnswer:
    began = time.perf_counter()
    async with session.post(url, data=aiohttp.BytesPayload(body)) as response:
        pieces = [(time.perf_counter() - began, piece) async for piece in response.content.iter_any()]
        headers = {name.lower(): value for name, value in response.headers.items()}
        return _RawAnswer(response.status, headers, pieces, time.perf_counter() - began)


@dataclass(frozen=True, slots=True)
class _RawAnswer:
    status: int
    headers: Mapping[str, str]
    pieces: Pieces
    e2e_s: float

    def checked(self, expected: Expected) -> Answer:
        """Return the parsed answer. Raises `BadAnswerError`."""
        answer = read(self.status, self.headers, self.pieces, self.e2e_s, stream=True)
        check(answer, expected, 0.0)
        return answer
