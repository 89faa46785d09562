"""The download process: its downloads, its replacement when it dies, and the event loop that it spares."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import psutil
import pytest

from serving import errors
from serving.audio import download_process
from serving.audio.download_messages import Configure, End, Failed, Finished, Ready, Start, Status, decode, encode
from serving.audio.download_process import DownloadProcess
from serving.audio.downloader import _Downloads
from serving.config import Settings
from serving.types import SchedulingClass
from tests.audio.sites import BODY, OUTSIDE, Site, files, response

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@contextlib.asynccontextmanager
async def running(tmp_path: Path, **changes: object) -> AsyncIterator[DownloadProcess]:
    """Run a download process to which OUTSIDE is public; nothing may be left in its directory."""
    values = {"download_dir": tmp_path, "fetch_allow": (f"{OUTSIDE}/32",), "fetch_timeout_s": 20, **changes}
    process = DownloadProcess(Settings.model_validate(values))
    await process.start()
    try:
        yield process
        await until(lambda: not files(tmp_path))
    finally:
        await process.stop()
        await process.stop()
    assert not list(tmp_path.iterdir())  # noqa: ASYNC240 - not a server


async def until(condition: object, timeout_s: float = 30) -> None:
    """Wait until a condition holds."""
    assert callable(condition)
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.02)


async def get(process: DownloadProcess, url: str) -> bytes:
    """Download and read."""
    async with process.fetch(url, SchedulingClass("one")) as path:
        return path.read_bytes()


def child(process: DownloadProcess) -> psutil.Process:
    """Return the running process."""
    assert process._process
    return psutil.Process(process._process.pid)


async def silent(writer: asyncio.StreamWriter) -> None:
    """Answer nothing."""
    await asyncio.sleep(60)
    writer.close()


async def test_a_file_exists_while_its_context_lasts(tmp_path: Path, outside: Site) -> None:
    """Downloads come as private files that are removed after use, many at a time, each with its bytes."""
    outside.answers |= {f"/{number}": response(b"%d" % number * 5000) for number in range(40)}
    async with running(tmp_path) as process:
        async with process.fetch(outside.url()) as path:
            assert path.read_bytes() == BODY
            assert path.parent.stat().st_mode & 0o777 == 0o700
        await until(lambda: not path.exists())
        found = await asyncio.gather(*(get(process, outside.url(f"/{number}")) for number in range(40)))
        assert found == [b"%d" % number * 5000 for number in range(40)]


async def test_errors_are_those_of_the_fetcher(tmp_path: Path, outside: Site, inside: Site) -> None:
    """A refusal has its class, its words and its attributes on this side, too."""
    unavailable = response(b"", "503 No", "Retry-After: 2")
    outside.answers |= {"/no": response(b"", "404 No"), "/away": unavailable, "/big": response(bytes(2_000_000))}
    async with running(tmp_path, max_url_bytes=1_000_000) as process:
        with pytest.raises(errors.DownloadFailed) as failed:
            await get(process, outside.url("/no"))
        assert str(failed.value) == "Failed to download multimodal content. The server answered with status 404."
        with pytest.raises(errors.SourceUnavailable) as away:
            await get(process, outside.url("/away"))
        assert away.value.retry_after_s == 2
        for url, kind in {
            outside.url("/big"): errors.AudioTooLarge,
            inside.url(): errors.DownloadFailed,
            "http://[": errors.InvalidAudioUrl,
            "http://\ud800.test/": errors.InvalidAudioUrl,
        }.items():
            with pytest.raises(kind) as caught:
                await get(process, url)
            assert type(caught.value) is kind
    async with running(tmp_path, max_downloads_bytes=1024 * 1024, max_url_bytes=3_000_000) as process:
        with pytest.raises(errors.Overloaded) as full:
            await get(process, outside.url("/big"))
        assert (full.value.reason, full.value.retry_after_s) == ("downloads", 5)


async def test_a_cancelled_download_is_cancelled_there(tmp_path: Path, outside: Site) -> None:
    """A caller that leaves ends its download: the file is removed, and the slot is free again."""
    outside.answers["/silent"] = silent
    async with running(tmp_path) as process:
        tasks = [asyncio.create_task(get(process, outside.url("/silent"))) for _ in range(20)]
        await until(lambda: process.running == 20)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await until(lambda: process.running == 0 and not files(tmp_path))
        assert not process._waiting


async def test_the_fetcher_gets_the_scheduling_class_of_the_request() -> None:
    """Tenant, weight and priority of `Start` reach the fetcher: with them it shares its connections and its disk."""
    given: list[tuple[str, SchedulingClass]] = []

    class Noting:
        used_bytes = running = 0

        @contextlib.asynccontextmanager
        async def fetch(self, url: str, scheduling_class: SchedulingClass) -> AsyncIterator[Path]:
            given.append((url, scheduling_class))
            yield Path("clip")

    sent = SimpleNamespace(write=lambda _: None)
    reader = asyncio.StreamReader()
    reader.feed_data(encode(Start(1, "http://a/b", "id", "gold", 3.0, 1)))
    serving = asyncio.create_task(_Downloads(Noting(), sent).serve(reader))  # type: ignore[arg-type]
    await until(lambda: given)
    reader.feed_eof()
    await serving
    assert given == [("http://a/b", SchedulingClass("gold", 3.0, 1))]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
async def test_a_process_that_dies_is_replaced(tmp_path: Path, outside: Site, number: int) -> None:
    """Its running downloads fail as an error that clients retry, and the next download finds a new process."""
    outside.answers["/silent"] = silent
    async with running(tmp_path) as process:
        waiting = asyncio.create_task(get(process, outside.url("/silent")))
        await until(lambda: process.running == 1)
        before = child(process)
        before.send_signal(number)
        with pytest.raises(errors.Internal):
            await waiting
        assert await get(process, outside.url()) == BODY
        assert child(process).pid != before.pid
        assert process.deaths == 1
        assert process.running == 0


async def test_a_process_that_is_stopped_is_replaced(
    tmp_path: Path, outside: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that sends no status any more is killed, and its downloads fail."""
    monkeypatch.setattr(download_process, "_SILENT_S", 3.0)
    outside.answers["/silent"] = silent
    async with running(tmp_path) as process:
        waiting = asyncio.create_task(get(process, outside.url("/silent")))
        await until(lambda: process.running == 1)
        child(process).send_signal(signal.SIGSTOP)
        with pytest.raises(errors.Internal):
            await asyncio.wait_for(waiting, 30)
        assert await get(process, outside.url()) == BODY


