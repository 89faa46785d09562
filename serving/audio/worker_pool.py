"""The audio workers: processes that decode, resample and make log-mel features, off the event loop and its GIL.

The pool's side. It hands each idle worker one clip at a time over a socket and maps the features that come back in a
memfd, so nothing is copied and nothing has a name that could be left behind. No threads: the event loop watches the
sockets. A worker that dies takes its clip with it, and nothing else.
"""

from __future__ import annotations

import asyncio
import json
import logging
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from serving import errors
from serving.observability.context import REQUEST_ID
from serving.observability.cpu_time import CpuTime
from serving.scheduling.drain_rate import DrainRate
from serving.scheduling.fair_queue import FairQueue, shortest_first
from serving.scheduling.shared_capacity import SharedCapacity
from serving.types import NO_TENANT, SAMPLE_RATE, Features

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from serving.config import Settings
    from serving.scheduling.shared_capacity import Permit
    from serving.types import SchedulingClass

_MESSAGE_BYTES = 65_536
"""No message from a worker is longer."""

_RESPAWN_DELAY_S = 1.0
"""Wait after a worker that could not even start, lest a broken installation spins."""

_WALL_PER_CPU = 4
"""A worker that neither answers nor burns CPU is given this many times its CPU limit."""

_PRIVATE_BYTES = 512 * 1024 * 1024
_WAVEFORM_COPIES = 4
"""A worker may hold this much memory, and this many copies of the longest waveform."""

_BYTES_PER_S = 16_000
"""How long a clip may be is guessed from its bytes, as if all were MP3 of 128 kb/s: nothing better is known yet."""

_HUGE_S = 1000.0
"""One worker, if there are two or more, takes no clip that looks longer than this (16 MB)."""

_PATIENCE_S = 20.0
"""For at most this long the longest clip is overtaken by shorter ones, and any clip by those of a higher priority."""

_CLIP_COST_S, _TIMES_REALTIME = 0.005, 600
"""A clip is expected to take a worker so long, and that part of its length. What it did take is known afterwards."""

_ENDED_FROM_OUTSIDE = -signal.SIGKILL, -signal.SIGTERM
"""Statuses of a worker that its clip did not end: what a clip may do to its worker ends in other ways (`worker.py`)."""

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """One clip's features, and how long each stage took in seconds. `queue_s` is the wait for a worker."""

    features: Features
    queue_s: float
    decode_s: float
    features_s: float


@dataclass(eq=False, slots=True)
class _Task:
    scheduling_class: SchedulingClass
    clip: str | Path
    audio_s: float
    """A guess."""
    cost: float
    """Seconds of a worker: what is expected of it, then what it took."""
    permit: Permit
    """Memory of the features, held from their arrival until the context is left."""
    answer: asyncio.Future[Prepared]
    arrived_s: float
    queue_s: float = 0.0
    began: float = 0.0
    again: bool = False
    """Its first worker was ended from outside."""
    request_id: str = field(default_factory=REQUEST_ID.get)


@dataclass(eq=False, slots=True)
class _Worker:
    process: subprocess.Popen[bytes]
    link: socket.socket
    ready: bool = False
    task: _Task | None = None
    deadline: asyncio.TimerHandle | None = None


