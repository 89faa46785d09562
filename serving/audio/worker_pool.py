"""Pool of audio workers: processes that decode, resample and make log-mel features, off the event loop and its GIL.

The pool sends each idle worker one clip at a time over a socket and maps the features that return in a memfd, so
nothing is copied and nothing has a name that could be left behind. No threads: the event loop watches the sockets. A
worker that dies takes its clip with it, and nothing else.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import signal
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serving import errors
from serving.audio.watchdog import LIVENESS_INTERVAL_S, Watchdog
from serving.audio.worker_process import Clip, receive_reply, send_clip, spawn
from serving.audio.worker_task import Prepared, Task, estimate_s
from serving.observability.cpu_time import CpuTime
from serving.scheduling.drain_rate import DrainRate
from serving.scheduling.fair_queue import FairQueue, shortest_first
from serving.scheduling.shared_capacity import SharedCapacity
from serving.types import NO_TENANT

__all__ = ("AudioWorkerPool", "Prepared")

if TYPE_CHECKING:
    import socket
    import subprocess
    from collections.abc import AsyncIterator, Sequence

    from serving.audio.piece_file import PieceFile
    from serving.config import Settings
    from serving.scheduling.shared_capacity import Permit
    from serving.types import SchedulingClass

_RESPAWN_DELAY_S = 1.0
"""Delay after a worker that could not even start, so that a broken installation does not spin."""

_WALL_PER_CPU = 4
"""Wall-clock limit of a clip, as a multiple of its CPU limit, for a worker that neither answers nor uses CPU."""

_HUGE_S = 1000.0
"""Length above which a clip is huge (16 MB): one worker, if there are two or more, takes no huge clip."""

_PATIENCE_S = 20.0
"""Bound on how long the longest clip is overtaken by shorter ones, and any clip by clips of a higher priority."""

_CLIP_COST_S, _TIMES_REALTIME = 0.005, 600
"""Expected time of a worker on a clip: a constant, and its length divided by this. The measured time replaces it."""

_EXHAUSTED = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS, errno.EAGAIN))
"""Errors of sending a clip that are a lack of resources at this moment. Any other is that of opening its file."""

_KILLED_FROM_OUTSIDE = -signal.SIGKILL, -signal.SIGTERM
"""Exit statuses that a clip cannot cause: a clip ends its worker in other ways (`worker.py`)."""

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Worker:
    process: subprocess.Popen[bytes]
    channel: socket.socket
    watchdog: Watchdog
    ready: bool = False
    task: Task | None = None


class AudioWorkerPool:
    """A pool of `settings.audio_workers` processes with one queue: fair between tenants, small clips of each first.

    Of several workers one takes no huge clip, so that small clips never wait for a huge one to end. At most
    `settings.max_audio_queue` clips wait; no tenant fills the whole queue.

    A clip is dispatched only while the features that wait for the engine use less than `settings.max_features_bytes`:
    memory is bounded by that and one longest clip per worker. No tenant gets all of that memory either.

    `program` is the command line of each process after the interpreter.
    """

    def __init__(self, settings: Settings, *, program: Sequence[str] = ("-m", "serving.audio.worker")) -> None:
        self._settings = settings
        self._program = program
        self._workers: set[_Worker] = set()
        self._idle: list[_Worker] = []  # a stack: the caches of the last one are warm
        self._queue: FairQueue[Task] = FairQueue(self._sort_key, patience_s=_PATIENCE_S, now_s=time.perf_counter)
        self._drain = DrainRate()
        self._features = SharedCapacity(settings.max_features_bytes)
        self._running = False
        self._liveness: asyncio.TimerHandle | None = None
        self._reported_missing = False
        self.deaths = 0
        self._busy_s = 0.0
        self._cpu = CpuTime()

    @property
    def queued(self) -> int:
        """Clips that wait for a worker."""
        return len(self._queue)

    @property
    def queued_audio_s(self) -> float:
        """Audio that waits for a worker, in seconds, estimated from its bytes."""
        return sum(task.audio_s for task in self._queue)

    @property
    def longest_wait_s(self) -> float:
        """Wait of the clip that has waited longest so far, in seconds; 0 if none waits."""
        now = time.perf_counter()
        return now - min((task.arrived_s for task in self._queue), default=now)

    @property
    def busy(self) -> int:
        """Workers that process a clip."""
        return sum(worker.task is not None for worker in self._workers)

    @property
    def busy_s(self) -> float:
        """Time that workers have spent on clips, in seconds, summed over workers."""
        now = time.perf_counter()
        return self._busy_s + sum(now - worker.task.started_s for worker in self._workers if worker.task)

    @property
    def cpu_s(self) -> float:
        """CPU time that all workers have used, in seconds, dead ones included."""
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
        self._liveness = self._loop.call_later(LIVENESS_INTERVAL_S, self._check_liveness)
        await self._all_ready

    async def stop(self) -> None:
        """Stop the processes; clips under way fail as `NotReady`. Idempotent."""
        self._running = False
        if self._liveness:
            self._liveness.cancel()
        workers, self._workers = self._workers, set()
        for worker in workers:
            self._disconnect(worker)
            worker.process.kill()
        for task in (*self._queue.clear(), *(worker.task for worker in workers if worker.task)):
            task.fail(errors.NotReady())
        self._idle.clear()
        for worker in workers:
            await asyncio.to_thread(worker.process.wait)

    @asynccontextmanager
    async def prepare(
        self, clip: Clip, scheduling_class: SchedulingClass = NO_TENANT, *, piece_file: PieceFile | None = None
    ) -> AsyncIterator[Prepared]:
        """Yield the features of a clip. Leaving the context releases their memory.

        With `piece_file` the clip is cut, and the features of its pieces are written into that file.

        `log_mel` is a private mapping, so `torch.from_numpy` takes it as it is (writable) and writes would stay here.
        Raises `AudioError` for the clip's faults, `NotReady` when the pool is stopped, `Overloaded` and `Internal`.

        Cancelled in the queue, the clip is dropped. Cancelled under way, the worker finishes and the result is
        discarded: that takes less CPU than a new process does, and no longer than the deadline.
        """
        if not self._running:
            raise errors.NotReady
        if isinstance(clip, str) and not clip.isascii():
            raise errors.InvalidAudioUrl
        now, audio_s = time.perf_counter(), min(estimate_s(clip), self._settings.max_audio_s)
        cost = _CLIP_COST_S + audio_s / _TIMES_REALTIME
        permit = self._features.permit(scheduling_class)
        task = Task(scheduling_class, clip, audio_s, cost, permit, self._loop.create_future(), now, piece_file)
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

    def hold(self, size_bytes: int, scheduling_class: SchedulingClass) -> Permit:
        """Hold memory for features that are read from elsewhere. Raises `Overloaded`."""
        return self._features.acquire(scheduling_class, size_bytes)

    def _dispatch(self) -> None:
        """Send queued clips to idle workers, as far as both and memory last."""
        while self._idle and (task := self._next_task()):
            worker = self._idle.pop()
            try:
                send_clip(worker.channel, task.clip, task.piece_file)
            except ConnectionError:
                # The worker died while idle; the loop will find its socket closed. The clip is not to blame.
                continue
            except OSError as error:
                log.exception("audio worker send failed", extra={"request_id": task.request_id})
                self._idle.append(worker)
                self._queue.discard(task)
                task.fail(errors.Overloaded() if error.errno in _EXHAUSTED else errors.Internal())
                continue
            self._queue.dequeue(task)
            task.started_s = time.perf_counter()
            self._drain.add(task.audio_s, task.started_s)
            task.queue_s = task.started_s - task.arrived_s
            worker.task = task
            worker.watchdog.arm(_WALL_PER_CPU * self._settings.audio_timeout_s)

    def _sort_key(self, task: Task) -> float:
        """Return the key that orders the clips of one tenant."""
        longest_s = self._settings.max_audio_s
        return shortest_first(task.arrived_s, task.audio_s, longest_s=longest_s, patience_s=_PATIENCE_S)

    def _next_task(self) -> Task | None:
        """Return the first clip in the order of service that can be dispatched now."""
        huge = sum(worker.task is not None and worker.task.audio_s > _HUGE_S for worker in self._workers)
        may_be_huge = huge < max(1, self._settings.audio_workers - 1)
        for task in self._queue.in_order():
            if (may_be_huge or task.audio_s <= _HUGE_S) and self._features.may_acquire(task.scheduling_class):
                return task
        return None

    def _on_readable(self, worker: _Worker) -> None:
        try:
            message, descriptors = receive_reply(worker.channel)
        except BlockingIOError:
            return
        if not message:
            self._replace(worker)
            return
        worker.watchdog.disarm()
        task, worker.task = worker.task, None
        if task:
            task.clip = ""
            self._account(task)
        self._idle.append(worker)
        if not worker.ready:
            worker.ready = True
            self._report_missing(json.loads(message).get("missing", []))
        if not self._all_ready.done() and sum(each.ready for each in self._workers) == self._settings.audio_workers:
            self._all_ready.set_result(None)
        if task and not task.answer.done():
            try:
                task.deliver(json.loads(message), descriptors)
            except Exception:
                log.exception("cannot use an audio worker's reply", extra={"request_id": task.request_id})
                task.fail(errors.Internal())
        for descriptor in descriptors:
            os.close(descriptor)
        self._dispatch()

    def _account(self, task: Task) -> None:
        """Record the worker's time on a clip, after the worker is done with it."""
        took_s = time.perf_counter() - task.started_s
        self._busy_s += took_s
        self._queue.correct_cost(task, took_s)

    def _spawn(self) -> None:
        if not self._running:
            return
        try:
            process, channel = spawn(self._settings, self._program)
        except OSError:
            log.exception("cannot start an audio worker")
            self._on_failed_start()
            return
        worker = _Worker(process, channel, Watchdog(process, self._loop))
        self._workers.add(worker)
        self._loop.add_reader(worker.channel, self._on_readable, worker)

    def _report_missing(self, protections: list[str]) -> None:
        """Log once that the kernel lacks protections of a worker's sandbox."""
        if protections and not self._reported_missing:
            self._reported_missing = True
            log.warning("audio workers lack protections that this kernel does not have", extra={"missing": protections})

    def _check_liveness(self) -> None:
        """Kill workers that are stopped, at work or idle; `_replace` follows as their sockets close."""
        for worker in self._workers:
            worker.watchdog.check()
        self._liveness = self._loop.call_later(LIVENESS_INTERVAL_S, self._check_liveness)

    def _replace(self, worker: _Worker) -> None:
        """Replace a dead worker. Its clip is queued once more, or fails if the clip is to blame."""
        self._workers.remove(worker)
        if worker in self._idle:
            self._idle.remove(worker)
        self._disconnect(worker)
        worker.process.kill()
        self._account_death(worker)
        status = worker.process.wait()
        request = {"request_id": worker.task.request_id} if worker.task else {}
        log.warning("audio worker died", extra={"exit_status": status, "at_work": bool(request), **request})
        killed = status in _KILLED_FROM_OUTSIDE and not worker.watchdog.expired
        if worker.ready:
            self._spawn()
        elif killed:
            self._loop.call_later(_RESPAWN_DELAY_S, self._spawn)
        else:
            self._on_failed_start()
        if task := worker.task:
            if killed and not task.retried and not task.answer.done():
                task.retried = True
                self._queue.add(task)
                self._dispatch()
                return
            too_long = worker.watchdog.expired or status == -signal.SIGPROF
            task.fail(errors.AudioUnreadable("The audio takes too long to decode" if too_long else None))

    def _account_death(self, worker: _Worker) -> None:
        """Count a dead worker and the time it used; call it before its process is waited for."""
        self.deaths += 1
        if worker.task:
            self._account(worker.task)
        with suppress(ChildProcessError):
            os.waitid(os.P_PID, worker.process.pid, os.WEXITED | os.WNOWAIT)
        self._cpu.sample([worker.process.pid, *(other.process.pid for other in self._workers)])

    def _on_failed_start(self) -> None:
        if not self._all_ready.done():
            self._all_ready.set_exception(errors.Internal())
        else:
            self._loop.call_later(_RESPAWN_DELAY_S, self._spawn)

    def _disconnect(self, worker: _Worker) -> None:
        self._loop.remove_reader(worker.channel)
        worker.channel.close()
        worker.watchdog.disarm()