async def test_a_process_that_cannot_start_fails_the_start(tmp_path: Path) -> None:
    """A broken program is an error at the start, not a service without downloads; a bad host list is named."""
    broken = DownloadProcess(Settings(download_dir=tmp_path), program=("-c", "raise SystemExit(3)"))
    with pytest.raises(errors.Internal):
        await broken.start()
    await broken.stop()
    with pytest.raises(ValueError, match=r"10\.0\.0\.0/99"):
        DownloadProcess(Settings(fetch_allow=("10.0.0.0/99",)))


async def test_a_stopped_service_downloads_nothing(tmp_path: Path, outside: Site) -> None:
    """Running downloads end as `NotReady` when the service stops, and further ones are refused as that."""
    outside.answers["/silent"] = silent
    process = DownloadProcess(Settings(download_dir=tmp_path, fetch_allow=(OUTSIDE,)))
    await process.start()
    pid = child(process).pid
    waiting = asyncio.create_task(get(process, outside.url("/silent")))
    await until(lambda: process.running == 1)
    await process.stop()
    with pytest.raises(errors.NotReady):
        await waiting
    with pytest.raises(errors.NotReady):
        await get(process, outside.url())
    assert not psutil.pid_exists(pid)
    assert not list(tmp_path.iterdir())  # noqa: ASYNC240 - not a server


