"""Requests of the first hour: greedy captions of files behind URLs, and streams that are open while a service stops."""

from __future__ import annotations

import asyncio
import functools
import json
import threading
import time
import urllib.error
import urllib.request
import wave
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import aiohttp
import numpy as np

from benchmarks.load.checks import BadAnswerError
from benchmarks.load.clips import Clip, sound
from benchmarks.load.wire import chat_body, read

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from benchmarks.load.wire import Answer

GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 1, "repetition_penalty": 1.0, "presence_penalty": 0.0}
SAMPLE_RATE = 16_000
_TIMEOUT_S = 1800


def plain_clip(directory: Path, seconds: int) -> Clip:
    """Write a 16 kHz mono WAV file, if it is missing: both systems get the same samples without resampling."""
    clip = Clip(directory / f"plain-{seconds}s.wav", seconds)
    if not clip.path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        unfinished = clip.path.with_suffix(".unfinished")
        with wave.open(str(unfinished), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(SAMPLE_RATE)
            # Each part has another pitch and noise, so that a caption can name more than one sound.
            for part, start in enumerate(range(0, seconds, 10)):
                length = min(10, seconds - start) * SAMPLE_RATE
                samples = sound(1000 + part, length)[0]
                file.writeframes((samples * 32_000).astype(np.int16).tobytes())
        unfinished.replace(clip.path)
    return clip


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@contextmanager
def served(directory: Path) -> Iterator[str]:
    """Serve a directory's files by HTTP on loopback; yield the address."""
    handler = functools.partial(_Quiet, directory=str(directory))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, name="files", daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def greedy(url: str, audio_url: str, tokens: int, *, named: str = "input_audio") -> Answer:
    """Return the greedy caption of a file behind a URL. `named`: the part's type, `audio_url` at `vllm serve`."""
    body = chat_body(audio_url, max_tokens=tokens, **GREEDY)
    if named == "audio_url":
        body["messages"][0]["content"] = [{"type": "audio_url", "audio_url": {"url": audio_url}}]
    request = urllib.request.Request(  # noqa: S310 - our own address
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    began = time.perf_counter()
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:  # noqa: S310
            status, headers, answer = response.status, dict(response.headers), response.read()
    except urllib.error.HTTPError as error:
        with error:
            status, headers, answer = error.code, dict(error.headers), error.read()
    elapsed_s = time.perf_counter() - began
    lower = {name.lower(): value for name, value in headers.items()}
    return read(status, lower, [(elapsed_s, answer)], elapsed_s, stream=False)


class OpenStreams:
    """Streams of captions, and idle connections, that are open at the same time."""

    def __init__(self, url: str, clips: Sequence[str], tokens: int, idle: int) -> None:
        self._url = url
        self._clips = clips
        self._tokens = tokens
        self._idle = idle
        self.started = asyncio.Event()
        self._running = 0

    async def run(self) -> dict[str, Any]:
        """Send all; return the number of complete streams, the reasons of the others, and what became of idle ones."""
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
            idle = [
                await asyncio.open_connection("127.0.0.1", int(self._url.rpartition(":")[2])) for _ in range(self._idle)
            ]
            results = await asyncio.gather(*(self._stream(session, clip) for clip in self._clips))
            closed = [await _is_closed(reader) for reader, _ in idle]
            for _, writer in idle:
                writer.close()
        failures = [each for each in results if each]
        return {
            "streams": len(results),
            "complete": len(results) - len(failures),
            "failures": sorted(set(failures))[:5],
            "idle_connections": len(closed),
            "idle_closed": sum(closed),
        }

    async def _stream(self, session: aiohttp.ClientSession, clip: str) -> str:
        options = {"max_tokens": self._tokens, "ignore_eos": True, "stream": True}
        body = chat_body(clip, **options, stream_options={"include_usage": True})
        began, pieces = time.perf_counter(), []
        try:
            async with session.post(f"{self._url}/v1/chat/completions", json=body) as response:
                async for piece in response.content.iter_any():
                    pieces.append((time.perf_counter() - began, piece))
                    if len(pieces) == 1:
                        self._running += 1
                        if self._running == len(self._clips):
                            self.started.set()
                headers = {name.lower(): value for name, value in response.headers.items()}
                answer = read(response.status, headers, pieces, time.perf_counter() - began, stream=True)
        except (BadAnswerError, aiohttp.ClientError, TimeoutError) as error:
            self.started.set()
            return f"{type(error).__name__}: {error}"[:300]
        whole = answer.output_tokens == self._tokens
        return "" if whole else f"{answer.output_tokens} tokens of {self._tokens}"


async def _is_closed(reader: asyncio.StreamReader) -> bool:
    try:
        return await asyncio.wait_for(reader.read(1), 1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True