class AudioWorkerPool:
    """A pool of `settings.audio_workers` processes with one queue: tenants take turns, small clips of each first.

    Of several workers one takes no huge clip, so that small ones never wait for one to end. At most
    `settings.max_audio_queue` clips wait; no tenant's take the whole queue.

    A clip is dispatched only while the features that wait for the engine take less than `settings.max_features_bytes`:
    memory is bounded by that and one longest clip per worker. Of that, too, no tenant's take all.

    `program` is what each process runs, after the interpreter.
    """

    def __init__(self, settings: Settings, *, program: Sequence[str] = ("-m", "serving.audio.worker")) -> None:
        self._settings = settings
        self._program = program
        self._workers: set[_Worker] = set()
        self._idle: list[_Worker] = []  # a stack: the caches of the last one are warm
        self._queue: FairQueue[_Task] = FairQueue(self._order, patience_s=_PATIENCE_S, now_s=time.perf_counter)
        self._drain = DrainRate()
        self._features = SharedCapacity(settings.max_features_bytes)
        self._running = False
        self.deaths = 0
        self._busy_s = 0.0
        self._cpu = CpuTime()

    @property
    def queued(self) -> int:
        """Clips that wait for a worker."""
        return len(self._queue)

    @property
    def queued_audio_s(self) -> float:
        """How much audio waits for a worker, in seconds: a guess from its bytes."""
        return sum(task.audio_s for task in self._queue)

    @property
    def longest_wait_s(self) -> float:
        """How long the clip that has waited longest has done so; 0 if none waits."""
        now = time.perf_counter()
        return now - min((task.arrived_s for task in self._queue), default=now)

    @property
    def busy(self) -> int:
        """Workers at work."""
        return sum(worker.task is not None for worker in self._workers)

    @property
    def busy_s(self) -> float:
        """How long workers have been at work, all together."""
        now = time.perf_counter()
        return self._busy_s + sum(now - worker.task.began for worker in self._workers if worker.task)

    @property
    def cpu_s(self) -> float:
        """CPU time that all workers have used, those that have died included."""
        return self._cpu.sample(worker.process.pid for worker in self._workers)

    @property
    def outstanding_bytes(self) -> int:
        """Memory of features whose contexts have not been left."""
        return self._features.used

    async def start(self) -> None:
        """Start the processes and wait until each is ready. Raises `Internal` if one cannot start.

        They die with the thread that starts them, so call it on the thread whose loop will stop them.
        """
        self._loop = asyncio.get_running_loop()
        self._all_ready: asyncio.Future[None] = self._loop.create_future()
        self._running = True
        for _ in range(self._settings.audio_workers):
            self._spawn()
        await self._all_ready

    async def stop(self) -> None:
        """End the processes; clips under way fail as `NotReady`. Idempotent."""
        self._running = False
        workers, self._workers = self._workers, set()
        for worker in workers:
            self._disconnect(worker)
            worker.process.kill()
        for task in (*self._queue.clear(), *(worker.task for worker in workers if worker.task)):
            _fail(task, errors.NotReady())
        self._idle.clear()
        for worker in workers:
            await asyncio.to_thread(worker.process.wait)

    @asynccontextmanager
    async def prepare(self, clip: str | Path, scheduling_class: SchedulingClass = NO_TENANT) -> AsyncIterator[Prepared]:
        """Features of a clip: base64 text, or the path of a file. Leaving the context gives their memory back.

        `share` says whose clip it is.

        `log_mel` is a private mapping, so `torch.from_numpy` takes it as it is (writable) and writes would stay here.
        Raises `AudioError` for the clip's faults, `NotReady` when the pool is stopped, `Overloaded` and `Internal`.

        Cancelled in the queue, the clip is dropped. Cancelled under way, the worker finishes and the result is
        discarded: that takes less CPU than a new process does, and no longer than the deadline.
        """
        if not self._running:
            raise errors.NotReady
        if isinstance(clip, str) and not clip.isascii():  # noqa: ASYNC240 - a string, not a path
            raise errors.InvalidAudioUrl
        now, audio_s = time.perf_counter(), min(_guess_s(clip), self._settings.max_audio_s)
        cost = _CLIP_COST_S + audio_s / _TIMES_REALTIME
        permit = self._features.permit(scheduling_class)
        task = _Task(scheduling_class, clip, audio_s, cost, permit, self._loop.create_future(), now)
        del clip  # up to 10 MiB that nobody needs once a worker is done with it
        self._queue.add(task)
        if not self._queue.fits(task, self._settings.max_audio_queue):
            self._queue.discard(task)
            retry_after_s = self._drain.retry_after_s(self.queued_audio_s, now)
            raise errors.Overloaded(retry_after_s=retry_after_s, reason="audio_queue")
        self._dispatch()
        try:
            yield await task.answer
        finally:
            self._queue.discard(task)
            task.permit.release()
            self._dispatch()

    def _dispatch(self) -> None:
        while self._idle and (task := self._first()):
            worker = self._idle.pop()
            try:
                _send(worker.link, task.clip)
            except ConnectionError:
                # It died while idle, and the loop will learn it from the socket. The clip is not to blame.
                continue
            except OSError:
                log.exception("a clip could not be handed to an audio worker", extra={"request_id": task.request_id})
                self._idle.append(worker)
                self._queue.discard(task)
                _fail(task, errors.Overloaded())
                continue
            self._queue.dequeue(task)
            self._drain.add(task.audio_s, time.perf_counter())
            task.began = time.perf_counter()
            task.queue_s = task.began - task.arrived_s
            worker.task = task
            worker.deadline = self._loop.call_later(
                _WALL_PER_CPU * self._settings.audio_timeout_s, worker.process.send_signal, signal.SIGPROF
            )

    def _order(self, task: _Task) -> float:
        """The order of what waits of one tenant, as a key."""
        longest_s = self._settings.max_audio_s
        return shortest_first(task.arrived_s, task.audio_s, longest_s=longest_s, patience_s=_PATIENCE_S)

    def _first(self) -> _Task | None:
        """The clip whose turn it is."""
        huge = sum(worker.task is not None and worker.task.audio_s > _HUGE_S for worker in self._workers)
        room_for_huge = huge < max(1, self._settings.audio_workers - 1)
        for task in self._queue.in_order():
            if (room_for_huge or task.audio_s <= _HUGE_S) and self._features.may_acquire(task.scheduling_class):
                return task
        return None

    def _read(self, worker: _Worker) -> None:
        try:
            message, descriptors, _, _ = socket.recv_fds(worker.link, _MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            message, descriptors = b"", []
        if not message:
            self._replace(worker)
            return
        if worker.deadline:
            worker.deadline.cancel()
        task, worker.task = worker.task, None
        if task:
            task.clip = ""
            self._account(task)
        self._idle.append(worker)
        worker.ready = True
        if not self._all_ready.done() and sum(each.ready for each in self._workers) == self._settings.audio_workers:
            self._all_ready.set_result(None)
        if task and not task.answer.done():
            try:
                self._deliver(task, json.loads(message), descriptors)
            except Exception:
                log.exception("an audio worker's answer could not be taken", extra={"request_id": task.request_id})
                _fail(task, errors.Internal())
        for descriptor in descriptors:
            os.close(descriptor)
        self._dispatch()

    def _account(self, task: _Task) -> None:
        """Its worker is done with it."""
        took_s = time.perf_counter() - task.began
        self._busy_s += took_s
        self._queue.correct_cost(task, took_s)

    def _deliver(self, task: _Task, reply: dict[str, Any], descriptors: list[int]) -> None:
        if "traceback" in reply:
            log.error("an audio worker failed\n%s", reply["traceback"], extra={"request_id": task.request_id})
            _fail(task, errors.Internal())
        elif "error" in reply:
            _fail(task, _audio_error(reply["error"], reply["message"]))
        else:
            mels, frames = reply["shape"]
            nbytes = 4 * mels * frames
            memory = mmap.mmap(descriptors[0], nbytes, mmap.MAP_PRIVATE)
            log_mel = np.frombuffer(memory, np.float32).reshape(mels, frames)
            task.permit.count(nbytes)
            task.answer.set_result(
                Prepared(Features(log_mel, reply["samples"]), task.queue_s, reply["decode_s"], reply["features_s"])
            )

    def _spawn(self) -> None:
        if not self._running:
            return
        settings = self._settings
        memory_bytes = _PRIVATE_BYTES + _WAVEFORM_COPIES * 4 * int(SAMPLE_RATE * settings.max_audio_s)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = theirs.fileno(), settings.max_audio_s, settings.audio_timeout_s, memory_bytes
        try:
            process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-P", *self._program, *map(str, arguments)],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env=_environment(),
                # The terminal's Ctrl-C is not for it, not even while it starts. Not a session, between which Linux may
                # share the cores alike, whatever their niceness.
                process_group=0,
            )
        except OSError:
            ours.close()
            log.exception("no audio worker could be started")
            self._not_started()
            return
        finally:
            theirs.close()
        ours.settimeout(0)
        worker = _Worker(process, ours)
        self._workers.add(worker)
        self._loop.add_reader(ours, self._read, worker)

    def _replace(self, worker: _Worker) -> None:
        """Bury a dead worker and start another; its clip goes to one more, or fails if it is to blame."""
        self._workers.remove(worker)
        if worker in self._idle:
            self._idle.remove(worker)
        self._disconnect(worker)
        worker.process.kill()
        self._see_end(worker)
        status = worker.process.wait()
        whose = {"request_id": worker.task.request_id} if worker.task else {}
        log.warning("an audio worker died", extra={"exit_status": status, "at_work": bool(whose), **whose})
        if worker.ready:
            self._spawn()
        else:
            self._not_started()
        if task := worker.task:
            if status in _ENDED_FROM_OUTSIDE and not task.again and not task.answer.done():
                task.again = True
                self._queue.add(task)
                self._dispatch()
                return
            too_long = status == -signal.SIGPROF
            _fail(task, errors.AudioUnreadable("The audio takes too long to decode" if too_long else None))

    def _see_end(self, worker: _Worker) -> None:
        """Count what a worker that has died leaves: to be called before anyone waits for its process."""
        self.deaths += 1
        if worker.task:
            self._account(worker.task)
        with suppress(ChildProcessError):
            os.waitid(os.P_PID, worker.process.pid, os.WEXITED | os.WNOWAIT)
        self._cpu.sample([worker.process.pid, *(other.process.pid for other in self._workers)])

    def _not_started(self) -> None:
        if not self._all_ready.done():
            self._all_ready.set_exception(errors.Internal())
        else:
            self._loop.call_later(_RESPAWN_DELAY_S, self._spawn)

    def _disconnect(self, worker: _Worker) -> None:
        self._loop.remove_reader(worker.link)
        worker.link.close()
        if worker.deadline:
            worker.deadline.cancel()


