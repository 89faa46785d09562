"""A closed-loop load generator for OpenAI-compatible chat completions with streamed answers.

It must not become what is measured: bodies are made beforehand, and what arrives is only stamped and kept; it is parsed
and checked (wire.py) when the round is over.
"""

from __future__ import annotations

import asyncio
import base64
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import aiohttp
from wire import Answer, Asked, call, read

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from wire import Pieces


@dataclass(frozen=True, slots=True)
class Target:
    """Where to send requests, and what each of them asks for."""

    url: str
    model: str
    max_tokens: int

    @property
    def asked(self) -> Asked:
        """The same in the words of the checks. Servers that are compared count input by rules of their own."""
        return Asked(self.model, self.max_tokens, "any")


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
        """What came. Raises `BadAnswerError` unless each is right."""
        return [raw.checked(self._target.asked) for raw in self._raw]

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
    audio = base64.b64encode(clip.read_bytes())
    # The two formats that OpenAI knows, and vLLM lets pass no others; what a file is all systems see for themselves.
    named = "mp3" if clip.suffix == ".mp3" else "wav"
    return call(target.asked, "openai", audio, stream=True, bare=named).body


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

    def checked(self, asked: Asked) -> Answer:
        """The figures of this answer. Raises `BadAnswerError`."""
        answer = read(self.status, self.headers, self.pieces, self.e2e_s, stream=True)
        answer.check(asked, 0.0)
        return answer
