"""One audio worker from the pool's side: its process, and the socket that carries clips there and features back.

`worker.py` is the program in the process and documents the messages.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from serving import errors
from serving.types import SAMPLE_RATE, Features

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serving.audio.piece_file import PieceFile
    from serving.config import Settings

Clip = str | bytes | Path
"""Base64 text, the bytes of a file, or the path of a file."""

MAX_MESSAGE_BYTES = 65_536
"""Upper bound of a message from a worker."""

_PRIVATE_BYTES = 512 * 1024 * 1024
_WAVEFORM_COPIES = 4
"""Memory limit of a worker: `_PRIVATE_BYTES`, and this many copies of the longest waveform."""

_ENVIRONMENT = frozenset(
    ("LANG", "LANGUAGE", "LD_LIBRARY_PATH", "MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_", "PATH", "PYTHONHOME", "TZ")
)
"""Variables that a worker gets, apart from `LC_…`. Any other may be a secret: of the service, of Ray, of a cloud."""

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

log = logging.getLogger(__name__)


def spawn(settings: Settings, program: Sequence[str]) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a worker; return its process and our end of its socket, which does not block. Raises `OSError`."""
    memory_bytes = _PRIVATE_BYTES + _WAVEFORM_COPIES * 4 * int(SAMPLE_RATE * settings.max_audio_s)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    arguments = theirs.fileno(), settings.max_audio_s, settings.audio_timeout_s, memory_bytes
    try:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-P", *program, *map(str, arguments)],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            env=_environment(),
            # The terminal's Ctrl-C must not reach the worker, not even while it starts. No new session: Linux may
            # divide the cores equally between sessions, whatever their niceness.
            process_group=0,
        )
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
    ours.settimeout(0)
    return process, ours


def send_clip(channel: socket.socket, clip: Clip, piece_file: PieceFile | None = None) -> None:
    """Send a clip: its file, opened here since a worker opens none, or bytes or base64 text in a memfd.

    With `piece_file` the clip is to be cut, and its pieces are to be written into that file. Raises `OSError`.
    """
    task, further = (
        ({}, []) if piece_file is None else ({"max_piece_s": piece_file.max_piece_s}, [piece_file.descriptor])
    )
    if isinstance(clip, Path):
        with clip.open("rb", buffering=0) as file:
            socket.send_fds(channel, [json.dumps({"encoding": "raw", **task}).encode()], [file.fileno(), *further])
        return
    data, encoding = (clip, "raw") if isinstance(clip, bytes) else (clip.encode("ascii"), "base64")
    with open(os.memfd_create("clip"), "wb", buffering=0) as file:  # noqa: PTH123 - a descriptor, not a path
        file.write(data)
        file.seek(0)  # the worker has the same position
        socket.send_fds(channel, [json.dumps({"encoding": encoding, **task}).encode()], [file.fileno(), *further])


def receive_reply(channel: socket.socket) -> tuple[bytes, list[int]]:
    """Receive a message and its descriptors; an empty message means that the worker is dead.

    Raises `BlockingIOError` if there is no message.
    """
    try:
        message, descriptors, _, _ = socket.recv_fds(channel, MAX_MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
    except BlockingIOError:
        raise
    except OSError:
        return b"", []
    return message, descriptors


def map_features(reply: dict[str, Any], descriptor: int) -> Features:
    """Map the features that a memfd holds. The mapping is private: a write to it stays in this process."""
    mels, frames = reply["shape"]
    memory = mmap.mmap(descriptor, 4 * mels * frames, mmap.MAP_PRIVATE)
    return Features(np.frombuffer(memory, np.float32).reshape(mels, frames), reply["samples"])


def audio_error(name: str, message: str) -> errors.CaptionerError:
    """Return the exception that a worker named. A worker has only audio errors to raise; any other is `Internal`."""
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, errors.AudioError):
        return kind(message)
    log.error("audio worker raised an unexpected error", extra={"error": name, "reason": message})
    return errors.Internal()


def _environment() -> dict[str, str]:
    """Return the environment of a worker: allowed variables, our module path, and one thread for each library."""
    ours = {name: value for name, value in os.environ.items() if name in _ENVIRONMENT or name.startswith("LC_")}
    return {**ours, **_ONE_THREAD, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
