"""The product's own start of an engine with the CUDA build: what its processes hold of the service's.

Without a GPU the start fails; the processes exist before that.
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import psutil

from serving.config import Settings
from serving.engine.vllm import engine as engine_module
from serving.engine.vllm.engine import _environment
from serving.errors import EngineFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

_PROCESSES = 2
"""multiprocessing's own helper, and the engine."""
_WATCH_S = 5.0


def run(fault: str = "") -> dict[str, Any]:
    """Start an engine while a listener is open and an accepted connection; return what the children held of them."""
    with patch.object(engine_module, "_environment", _forking if fault == "fork" else engine_module._environment):
        return asyncio.run(_started())


@contextmanager
def _forking(*arguments: Any) -> Iterator[None]:
    with _environment(*arguments):
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        yield


async def _started() -> dict[str, Any]:
    await asyncio.to_thread(_import_with_gpu)
    listener = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listener.getsockname())
    accepted, _ = listener.accept()
    ours = {f"socket:[{os.fstat(each.fileno()).st_ino}]" for each in (listener, accepted, client)}
    engine = engine_module.VllmEngine(Settings(enforce_eager=True))
    starting = asyncio.create_task(engine.start())
    seen: dict[int, set[str]] = {}
    first_seen = 0.0
    while (
        not starting.done()
        and not any(seen.values())
        and (len(seen) < _PROCESSES or monotonic() < first_seen + _WATCH_S)
    ):
        for child in psutil.Process().children(recursive=True):
            with suppress(OSError):
                seen.setdefault(child.pid, set()).update(_open_files(child.pid) & ours)
        first_seen = first_seen or (monotonic() if len(seen) >= _PROCESSES else 0.0)
        await asyncio.sleep(0.02)
    await engine.stop()
    with suppress(EngineFailed):
        await starting
    return {"processes": len(seen), "holding": sum(map(bool, seen.values()))}


def _open_files(pid: int) -> set[str]:
    return {str(each.readlink()) for each in Path(f"/proc/{pid}/fd").iterdir()}


def _import_with_gpu() -> None:
    """Import vLLM as the engine does, with a GPU that is not there."""
    from tests.cuda.probe.gpu import pretend  # noqa: PLC0415

    pretend("h100-80g")
