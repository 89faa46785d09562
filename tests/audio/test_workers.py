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
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest
import soundfile

from serving import errors
from serving.audio.decode import decode
from serving.audio.features import log_mel
from serving.audio.worker_pool import AudioWorkerPool
from tests.audio.puppets import FRAME_BYTES, MAX_AUDIO_S, pids, prepare, running, say, settings, until

if TYPE_CHECKING:
    from pathlib import Path


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


async def test_two_hundred_cancelled_clips_leave_nothing(pool: AudioWorkerPool) -> None:
    """Cancelled at any moment, clips leave no descriptor, process, mapping or counted byte."""
    process = psutil.Process()
    await prepare(pool, "samples 16000")
    gc.collect()
    before = process.num_fds(), pids(pool), process.children()

    def mapped() -> set[str]:
        gc.collect()
        return {each.addr for each in process.memory_maps(grouped=False) if "memfd:log-mel" in each.path}

    earlier = mapped()  # other tests of this process may keep features
    rng = random.Random(7)

    async def cancelled(number: int) -> None:
        task = asyncio.create_task(prepare(pool, f"sleep {rng.uniform(0, 0.01)}" if number % 2 else "samples 160000"))
        await asyncio.sleep(rng.uniform(0, 0.5))
        task.cancel()
        await asyncio.wait((task,))

    await asyncio.gather(*(cancelled(number) for number in range(200)))
    await until(lambda: len(pool._idle) == 2, within_s=60)
    gc.collect()
    assert (pool.queued, pool.busy, pool.outstanding_bytes) == (0, 0, 0)
    assert process.num_fds() <= before[0]
    assert pids(pool) == before[1]

    await until(lambda: not mapped() - earlier, within_s=60)
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
from tests.audio.puppets import PUPPET, say, settings
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
