"""What runs the model inside vLLM's own process; vLLM imports this there by name.

vLLM's engine process does not notice when the service dies without a word (SIGKILL, out of memory): it would keep its
memory, or its GPUs, for ever. These executors end it.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import signal
import threading
import time

from vllm.platforms import current_platform
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from serving.engine.vllm import model as thinker  # noqa: F401 - registers the model in every process of vLLM

_GRACE_S = 10.0
"""Time for the engine process to end by itself once the service has gone."""


class _EndsWithService:
    def _init_executor(self) -> None:
        # The interpreter would spend seconds looking for garbage in what goes with the process anyway.
        atexit.register(gc.freeze)
        threading.Thread(target=_end_with_service, name="EndWithService", daemon=True).start()
        super()._init_executor()  # type: ignore[misc]


class SoloExecutor(_EndsWithService, UniProcExecutor):  # type: ignore[misc]
    """The model in the engine process itself.

    vLLM would give the CPU a further process even for one worker: seconds more to start, and a hop per token.
    """

    def _init_executor(self) -> None:
        super()._init_executor()
        if current_platform.is_cpu():
            from serving.engine.vllm.cpu_kernels import lighten  # noqa: PLC0415 - it is for the CPU's kernels alone

            lighten(self.driver_worker.worker.model_runner)


class TeamExecutor(_EndsWithService, MultiprocExecutor):  # type: ignore[misc]
    """One process per GPU; they end with the engine process. Never Ray's workers, also under Ray."""


def _end_with_service() -> None:
    service = multiprocessing.parent_process()
    if service is None:
        return
    service.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)
