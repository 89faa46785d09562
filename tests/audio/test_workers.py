"""Pool of audio workers: real processes, with a decoder that does whatever the clip says."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest
import soundfile

from serving import errors
from serving.audio.decode import decode
from serving.audio.features import log_mel
from serving.audio.worker import decode_base64
from serving.audio.worker_pool import AudioWorkerPool, Prepared
from serving.config import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

# A worker whose decoder does what the clip says. Without the real decoder it starts quickly.
PUPPET = """
import sys, types
sys.modules["serving.audio.decode"] = types.SimpleNamespace(decode=None)
features = types.SimpleNamespace(MELS=128, frame_count=lambda samples: samples // 160 or 1, log_mel=None)
sys.modules["serving.audio.features"] = features
import ctypes, os, signal, time
import numpy as np
from pathlib import Path
import serving.audio.worker as worker
from serving import errors

def decode(source, *, max_duration_s):
    word, _, number = (source if isinstance(source, bytes) else source.read_bytes()).decode().partition(" ")
    match word:
        case "samples": return np.full(int(number), 0.25, np.float32)
        case "sleep": time.sleep(float(number)); return np.zeros(1600, np.float32)
        case "segfault": ctypes.string_at(0)
        case "exit": os._exit(7)
        case "spin":
            while True: pass
        case "burn":
            end = time.process_time() + float(number)
            while time.process_time() < end: pass
        case "hoard": return np.ones(int(number), np.float32)
        case "raise": raise getattr(errors, number)("from the worker")
        case "bug": raise ZeroDivisionError("an inside")
        case "environment": raise errors.AudioUnreadable(repr(sorted(os.environ.items())))
    return np.zeros(len(word), np.float32)

def log_mel(samples, out=None):
    out[:] = samples[0]
    return out

worker.decode, worker.log_mel = decode, log_mel
worker.main(sys.argv[1:])
"""

MAX_AUDIO_S = 60.0
FRAME_BYTES = 128 * 4


def settings(**changes: object) -> Settings:
    """Return settings: two workers and a longest clip of a minute, unless changed."""
    return Settings.model_validate({"audio_workers": 2, "max_audio_s": MAX_AUDIO_S, "audio_timeout_s": 30, **changes})


@contextlib.asynccontextmanager
async def running(**changes: object) -> AsyncIterator[AudioWorkerPool]:
    """Run a pool of puppets."""
    workers = AudioWorkerPool(settings(**changes), program=("-c", PUPPET))
    await workers.start()
    try:
        yield workers
    finally:
        await workers.stop()


@pytest.fixture
async def pool() -> AsyncIterator[AudioWorkerPool]:
    """A pool of two puppets."""
    async with running() as workers:
        yield workers


def say(words: str) -> str:
    """Return a clip that makes the puppet follow `words`."""
    return base64.b64encode(words.encode()).decode()


async def prepare(pool: AudioWorkerPool, words: str) -> Prepared:
    """Prepare a clip and release its features at once."""
    async with pool.prepare(say(words)) as prepared:
        return prepared


async def until(condition: Callable[[], object], within_s: float = 20) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - no event reports it
            await asyncio.sleep(0.01)


def pids(pool: AudioWorkerPool) -> set[int]:
    """Return the process ids of the pool's workers."""
    return {worker.process.pid for worker in pool._workers}


async def test_features_return_as_a_mapping_of_the_right_shape(pool: AudioWorkerPool) -> None:
    """A clip's features are float32 (128, frames), writable for torch, with the sample count and stage durations."""
    async with pool.prepare(say("samples 16079")) as prepared:
        features = prepared.features
        assert features.log_mel.shape == (128, 100)
        assert features.log_mel.dtype == np.float32
        assert features.log_mel.flags.writeable
        assert (features.log_mel == 0.25).all()
        assert features.samples == 16079
        assert min(prepared.queue_s, prepared.decode_s, prepared.features_s) >= 0
        assert pool.outstanding_bytes == 100 * FRAME_BYTES
    assert pool.outstanding_bytes == 0


async def test_the_shortest_clip_has_a_frame(pool: AudioWorkerPool) -> None:
    """A clip of one sample has one frame of features."""
    prepared = await prepare(pool, "samples 1")
    assert prepared.features.log_mel.shape == (128, 1)
    assert prepared.features.samples == 1


async def test_a_file_is_read_by_the_worker(pool: AudioWorkerPool, tmp_path: Path) -> None:
    """A path is opened in the worker, whatever its name."""
    clip = tmp_path / "t ö+n%e\udcff.wav"
    clip.write_text("samples 320")
    async with pool.prepare(clip) as prepared:
        assert prepared.features.samples == 320


@pytest.mark.parametrize("seed", range(8))
def test_base64_is_read_with_tolerance(seed: int) -> None:
    """ASCII whitespace, missing padding and the URL-safe alphabet are tolerated."""
    rng = random.Random(seed)
    data = rng.randbytes(100 + seed)
    text = base64.b64encode(data).decode()
    if seed % 2:
        text = text.rstrip("=")
    if seed % 4 > 1:
        text = text.replace("+", "-").replace("/", "_")
    text = "".join(letter + rng.choice(["", "", "", " ", "\n", "\r\n", "\t", "\v", "\f"]) for letter in text)
    assert decode_base64(text.encode()) == data


@pytest.mark.parametrize("text", ["SUQzBAAA....", "A", "AAAAA", "AAAA====", "AAA===", "AA=A", "A=", "AA\0A", "data:,A"])
def test_anything_else_is_not_base64(text: str) -> None:
    """Other characters, a lone digit, and padding where none can be are refused."""
    with pytest.raises(errors.InvalidAudioUrl):
        decode_base64(text.encode())


@pytest.mark.parametrize("text", ["AAA\u00a7", "\uff21\uff21\uff21\uff21", "\ud800", "c2Ft.cGxlcw"])
async def test_a_clip_that_is_not_base64_is_refused(pool: AudioWorkerPool, text: str) -> None:
    """Text that is not base64 is `InvalidAudioUrl`, whether the pool or the worker finds it."""
    with pytest.raises(errors.InvalidAudioUrl):
        async with pool.prepare(text):
            pass


async def test_a_typed_error_travels_back(pool: AudioWorkerPool) -> None:
    """An audio error of the worker is raised as the same class with the same message."""
    kinds: list[type[errors.AudioError]] = [errors.AudioError, *errors.AudioError.__subclasses__()]
    for kind in kinds:
        with pytest.raises(errors.AudioError) as caught:
            await prepare(pool, f"raise {kind.__name__}")
        assert (type(caught.value), str(caught.value)) == (kind, "from the worker")


@pytest.mark.parametrize("words", ["bug", "raise Overloaded"])
async def test_an_unexpected_error_is_logged_and_not_shown(
    pool: AudioWorkerPool, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A bug in the worker is `Internal`; the details are in the log only."""
    with pytest.raises(errors.Internal) as caught:
        await prepare(pool, words)
    assert str(caught.value) == errors.Internal.message
    (line,) = [record for record in caplog.records if record.name.startswith("serving.audio")]
    if words == "bug":
        assert "ZeroDivisionError: an inside" in vars(line)["traceback"]
    else:
        assert (vars(line)["error"], vars(line)["reason"]) == ("Overloaded", "from the worker")


@pytest.mark.parametrize("words", ["segfault", "exit"])
async def test_a_clip_that_kills_its_worker_fails_alone(pool: AudioWorkerPool, words: str) -> None:
    """A crash in a codec fails its clip; a clip in another worker is untouched, and the dead worker is replaced."""
    before = pids(pool)
    other = asyncio.create_task(prepare(pool, "sleep 0.3"))
    await asyncio.sleep(0.05)
    with pytest.raises(errors.AudioUnreadable):
        await prepare(pool, words)
    assert (await other).features.samples == 1600
    await until(lambda: len(pool._idle) == 2)
    assert len(pids(pool) & before) == 1


@pytest.mark.parametrize("at_work", [True, False])
async def test_a_killed_worker_is_replaced(pool: AudioWorkerPool, *, at_work: bool) -> None:
    """`kill -9` of a worker fails no clip: its clip goes to another worker."""
    task = asyncio.create_task(prepare(pool, "sleep 0.3")) if at_work else None
    await asyncio.sleep(0.05)
    (victim,) = [worker for worker in pool._workers if (worker.task is not None) == at_work][:1]
    os.kill(victim.process.pid, signal.SIGKILL)
    if task:
        assert (await task).features.samples == 1600
    await until(lambda: victim not in pool._workers and len(pool._idle) == 2)
    assert (await prepare(pool, "samples 160")).features.samples == 160


async def test_a_clip_whose_workers_are_killed_twice_fails() -> None:
    """A clip is retried once only: the system may have killed its workers because of the clip."""
    async with running(audio_workers=1) as pool:
        task = asyncio.create_task(prepare(pool, "sleep 10"))
        for killed in [1, 2]:
            await until(lambda: any(worker.task for worker in pool._workers))
            (victim,) = pool._workers
            os.kill(victim.process.pid, signal.SIGKILL)
            await until(lambda killed=killed: pool.deaths == killed)  # type: ignore[misc]
        with pytest.raises(errors.AudioUnreadable):
            await task
        assert pool.deaths == 2
        await until(lambda: len(pool._idle) == 1)
        assert pool.queued == 0


async def test_a_clip_meant_for_a_worker_that_has_just_died_goes_to_another() -> None:
    """A clip sent to a dead worker that the pool still counts as idle waits for the next worker."""
    async with running(audio_workers=1) as pool:
        (worker,) = pool._workers
        worker.process.kill()
        os.waitid(os.P_PID, worker.process.pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222 - the loop must not see it
        assert (await prepare(pool, "samples 160")).features.samples == 160


async def test_cpu_time_is_limited() -> None:
    """A clip that spins fails after its CPU time, and the message gives the reason."""
    async with running(audio_timeout_s=0.5) as pool:
        with pytest.raises(errors.AudioUnreadable, match="takes too long"):
            await prepare(pool, "spin")
        assert (await prepare(pool, "samples 160")).features.samples == 160


async def test_a_worker_that_hangs_without_using_cpu_is_ended() -> None:
    """A clip that hangs without CPU use fails after its limit of wall-clock time."""
    async with running(audio_timeout_s=0.2) as pool:
        with pytest.raises(errors.AudioUnreadable, match="takes too long"):
            await prepare(pool, "sleep 60")


async def test_many_short_clips_do_not_add_up_to_the_cpu_limit() -> None:
    """The CPU limit applies to each clip separately, and no time counts between clips."""
    async with running(audio_workers=1, audio_timeout_s=0.5) as pool:
        before = pids(pool)
        for _ in range(8):
            await prepare(pool, "burn 0.1")
        assert pids(pool) == before


async def test_a_bomb_dies_alone(pool: AudioWorkerPool) -> None:
    """A decoder that allocates more than a worker's memory limit fails only its clip."""
    with pytest.raises(errors.AudioUnreadable, match="memory"):
        await prepare(pool, "hoard 1000000000")
    assert (await prepare(pool, "samples 160")).features.samples == 160


async def test_clips_are_dispatched_only_within_the_memory_budget() -> None:
    """Clips wait while features fill the memory budget, and are dispatched when it is released."""
    mib_frames = 1024 * 1024 // FRAME_BYTES
    async with running(max_features_bytes=1024 * 1024) as pool, AsyncExitStack() as first:
        await first.enter_async_context(pool.prepare(say(f"samples {mib_frames * 160}")))
        order: list[int] = []

        async def follow(number: int) -> None:
            async with pool.prepare(say(f"samples {(number + 1) * 160}")) as prepared:
                order.append(prepared.features.samples // 160 - 1)
                assert prepared.queue_s >= 0.2

        followers = [asyncio.create_task(follow(number)) for number in range(5)]
        await asyncio.sleep(0.25)
        assert (pool.queued, pool.busy, order) == (5, 0, [])
        assert pool.outstanding_bytes == 1024 * 1024
        await first.aclose()
        await asyncio.gather(*followers)
        assert sorted(order) == list(range(5))
        assert (pool.queued, pool.busy, pool.outstanding_bytes) == (0, 0, 0)


async def test_one_worker_takes_clips_in_order() -> None:
    """Clips of equal size are served first in, first out."""
    async with running(audio_workers=1) as pool:
        order: list[int] = []

        async def follow(number: int) -> None:
            await prepare(pool, f"samples {number}")
            order.append(number)

        await asyncio.gather(*(follow(number) for number in range(160, 180)))
        assert order == list(range(160, 180))


async def test_small_clips_go_first(tmp_path: Path) -> None:
    """Queued clips are ordered by size, base64 text and files alike."""
    big = tmp_path / "big"
    big.write_text("samples 160" + " " * 5_000_000)
    async with running(audio_workers=1, max_audio_s=2400) as pool:
        order: list[str] = []

        async def follow(name: str, clip: str | Path) -> None:
            async with pool.prepare(clip):
                order.append(name)

        clips: dict[str, str | Path] = {
            "at work": say("sleep 0.3"),
            "big": big,
            "middle": say("samples 160" + " " * 500_000),
        }
        clips |= {"small": say("samples 160"), "small too": say("samples 170")}
        tasks = [asyncio.create_task(follow(*clip)) for clip in clips.items()]
        await asyncio.sleep(0.1)
        # 5 MB and 0.5 MB, estimated as if they were MP3.
        assert pool.queued_audio_s == pytest.approx(343.75, abs=1)
        await asyncio.gather(*tasks)
        assert order == ["at work", "small", "small too", "middle", "big"]
        assert pool.queued_audio_s == 0


async def test_a_big_clip_is_overtaken_for_a_bounded_time(tmp_path: Path) -> None:
    """Small clips that arrive long after a big one are served after it."""
    big = tmp_path / "big"
    big.write_text("samples 160" + " " * 500_000)  # counts as 31 s, which may be overtaken for 0.26 s
    async with running(audio_workers=1, max_audio_s=2400) as pool:
        order: list[str] = []

        async def follow(name: str, clip: str | Path) -> None:
            async with pool.prepare(clip):
                order.append(name)

        tasks = [asyncio.create_task(follow(*clip)) for clip in (("at work", say("sleep 1")), ("big", big))]
        await asyncio.sleep(0.1)
        tasks.append(asyncio.create_task(follow("soon", say("samples 160"))))
        await asyncio.sleep(0.4)
        tasks.append(asyncio.create_task(follow("late", say("samples 160"))))
        await asyncio.gather(*tasks)
        assert order == ["at work", "soon", "big", "late"]


@pytest.mark.parametrize("audio_workers", [1, 2, 3])
async def test_one_worker_is_kept_free_of_huge_clips(audio_workers: int, tmp_path: Path) -> None:
    """One worker takes no huge clips, however many are queued; a single worker takes them too."""
    huge = tmp_path / "huge"
    huge.write_text("sleep 1" + " " * 17_000_000)
    async with running(audio_workers=audio_workers, max_audio_s=2400) as pool:
        tasks = [asyncio.create_task(_prepare_file(pool, huge)) for _ in range(4)]
        await asyncio.sleep(0.05)
        assert pool.busy == max(1, audio_workers - 1)
        if audio_workers > 1:
            assert (await prepare(pool, "samples 160")).queue_s < 0.5
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _prepare_file(pool: AudioWorkerPool, clip: Path) -> None:
    async with pool.prepare(clip):
        pass


async def test_a_full_queue_refuses() -> None:
    """A clip beyond the bound of the queue is `Overloaded`, with the seconds until a retry."""
    async with running(audio_workers=1, max_audio_queue=3) as pool:
        tasks = [asyncio.create_task(prepare(pool, "sleep 0.3")) for _ in range(4)]
        await asyncio.sleep(0.05)
        with pytest.raises(errors.Overloaded) as refused:
            await prepare(pool, "samples 160")
        assert refused.value.reason == "audio_queue"
        assert 1 <= refused.value.retry_after_s <= 60
        await asyncio.gather(*tasks)
        assert (await prepare(pool, "samples 160")).features.samples == 160


async def test_cancelled_in_the_queue_a_clip_is_dropped(pool: AudioWorkerPool) -> None:
    """Cancelling a queued clip removes it from the queue at once."""
    tasks = [asyncio.create_task(prepare(pool, "sleep 0.5")) for _ in range(4)]
    await asyncio.sleep(0.05)
    assert (pool.queued, pool.busy) == (2, 2)
    tasks[3].cancel()
    await asyncio.wait(tasks[3:])
    assert (pool.queued, pool.busy) == (1, 2)
    await asyncio.gather(*tasks[:3])


async def test_two_hundred_cancelled_clips_leave_nothing(pool: AudioWorkerPool) -> None:
    """Cancelled at any moment, clips leave no descriptor, process, mapping or counted byte."""
    process = psutil.Process()
    await prepare(pool, "samples 16000")
    gc.collect()
    before = process.num_fds(), pids(pool), process.children()
    rng = random.Random(7)

    async def cancelled(number: int) -> None:
        task = asyncio.create_task(prepare(pool, f"sleep {rng.uniform(0, 0.01)}" if number % 2 else "samples 160000"))
        await asyncio.sleep(rng.uniform(0, 0.5))
        task.cancel()
        await asyncio.wait((task,))

    await asyncio.gather(*(cancelled(number) for number in range(200)))
    await until(lambda: len(pool._idle) == 2)
    gc.collect()
    assert (pool.queued, pool.busy, pool.outstanding_bytes) == (0, 0, 0)
    assert process.num_fds() <= before[0]
    assert pids(pool) == before[1]
    assert not [m for m in process.memory_maps() if "memfd:log-mel" in m.path]
    for pid in pids(pool):
        assert psutil.Process(pid).num_fds() < 10
    assert psutil.Process().children() == before[2]


async def test_a_worker_keeps_no_descriptor_of_a_failed_clip(pool: AudioWorkerPool) -> None:
    """Errors of every kind leave the worker with the descriptors that it had before."""
    before = {pid: psutil.Process(pid).num_fds() for pid in pids(pool)}
    for words in ("bug", "raise AudioEmpty", "hoard 1000000000", "samples 0") * 3:
        with contextlib.suppress(errors.CaptionerError):
            await prepare(pool, words)
    # A worker closes them just after its reply.
    await until(lambda: {pid: psutil.Process(pid).num_fds() for pid in pids(pool)} == before)


async def test_ten_megabytes_of_text_do_not_block_the_loop(pool: AudioWorkerPool) -> None:
    """The longest base64 text is sent in one piece, and other tasks keep running meanwhile."""
    text = say("samples 160" + " " * (7 * 1024 * 1024))
    pauses: list[float] = []

    async def tick() -> None:
        while True:
            before = time.thread_time()  # not wall-clock time, which includes other processes' load
            await asyncio.sleep(0)
            pauses.append(time.thread_time() - before)

    ticking = asyncio.create_task(tick())
    async with pool.prepare(text):
        pass
    ticking.cancel()
    assert max(pauses) < 0.1


async def test_a_worker_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers get none of the service's variables, and run their libraries on one thread."""
    monkeypatch.setenv("CAPTIONER_UPLOAD_SECRET", "squeamish ossifrage")
    async with running(audio_workers=1) as pool:
        with pytest.raises(errors.AudioUnreadable) as environment:
            await prepare(pool, "environment")
        assert "squeamish" not in str(environment.value)
        assert "('OMP_NUM_THREADS', '1')" in str(environment.value)


def test_a_worker_is_light() -> None:
    """A worker imports neither torch nor vLLM, nor any module of the server."""
    program = "import serving.audio.worker, sys; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    loaded = set(output.split())
    assert {"serving.audio.decode", "serving.audio.features"} <= loaded
    assert not loaded & {
        "torch",
        "vllm",
        "transformers",
        "pydantic",
        "aiohttp",
        "serving.config",
        "serving.audio.worker_pool",
    }


async def test_real_workers_equal_decoder_and_features(tmp_path: Path) -> None:
    """The real program equals decoder and features for a file and for base64, and refuses text that is no audio."""
    clip = tmp_path / "clip"
    tone = np.sin(np.arange(44_100) * 0.05).astype(np.float32) / 2
    soundfile.write(clip, np.stack([tone, tone], axis=1), 44_100, format="FLAC")
    samples = decode(clip, max_duration_s=MAX_AUDIO_S)
    expected = log_mel(samples)
    pool = AudioWorkerPool(settings())
    await pool.start()
    try:
        for source in (clip, base64.b64encode(clip.read_bytes()).decode()):
            async with pool.prepare(source) as prepared:
                np.testing.assert_array_equal(prepared.features.log_mel, expected)
                assert prepared.features.samples == samples.size == 16_000
        with pytest.raises(errors.AudioUnreadable):
            await prepare(pool, "no audio at all")
        with pytest.raises(errors.AudioEmpty):
            await prepare(pool, "")
    finally:
        await pool.stop()


async def test_workers_leave_signals_to_the_pool(pool: AudioWorkerPool) -> None:
    """Ctrl-C and a group's SIGTERM do not end a worker."""
    before = pids(pool)
    for pid in before:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    await asyncio.gather(*(prepare(pool, "sleep 0.1") for _ in range(4)))
    assert pids(pool) == before


async def test_workers_yield_the_cores_to_the_service(pool: AudioWorkerPool) -> None:
    """Workers are nicer than the service, in its session, and in separate process groups.

    In another session Linux would weigh each worker as much as all the rest. The separate process group keeps the
    terminal's Ctrl-C from it.
    """
    for pid in pids(pool):
        assert os.getpriority(os.PRIO_PROCESS, pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 5)
        assert os.getsid(pid) == os.getsid(0)
        assert os.getpgid(pid) == pid


async def test_stopping_ends_workers_and_clips() -> None:
    """Clips under way or in the queue fail as `NotReady`, processes end, and a later clip is refused."""
    fds = psutil.Process().num_fds()
    async with running() as pool:
        tasks = [asyncio.create_task(prepare(pool, "sleep 30")) for _ in range(4)]
        await asyncio.sleep(0.05)
        processes = [psutil.Process(pid) for pid in pids(pool)]
        await pool.stop()
        for task in tasks:
            with pytest.raises(errors.NotReady):
                await task
        assert not any(process.is_running() for process in processes)
        with pytest.raises(errors.NotReady):
            await prepare(pool, "samples 160")
    assert psutil.Process().num_fds() <= fds


async def test_a_worker_that_cannot_start_fails_the_start() -> None:
    """A broken installation fails the start, and is not retried for ever."""
    pool = AudioWorkerPool(settings(), program=("-c", "raise SystemExit(3)"))
    with pytest.raises(errors.Internal):
        await pool.start()
    await pool.stop()


ORPHANS = """
import asyncio, sys
from tests.audio.test_workers import PUPPET, say, settings
from serving.audio.worker_pool import AudioWorkerPool

async def main():
    pool = AudioWorkerPool(settings(), program=("-c", PUPPET))
    await pool.start()
    print(*(worker.process.pid for worker in pool._workers), flush=True)
    async with pool.prepare(say("sleep 60")):
        pass

asyncio.run(main())
"""


def test_workers_die_with_the_pool() -> None:
    """`kill -9` of the service leaves no worker behind, idle or at work."""
    with subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True) as service:
        assert service.stdout
        workers = [psutil.Process(int(pid)) for pid in service.stdout.readline().split()]
        assert len(workers) == 2
        time.sleep(0.2)
        service.kill()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE]


def every_error() -> list[errors.CaptionerError]:
    """Return one error of each class of the tree, with every attribute set."""
    kinds = [errors.CaptionerError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    special = {
        errors.ModelNotFound: errors.ModelNotFound("gpt"),
        errors.MethodNotAllowed: errors.MethodNotAllowed("GET"),
        errors.InvalidRequest: errors.InvalidRequest("wrong", param="top_p"),
        errors.Overloaded: errors.Overloaded("full", retry_after_s=9, reason="bodies"),
    }
    limits = {"limit": "requests_per_minute", "retry_after_s": 3}
    plain = [kind for kind in kinds if kind not in special]
    return [
        *special.values(),
        *(kind("message", **(limits if issubclass(kind, errors.RateLimited) else {})) for kind in plain),
    ]


@pytest.mark.parametrize("error", every_error(), ids=lambda error: type(error).__name__)
def test_every_error_crosses_a_process_border(error: errors.CaptionerError) -> None:
    """Pickled and back, an error has its class, its message and its attributes."""
    back = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    assert (type(back), str(back), vars(back)) == (type(error), str(error), vars(error))
