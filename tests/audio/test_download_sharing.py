"""Resources of downloads: disk and DNS threads shared between tenants, and directories left by killed services."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from serving import errors
from serving.audio.fetch import Fetcher
from serving.config import Settings
from serving.types import SchedulingClass
from tests.audio.sites import BODY, MIB, OUTSIDE, Site, fetching, files, get, response


async def test_downloads_share_a_bounded_disk(tmp_path: Path, outside: Site) -> None:
    """A download is refused while others fill the disk that downloads may use, and fits later."""
    outside.answers |= {"/half": response(bytes(MIB // 2)), "/more": response(bytes(MIB // 2 + 1))}
    async with fetching(tmp_path, max_downloads_bytes=MIB) as fetcher:
        async with fetcher.fetch(outside.url("/half")):
            with pytest.raises(errors.Overloaded):
                await get(fetcher, outside.url("/more"))
            assert len(await get(fetcher, outside.url("/half"))) == MIB // 2
        assert len(await get(fetcher, outside.url("/more"))) == MIB // 2 + 1


async def test_no_tenant_fills_the_disk_of_downloads(tmp_path: Path, outside: Site) -> None:
    """One tenant's downloads leave disk for those of another; without tenants, downloads may fill all of it."""
    outside.answers |= {"/part": response(bytes(MIB)), "/small": response(bytes(MIB // 8))}
    async with fetching(tmp_path, max_downloads_bytes=8 * MIB) as fetcher, contextlib.AsyncExitStack() as under_way:
        for _ in range(7):
            await under_way.enter_async_context(fetcher.fetch(outside.url("/part"), SchedulingClass("greedy")))
        with pytest.raises(errors.Overloaded) as caught:
            await get(fetcher, outside.url("/part"), SchedulingClass("greedy"))
        assert caught.value.reason == "downloads"
        async with fetcher.fetch(outside.url("/small"), SchedulingClass("other")) as path:
            assert path.stat().st_size == MIB // 8
    async with fetching(tmp_path, max_downloads_bytes=8 * MIB) as fetcher, contextlib.AsyncExitStack() as under_way:
        for _ in range(8):
            await under_way.enter_async_context(fetcher.fetch(outside.url("/part")))


class SlowNames:
    """A resolver that answers the names `slow…` only once `go` is set."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.asked: list[str] = []

    def __call__(self, host: str, port: int, **options: Any) -> list[Any]:
        self.asked.append(host)
        if host.startswith("slow"):
            self.go.wait(60)
            raise OSError
        return list(socket.getaddrinfo(OUTSIDE, port, **options))


async def test_one_tenants_slow_names_hold_up_no_other_tenant(tmp_path: Path, outside: Site) -> None:
    """Lookups outlive their requests and keep their tenant's part of the threads; that tenant's requests time out."""
    names = SlowNames()
    fast = f"http://fast.test:{outside.port}/clip"
    async with fetching(tmp_path, names, fetch_timeout_s=1) as fetcher:
        slow = (get(fetcher, f"http://slow{number}.test/clip", SchedulingClass("greedy")) for number in range(40))
        outcomes = await asyncio.gather(*slow, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {errors.DownloadTimeout}
        assert len(names.asked) == 16, "half of the threads"
        others = (get(fetcher, f"http://slow{number}.test/clip", SchedulingClass("second")) for number in range(40))
        await asyncio.gather(*others, return_exceptions=True)
        with pytest.raises(errors.DownloadTimeout):
            await get(fetcher, fast, SchedulingClass("greedy"))
        fetcher._settings = fetcher._settings.model_copy(update={"fetch_timeout_s": 30})
        assert await get(fetcher, fast, SchedulingClass("other")) == BODY
        waiting = asyncio.create_task(get(fetcher, fast, SchedulingClass("greedy")))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        names.go.set()
        assert await waiting == BODY, "queued lookups start as soon as threads are free"
        assert "slow39.test" not in names.asked, "its request had timed out in the queue"


async def test_many_lookups_of_one_tenant_are_all_served(tmp_path: Path, outside: Site) -> None:
    """Lookups in excess of the threads are queued, not refused."""
    async with fetching(tmp_path, SlowNames()) as fetcher:
        url = f"http://fast.test:{outside.port}/clip"
        assert await asyncio.gather(*(get(fetcher, url, SchedulingClass("one")) for _ in range(100))) == [BODY] * 100


@pytest.mark.parametrize("when", ["write", "close"])
async def test_a_full_disk_is_overload(
    tmp_path: Path, outside: Site, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """A full disk is `Overloaded`, whether a write or the final flush finds it full."""
    outside.answers["/big"] = response(bytes(MIB if when == "write" else 1000))
    real = Path.open

    def full(path: Path, mode: str, **options: Any) -> Any:
        real(path, mode).close()
        return real(Path("/dev/full") if tmp_path in path.parents else path, mode.replace("x", "w"), **options)

    async with fetching(tmp_path) as fetcher:
        monkeypatch.setattr(Path, "open", full)
        with pytest.raises(errors.Overloaded):
            await get(fetcher, outside.url("/big"))


async def test_a_file_that_cannot_be_created_is_overload(
    tmp_path: Path, outside: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running out of descriptors for the file is `Overloaded`."""

    def full(*_: object, **__: object) -> Any:
        raise OSError(errno.EMFILE, "too many open files")

    async with fetching(tmp_path) as fetcher:
        monkeypatch.setattr(Path, "open", full)
        with pytest.raises(errors.Overloaded):
            await get(fetcher, outside.url())


async def test_two_hundred_cancelled_downloads_leave_nothing(tmp_path: Path, outside: Site) -> None:
    """Cancelled at any moment, a download leaves no file, no descriptor, and no counted byte."""

    async def slow(writer: asyncio.StreamWriter) -> None:
        for piece in range(0, len(BODY), 64):
            writer.write(response(BODY)[:-1024] * (not piece) + BODY[piece : piece + 64])
            await writer.drain()
            await asyncio.sleep(0.01)

    outside.answers["/slow"] = slow
    process = psutil.Process()
    async with fetching(tmp_path) as fetcher:
        await get(fetcher, outside.url())
        before = process.num_fds()

        async def cancelled(number: int) -> None:
            task = asyncio.create_task(get(fetcher, outside.url("/slow")))
            await asyncio.sleep(number / 1000)
            task.cancel()
            await asyncio.wait((task,))

        await asyncio.gather(*(cancelled(number) for number in range(200)))
        async with asyncio.timeout(10):
            while process.num_fds() > before:  # noqa: ASYNC110 - the server's ends close in their own time
                await asyncio.sleep(0.02)


ABANDON = """
import asyncio, os, signal, sys
from pathlib import Path
from serving.audio.fetch import Fetcher
from serving.config import Settings

async def main():
    fetcher = Fetcher(Settings(download_dir=Path(sys.argv[1])))
    await fetcher.start()
    (fetcher._downloads._directory / "left").write_text("over")
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_directories_of_killed_services_are_removed_and_those_in_use_are_kept(
    tmp_path: Path, outside: Site
) -> None:
    """A starting service removes the downloads of a killed service, and keeps those of a running one."""
    dead = await asyncio.create_subprocess_exec(sys.executable, "-c", ABANDON, str(tmp_path))
    await dead.wait()
    (left,) = files(tmp_path)
    first, second = (Fetcher(Settings(download_dir=tmp_path, fetch_allow=(OUTSIDE,))) for _ in range(2))
    await first.start()
    assert not left.parent.exists()
    async with first.fetch(outside.url()) as path:
        await second.start()
        assert path.read_bytes() == BODY
        await second.stop()
        assert path.read_bytes() == BODY
    await first.stop()
    await first.stop()
    assert not list(tmp_path.iterdir())  # noqa: ASYNC240 - not a server
