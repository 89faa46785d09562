"""Decoding in a separate process, to observe crashes and memory."""

from __future__ import annotations

import multiprocessing
import resource
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serving.audio.decode import decode
from serving.errors import AudioError

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from pathlib import Path

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([__name__, "pytest"])  # the main module, too, is imported in each process


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of decoding: the samples or the error, and the memory used in addition to the waveform."""

    samples: int
    error: AudioError | None
    memory_mib: float


def isolated(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a new process and return its result. Raises `ProcessLookupError` if the process died."""
    ours, theirs = _processes.Pipe(duplex=False)
    process = _processes.Process(target=_call, args=(theirs, function, args))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        raise ProcessLookupError(f"{function.__name__}{args}: exit status {process.exitcode}") from None
    finally:
        process.join()
        ours.close()


def outcome(path: Path, max_duration_s: float) -> Outcome:
    """Decode a file in a new process."""
    result: Outcome = isolated(_decode, path, max_duration_s)
    return result


def _call(connection: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    connection.send(function(*args))


def _decode(path: Path, max_duration_s: float) -> Outcome:
    decode(b"#!AMR\n" + b"\x7c" * 9, max_duration_s=1)  # libraries allocate their permanent memory now
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    samples, error = 0, None
    try:
        samples = decode(path, max_duration_s=max_duration_s).size
    except AudioError as problem:
        error = problem
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return Outcome(samples, error, grown / 1024 - 4 * samples / 2**20)