async def test_the_process_holds_no_secret_and_no_signal_of_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its environment is an allow-list, it gains no rights, and a group's signals leave it to the frontend."""
    monkeypatch.setenv("CAPTIONER_API_KEYS", "sk-secret")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    async with running(tmp_path, database_url="postgresql://user:secret@host/name") as process:
        found = child(process)
        assert not {"CAPTIONER_API_KEYS", "RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "HOME"} & found.environ().keys()
        assert "PATH" in found.environ()
        status = Path(f"/proc/{found.pid}/status").read_text()  # noqa: ASYNC240 - not a server
        assert "NoNewPrivs:\t1" in status
        assert os.getpgid(found.pid) == found.pid
        found.send_signal(signal.SIGINT)
        found.send_signal(signal.SIGTERM)
        await asyncio.sleep(1.5)
        assert child(process).pid == found.pid


ORPHAN = """
import asyncio, os, signal, sys
from pathlib import Path
from serving.audio.download_process import DownloadProcess
from serving.audio.downloader import _Downloads
from serving.config import Settings

async def main():
    process = DownloadProcess(Settings(download_dir=Path(sys.argv[1])))
    await process.start()
    print(process._process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_no_process_outlives_its_frontend(tmp_path: Path) -> None:
    """The process of a killed frontend ends."""
    command = [sys.executable, "-c", ORPHAN, str(tmp_path)]
    killed = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
    pid = int(killed.stdout)
    await until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


async def test_hostile_servers_do_not_delay_the_event_loop(tmp_path: Path, outside: Site) -> None:
    """While 8 servers flood their downloads with the least chunks that are accepted, this loop's lag is small.

    With the downloads on this loop the lag is 0.9 s in the median, which is what other tenants' captions would wait.
    """
    flood = await asyncio.create_subprocess_exec(sys.executable, "-c", FLOOD, OUTSIDE, stdout=subprocess.PIPE)
    assert flood.stdout
    port = int(await flood.stdout.readline())
    lags = []
    try:
        async with running(tmp_path) as process:
            floods = [asyncio.create_task(get(process, f"http://{OUTSIDE}:{port}/")) for _ in range(8)]
            while not all(task.done() for task in floods):
                began = time.perf_counter()
                await asyncio.sleep(0.01)
                lags.append(time.perf_counter() - began - 0.01)
            for task in floods:
                with pytest.raises(errors.DownloadFailed, match="pieces that are too small"):
                    await task
    finally:
        flood.kill()
        await flood.wait()
    assert sorted(lags)[len(lags) // 2] < 0.1


FLOOD = """
import contextlib, socket, sys, threading
server = socket.create_server((sys.argv[1], 0))
print(server.getsockname()[1], flush=True)

def serve(client):
    with contextlib.suppress(OSError), client:
        client.recv(65536)
        client.sendall(b"HTTP/1.1 200 OK\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n")
        while True:
            client.sendall((b"19\\r\\n" + b"a" * 25 + b"\\r\\n") * 9000)

while True:
    threading.Thread(target=serve, args=server.accept()[:1], daemon=True).start()
"""


@pytest.mark.parametrize(
    "message",
    [
        Configure({"fetch_ports": [80, 443]}),
        Start(1, "http://media.example/\ud800\n音", "id", "tenant", 2.5, -1),
        End(2),
        Ready(),
        Finished(3, "/tmp/x\n"),  # noqa: S108 - a text
        Failed(4, "DownloadFailed", "words", {"retry_after_s": 1.5}),
        Status(5, 6),
    ],
)
def test_messages_survive_the_socket(message: object) -> None:
    """A message is one line, whatever its texts hold, and is the same on the other side."""
    line = encode(message)  # type: ignore[arg-type]
    assert line.count(b"\n") == 1
    assert decode(line) == message


def test_what_is_no_message_is_refused() -> None:
    """A line that is no message raises one of three exceptions."""
    for line in itertools.chain((b"", b"\n", b"[]", b"{}", b'{"kind":"Other"}'), (b'{"kind":"End"}', b'{"kind":[]}')):
        with pytest.raises((ValueError, LookupError, TypeError)):
            decode(line)