def _guess_s(clip: str | Path) -> float:
    """How long a clip may be, in seconds."""
    try:
        clip_bytes = clip.stat().st_size if isinstance(clip, Path) else len(clip) * 3 // 4
    except OSError:
        return 0.0  # the worker will tell
    return clip_bytes / _BYTES_PER_S


def _send(link: socket.socket, clip: str | Path) -> None:
    if isinstance(clip, Path):
        link.send(json.dumps({"path": str(clip)}).encode())
        return
    with open(os.memfd_create("base64"), "wb", buffering=0) as text:  # noqa: PTH123 - a descriptor, not a path
        text.write(clip.encode("ascii"))
        socket.send_fds(link, [b"{}"], [text.fileno()])


def _fail(task: _Task, error: errors.CaptionerError) -> None:
    if not task.answer.done():
        task.answer.set_exception(error)


def _audio_error(name: str, message: str) -> errors.CaptionerError:
    """The exception that a worker named. The codecs of a clip have only audio errors to raise."""
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, errors.AudioError):
        return kind(message)
    log.error("an audio worker raised %s: %s", name, message)
    return errors.Internal()


def _environment() -> dict[str, str]:
    """Ours less our secrets; modules are found where this process finds them, and libraries use one thread."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("CAPTIONER_")}
    return {**ours, **_ONE_THREAD, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
