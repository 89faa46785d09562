"""Audio worker: the program of a process that turns clips into log-mel features, one at a time.

    python -m serving.audio.worker FD MAX_DURATION_S CPU_S MEMORY_BYTES

FD is a Unix socket that keeps message boundaries; `worker_process.py` has its other end. The worker sends `{}` when it
is ready, then answers each clip:

    ◄ {"path": …}, or {} and a memfd that holds base64 text
    ► {"samples", "shape", "decode_s", "features_s"} and a memfd that holds the log-mel
    ► {"error", "message"}: an exception of our tree        ► {"traceback"}: any other

The worker parses strangers' bytes with large C libraries. Therefore it holds no secret, its answers are data and never
pickles, and it may die of a clip at any moment: of a crash, its CPU limit, or its memory limit.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import resource
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from serving.audio.base64_text import decode_base64
from serving.audio.decode import decode
from serving.audio.features import frame_count, log_mel
from serving.errors import AudioUnreadable, CaptionerError
from serving.types import MELS

if TYPE_CHECKING:
    from collections.abc import Sequence

_MAX_MESSAGE_BYTES = 65_536
"""Upper bound of a message to a worker."""

_TRACEBACK_CHARS = 8_000
_NICENESS = 5
"""With all cores busy, running captions take precedence over arriving clips (deploy/adr/0004)."""
_PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str]) -> None:
    """Answer clips until the pool closes its end of the socket."""
    descriptor, max_duration_s, cpu_s, memory_bytes = arguments
    _confine(int(memory_bytes))
    with socket.socket(fileno=int(descriptor)) as channel:
        channel.send(b"{}")
        while True:
            message, descriptors, _, _ = socket.recv_fds(channel, _MAX_MESSAGE_BYTES, 1)
            if not message:
                return
            signal.setitimer(signal.ITIMER_PROF, float(cpu_s))  # when it runs out, SIGPROF ends the process
            reply, features = _answer(json.loads(message), descriptors, float(max_duration_s))
            signal.setitimer(signal.ITIMER_PROF, 0)
            try:
                socket.send_fds(channel, [json.dumps(reply).encode()], features)
            finally:
                for fd in (*descriptors, *features):
                    os.close(fd)


def _confine(memory_bytes: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal or systemd signals the whole group: the pool decides
        signal.signal(number, signal.SIG_IGN)
    # An idle worker ends when its socket is closed; this ends a busy one when the pool's thread is gone.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(_NICENESS)
    # RLIMIT_DATA limits private memory only: mapping a large input or the features does not count.
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    with suppress(OSError):  # if the machine runs out of memory, a worker is the least loss
        Path("/proc/self/oom_score_adj").write_text("800")


def _answer(task: dict[str, str], descriptors: list[int], max_duration_s: float) -> tuple[dict[str, Any], list[int]]:
    """Return the reply, and the descriptors to send with it."""
    try:
        return _prepare(Path(task["path"]) if "path" in task else descriptors[0], max_duration_s)
    except CaptionerError as error:
        return {"error": type(error).__name__, "message": str(error)}, []
    except MemoryError:
        return {"error": AudioUnreadable.__name__, "message": "The audio takes too much memory to decode"}, []
    except Exception:  # noqa: BLE001 - the pool logs it
        return {"traceback": traceback.format_exc()[-_TRACEBACK_CHARS:]}, []


def _prepare(clip: Path | int, max_duration_s: float) -> tuple[dict[str, Any], list[int]]:
    started_s = time.perf_counter()
    source = clip if isinstance(clip, Path) else decode_base64(os.pread(clip, os.fstat(clip).st_size, 0))
    samples = decode(source, max_duration_s=max_duration_s)
    decoded_s = time.perf_counter()
    shape = MELS, frame_count(samples.size)
    size = 4 * MELS * shape[1]
    descriptor = os.memfd_create("log-mel")
    try:
        os.ftruncate(descriptor, size)
        log_mel(samples, out=np.frombuffer(mmap.mmap(descriptor, size), np.float32).reshape(shape))
    except BaseException:
        os.close(descriptor)
        raise
    done_s = time.perf_counter()
    return {
        "samples": samples.size,
        "shape": shape,
        "decode_s": decoded_s - started_s,
        "features_s": done_s - decoded_s,
    }, [descriptor]


if __name__ == "__main__":
    main(sys.argv[1:])
