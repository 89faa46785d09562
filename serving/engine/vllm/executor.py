"""Executors that run the model inside vLLM's engine process; vLLM imports this module there by name.

vLLM's engine process does not notice when the service is killed (SIGKILL, out of memory): it would keep its memory, or
its GPUs, for ever. These executors stop the engine process then.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import signal
import threading
import time
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

import serving.engine.vllm.model  # noqa: F401 - registers the model in every process of vLLM
from serving.engine.vllm.cpu_generators import CpuGenerators
from serving.engine.vllm.start_progress import mark
from serving.private_process import forbid_inspection

_GRACE_S = 10.0
"""Time for the engine process to exit after SIGTERM once the service has gone, before SIGKILL."""


class _ReportsStart:
    """Note each phase of the start as it begins, in the order in which vLLM's engine calls these methods."""

    def _init_executor(self) -> None:
        mark("weights")
        super()._init_executor()  # type: ignore[misc]

    def determine_available_memory(self) -> Any:
        mark("compile")
        return super().determine_available_memory()  # type: ignore[misc]

    def initialize_from_config(self, *arguments: Any) -> Any:
        mark("cache")
        return super().initialize_from_config(*arguments)  # type: ignore[misc]

    def compile_or_warm_up_model(self) -> Any:
        mark("graphs")
        return super().compile_or_warm_up_model()  # type: ignore[misc]


class _StopsWithService(_ReportsStart):
    def _init_executor(self) -> None:
        # The interpreter would spend seconds on a garbage collection of objects that are freed with the process anyway.
        atexit.register(gc.freeze)
        threading.Thread(target=_stop_with_service, name="StopWithService", daemon=True).start()
        super()._init_executor()


class InProcessExecutor(_StopsWithService, UniProcExecutor):  # type: ignore[misc]
    """The model in the engine process.

    On a CPU vLLM would start a further process even for one worker: seconds more to start, and a hop per token.

    `additional_config["cpu_kernels"]` switches the direct calls of CPU kernels on (`cpu_kernels.py`); absent is off.
    """

    def _init_executor(self) -> None:
        forbid_inspection()
        super()._init_executor()
        if current_platform.is_cpu() and self.vllm_config.additional_config.get("cpu_kernels"):
            from serving.engine.vllm.cpu_kernels import patch_decoder_layers  # noqa: PLC0415 - only a CPU has them

            patch_decoder_layers(self.driver_worker.worker.model_runner)

    def initialize_from_config(self, *arguments: Any) -> Any:
        """Initialize the KV cache, and with it the batch of requests."""
        initialized = super().initialize_from_config(*arguments)
        if current_platform.is_cpu():
            self.driver_worker.worker.model_runner.input_batch.generators = CpuGenerators()
        return initialized


class MultiGpuExecutor(_StopsWithService, MultiprocExecutor):  # type: ignore[misc]
    """One process per GPU; they end with the engine process. Never Ray's workers, also under Ray.

    They share memory of the GPUs by calls that hidden processes refuse each other (`private_process.py`), so they are
    not hidden; the sandbox of audio workers keeps these from reading them.
    """


def _stop_with_service() -> None:
    service = multiprocessing.parent_process()
    if service is None:
        return
    service.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)
