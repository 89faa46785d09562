"""Clients that disconnect in the middle of a response leave nothing behind."""

from __future__ import annotations

import asyncio
import gc
import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from serving.api.app import create_app
from serving.config import Settings
from serving.engine.fake import FakeEngine
from tests.support.service import RunningService
from tests.support.wire import COMPATIBLE, NATIVE, ask_compatible, compatible_body, data_url, native_body, wav

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.types import Message

    from tests.support.media import MediaServer

CLIENTS = 200


@pytest.fixture(scope="module")
def endless_service() -> Iterator[RunningService]:
    """The fake engine with a caption of some ten minutes, which no client waits for."""
    with RunningService(
        "--engine=fake", "--fake-tpot-s=0.02", "--fake-tokens=30000", "--fetch-allow=127.0.0.0/8"
    ) as service:
        yield service


async def _leave_mid_stream(url: str, path: str, body: dict[str, object], *, after_events: int) -> None:
    """Read some events of a stream and close the connection without notice."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\nx-dashscope-sse: enable\r\ncontent-length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    seen = b""
    while seen.count(b"data:") < after_events:
        piece = await reader.read(65_536)
        assert piece, f"the stream ended by itself: {seen!r}"
        seen += piece
    writer.transport.abort()


def _held(service: RunningService) -> tuple[int, int, int]:
    """Count open files and child processes of the service, and its files in the download directory.

    Not those of its database: how many of a bounded pool's connections are open depends on what ran at the same time.
    """
    process = psutil.Process(service.process.pid)
    database = sum("captioner.db" in file.path for file in process.open_files())
    downloads = [path for path in service.downloads.rglob("*") if path.is_file()]
    return process.num_fds() - database, len(process.children(recursive=True)), len(downloads)


async def _assert_holds_no_more_than(service: RunningService, before: tuple[int, int, int]) -> None:
    """Wait until files, processes and downloads are no more than before, once the last sockets are closed."""
    for _ in range(100):
        now = _held(service)
        if all(count <= most for count, most in zip(now, before, strict=True)):
            return
        await asyncio.sleep(0.1)
    assert now == before


async def _storm(service: RunningService, audio: list[str], *, after_events: int, **parameters: object) -> None:
    async with asyncio.TaskGroup() as group:
        for index in range(CLIENTS):
            source = audio[index % len(audio)]
            path, body = (
                (NATIVE, native_body(source, incremental_output=True, **parameters))
                if index % 2
                else (COMPATIBLE, compatible_body(source, stream=True, **parameters))
            )
            group.create_task(_leave_mid_stream(service.url, path, body, after_events=after_events))
            if index % 40 == 39:
                await asyncio.sleep(0.2)


async def test_fake_engine_is_left_clean(endless_service: RunningService, media: MediaServer) -> None:
    """200 clients that disconnect in mid-stream leave no generation, file, process or memory behind."""
    service = endless_service
    media.files["leaver.wav"] = wav(2)
    audio = [data_url(wav(1)), media.url("leaver.wav")]
    await _storm(service, audio, after_events=3)  # the first round fills caches and pools
    service.settle()
    held, memory = _held(service), psutil.Process(service.process.pid).memory_info().rss
    await _storm(service, audio, after_events=3)
    service.settle()
    await _assert_holds_no_more_than(service, held)
    assert psutil.Process(service.process.pid).memory_info().rss < memory + 32 * 2**20
    assert service.metric("captioner_requests_total", outcome="disconnected") == 2 * CLIENTS


async def test_features_are_freed_at_once(tmp_path: Path) -> None:
    """The features of captions whose clients have left are freed at once, not when garbage is next collected."""
    given: dict[str, object] = {
        "engine": "fake",
        "auth": False,
        "audio_workers": 1,
        "fake_tpot_s": 0.02,
        "fake_tokens": 30_000,
    }
    given["stream_flush_interval_s"] = 0  # cancelled while it waits for the engine, not for the next tick
    own = Settings(data_dir=tmp_path, uploads_dir=tmp_path / "uploads", **given)  # type: ignore[arg-type]
    app = create_app(own, FakeEngine(own))

    async def leave_mid_stream() -> None:
        content = json.dumps(compatible_body(data_url(wav(1)), stream=True)).encode()
        messages: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]
        streaming = asyncio.Event()

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await streaming.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message.get("body"):
                streaming.set()

        await app(_scope(COMPATIBLE), receive, send)

    async with app.router.lifespan_context(app):
        await leave_mid_stream()
        gc.collect()
        gc.disable()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(40):
                    group.create_task(leave_mid_stream())
            assert not [name for name in _open_files() if "log-mel" in name]
        finally:
            gc.enable()


def _scope(path: str) -> dict[str, object]:
    asgi = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"}
    peers = {"server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1), "state": {}}
    return asgi | peers | {"path": path, "raw_path": path.encode(), "query_string": b"", "headers": [(b"host", b"x")]}


def _open_files() -> list[str]:
    names = []
    for path in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the descriptor that lists the directory
            names.append(str(path.readlink()))
    return names


async def test_disconnect_during_the_download(endless_service: RunningService) -> None:
    """A client that disconnects while its audio is fetched ends the fetch and frees the download directory."""
    service = endless_service
    stuck: list[asyncio.StreamWriter] = []
    all_stuck = asyncio.Event()

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\nRIFF")
        stuck.append(writer)
        if len(stuck) == 20:
            all_stuck.set()

    server = await asyncio.start_server(drip, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/slow.wav"
    host, port = service.url.removeprefix("http://").split(":")
    content = json.dumps(native_body(url)).encode()
    writers = []
    for _ in range(20):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"POST {NATIVE} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content)
        writers.append(writer)
    async with asyncio.timeout(30):
        await all_stuck.wait()
    for writer in writers:
        writer.transport.abort()
    await asyncio.to_thread(service.settle)
    assert _held(service)[2] == 0
    for writer in stuck:
        writer.close()
    server.close()
    await server.wait_closed()


@pytest.mark.engine
async def test_real_engine_is_left_clean(embedded_service: RunningService) -> None:
    """With vLLM, too, no generation continues after its client disconnects, and the next caption succeeds."""
    service = embedded_service
    audio = [data_url(wav(1, frequency_hz=200 + index)) for index in range(8)]
    before = await asyncio.to_thread(ask_compatible, service.url, audio[0], temperature=0)
    held = _held(service)
    await _storm(service, audio, after_events=2, ignore_eos=True, max_tokens=256)
    await asyncio.to_thread(service.settle)
    await _assert_holds_no_more_than(service, held)
    after = await asyncio.to_thread(ask_compatible, service.url, audio[0], temperature=0)
    assert after.text == before.text
