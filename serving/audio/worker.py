"""Audio worker: the program of a process that turns clips into log-mel features, one at a time.

    python -m serving.audio.worker FD MAX_DURATION_S CPU_S MEMORY_BYTES

FD is a Unix socket that keeps message boundaries; `worker_process.py` has its other end. The worker sends `{"missing"}`
when it is ready, with the protections that the kernel does not have, then answers each clip:

    ◄ {"encoding": "raw" or "base64"} and a descriptor of a file
    ► {"samples", "shape", "decode_s", "features_s"} and a memfd that holds the log-mel
    ◄ the same with "max_piece_s" and a second file, into which the pieces are to be written (`piece_file.py`)
    ► {"samples", "table_bytes", "decode_s", "features_s"}, or {"disk_full"}
    ► {"error", "message"}: an exception of our tree        ► {"traceback"}: any other

The worker parses strangers' bytes with large C libraries. Therefore it holds no secret, cannot open a file or a socket
(`sandbox.py`), its answers are data and never pickles, and it may die of a clip at any moment: of a crash, its CPU
limit, or its memory limit.
"""

from __future__ import annotations

import codecs
import ctypes
import json
import mmap
import os
import resource
import signal
import socket
import struct
import sys
import time
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from serving.audio import sandbox
from serving.audio.base64_text import decode_base64
from serving.audio.decode import decode
from serving.audio.features import frame_count, log_mel
from serving.audio.piece_file import most_bytes, table
from serving.audio.segment import cut
from serving.errors import AudioUnreadable, CaptionerError
from serving.types import MELS, SAMPLE_RATE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from io import BufferedReader

_MAX_MESSAGE_BYTES = 65_536
"""Upper bound of a message to a worker."""

_TRACEBACK_CHARS = 8_000
_NICENESS = 5
"""With all cores busy, running captions take precedence over arriving clips (deploy/adr/0004)."""
_PR_SET_PDEATHSIG = 1

_TRIAL_CLIPS = (
    b"#!AMR\n" + b"\x7c" * 9,
    struct.pack("<4sI8sIHHIIHH4sI", b"RIFF", 356, b"WAVEfmt ", 16, 1, 1, 16_000, 32_000, 2, 16, b"data", 320)
    + bytes(320),
)
"""A clip for each decoding library. At its first clip a library opens files that it then has."""

_CODECS = ("ascii", "cp1252", "latin-1", "utf-8-sig", "utf-16", "utf-16-be", "utf-16-le", "utf-32")
"""Text encodings, which Python loads from files when they are used first."""


def main(arguments: Sequence[str]) -> None:
    """Answer clips until the pool closes its end of the socket."""
    descriptor, max_duration_s, cpu_s, memory_bytes = arguments
    with socket.socket(fileno=int(descriptor)) as channel:
        missing = _confine(int(memory_bytes), float(max_duration_s))
        for stream in (1, 2):  # the service's output, in which a worker that was taken over could forge log lines
            os.dup2(0, stream)
        channel.send(json.dumps({"missing": missing}).encode())
        while True:
            message, descriptors, _, _ = socket.recv_fds(channel, _MAX_MESSAGE_BYTES, 2)
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


def _confine(memory_bytes: int, max_duration_s: float) -> list[str]:
    """Limit this process and enter its sandbox; return the protections that the kernel does not have."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal or systemd signals the whole group: the pool decides
        signal.signal(number, signal.SIG_IGN)
    # An idle worker ends when its socket is closed; this ends a busy one when the pool's thread is gone.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.nice(_NICENESS)
    # RLIMIT_DATA limits private memory only: mapping a large input or the features does not count.
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    with suppress(OSError):  # if the machine runs out of memory, a worker is the least loss
        Path("/proc/self/oom_score_adj").write_text("800")
    for codec in _CODECS:
        codecs.lookup(codec)
    _prepare_trial_clips()
    # The largest file holds the pieces of the longest clip, and two seconds for what codecs add.
    missing = sandbox.enter(memory_file_bytes=most_bytes(max_duration_s))
    _prepare_trial_clips()  # a library that does not bear the sandbox stops the start, not each clip
    return missing


def _prepare_trial_clips() -> None:
    for clip in _TRIAL_CLIPS:
        _, (features,) = _prepare(clip, 1.0, 0.0)
        os.close(features)
    cut(np.zeros(SAMPLE_RATE, np.float32), 1.0)  # opens the file of its weights


def _answer(task: dict[str, Any], descriptors: list[int], max_duration_s: float) -> tuple[dict[str, Any], list[int]]:
    """Return the reply, and the descriptors to send with it."""
    started_s, (clip, *into) = time.perf_counter(), descriptors
    prepare = partial(_cut, into[0], task["max_piece_s"]) if into else _prepare
    try:
        if task["encoding"] == "base64":
            return prepare(decode_base64(os.pread(clip, os.fstat(clip).st_size, 0)), max_duration_s, started_s)
        with open(clip, "rb", closefd=False) as file:
            return prepare(file, max_duration_s, started_s)
    except CaptionerError as error:
        return {"error": type(error).__name__, "message": str(error)}, []
    except MemoryError:
        return {"error": AudioUnreadable.__name__, "message": "The audio takes too much memory to decode"}, []
    except Exception:  # noqa: BLE001 - the pool logs it
        return {"traceback": traceback.format_exc()[-_TRACEBACK_CHARS:]}, []


def _prepare(clip: bytes | BufferedReader, max_duration_s: float, started_s: float) -> tuple[dict[str, Any], list[int]]:
    samples = decode(clip, max_duration_s=max_duration_s)
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


def _cut(
    into: int, max_piece_s: float, clip: bytes | BufferedReader, max_duration_s: float, started_s: float
) -> tuple[dict[str, Any], list[int]]:
    """Write the features of the clip's pieces into the file, and return the reply."""
    samples = decode(clip, max_duration_s=max_duration_s)
    decoded_s = time.perf_counter()
    pieces = cut(samples, max_piece_s)
    rows = table(pieces)
    try:
        os.ftruncate(into, 0)  # a worker that was killed may have written something
        os.lseek(into, 0, os.SEEK_SET)
        with open(into, "wb", closefd=False) as file:
            file.writelines(log_mel(samples[piece.audio_begin : piece.audio_end]).data for piece in pieces)
            file.write(rows)
    except OSError:
        return {"disk_full": True}, []
    return {
        "samples": samples.size,
        "table_bytes": len(rows),
        "decode_s": decoded_s - started_s,
        "features_s": time.perf_counter() - decoded_s,
    }, []


if __name__ == "__main__":
    main(sys.argv[1:])
