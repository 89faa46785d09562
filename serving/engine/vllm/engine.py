"""The captioner on vLLM: an engine that imports vLLM only when it starts, off the event loop.

Only modules of this package import vLLM, so an upgrade of vLLM touches this package alone (deploy/upgrading.md).
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import logging.config
import multiprocessing
import os
import tempfile
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.engine.base import Tally, ignore_start
from serving.engine.vllm.start_progress import PHASES, StartProgress, cache_root
from serving.engine.vllm.warm_up import warm_up
from serving.errors import EngineFailed, NotReady
from serving.types import NO_TENANT

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator

    from serving.config import Settings
    from serving.engine.base import EngineDelta, Load
    from serving.engine.vllm.async_llm import LoadedModel
    from serving.types import Features, Sampling, SchedulingClass


log = logging.getLogger(__name__)

_POLL_S = 0.5


_ANOTHER_MODEL = {"speculative_config", "spec_model", "tokenizer", "hf_config_path"}
"""Engine arguments that may name another model, which the hub has."""


class VllmEngine:
    """An `Engine` on vLLM's `AsyncLLM`. The model runs in a separate process.

    `start` imports vLLM, which takes seconds, and starts that process, which imports vLLM again and loads the model.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._tally = Tally()
        self._model: LoadedModel | None = None
        self._loading: asyncio.Future[LoadedModel] | None = None
        self._progress: StartProgress | None = None
        self._stopped = False
        self.pids: tuple[int, ...] = ()

    @property
    def load(self) -> Load:
        """See `Engine`."""
        return self._tally.load(self._model.kv_capacity_tokens if self._model else 0)

    async def start(self) -> None:
        """See `Engine`."""
        self._scratch = tempfile.TemporaryDirectory(prefix="captioner-engine-")
        self._siblings = multiprocessing.active_children()
        self._progress = progress = StartProgress(self._settings, Path(self._scratch.name))
        reporting = asyncio.create_task(_report_phases(progress))
        self._loading = asyncio.ensure_future(asyncio.to_thread(self._load))
        try:
            # Cancelling would not stop the thread; `stop` does.
            model = await asyncio.shield(self._loading)
            progress.mark("captions")
            await warm_up(model, self._settings)
        except Exception as error:
            raise EngineFailed from error
        finally:
            reporting.cancel()
        seconds = progress.keep()
        log.info("engine start times", extra={f"{phase}_s": seconds.get(phase, 0.0) for phase in PHASES})
        self._model = model
        started = (process for process in multiprocessing.active_children() if process not in self._siblings)
        self.pids = tuple(process.pid for process in started if process.pid)

    def _load(self) -> LoadedModel:
        with _environment(self._settings, Path(self._scratch.name)):
            logging.config.dictConfig(_logging(self._settings))
            module = importlib.import_module("serving.engine.vllm.async_llm")
            if self._stopped:
                raise NotReady
            model: LoadedModel = module.LoadedModel(self._settings)
            return model

    @property
    def gpus(self) -> int:
        """Number of GPUs of the model."""
        return self._model.gpus if self._model else 0

    @property
    def steps(self) -> int:
        """See `Engine`."""
        return self._model.steps if self._model else 0

    async def check_health(self) -> None:
        """See `Engine`."""
        if self._model is None:
            raise NotReady(progress=self._progress.describe() if self._progress and not self._stopped else "")
        if self._model.dead:
            raise EngineFailed

    async def generate(
        self,
        request_id: str,
        features: Features,
        sampling: Sampling,
        scheduling_class: SchedulingClass = NO_TENANT,
        on_started: Callable[[], None] = ignore_start,
    ) -> AsyncGenerator[EngineDelta]:
        """See `Engine`."""
        del scheduling_class  # admission control has chosen the order
        if self._model is None:
            raise NotReady
        on_started()
        with self._tally.count(features):
            async with aclosing(self._model.generate(request_id, features, sampling)) as deltas:
                del features  # 123 MB for the longest clip, not needed once sent
                async for delta in deltas:
                    yield delta

    async def stop(self) -> None:
        """See `Engine`."""
        self._stopped, self._model = True, None
        if self._loading is None:
            return
        while not self._loading.done():
            # Loading fails once its process has gone. The process holds nothing yet that needs an orderly stop.
            for process in multiprocessing.active_children():
                if process not in self._siblings:
                    process.kill()
            await asyncio.wait((self._loading,), timeout=0.1)
        loading, self._loading = self._loading, None
        if not loading.cancelled() and loading.exception() is None:
            await loading.result().close()
        self._scratch.cleanup()


async def _report_phases(progress: StartProgress) -> None:
    """Log each phase of the start as it begins."""
    seen = ""
    while True:
        if (phase := progress.phase) != seen:
            seen = phase
            log.info("engine start", extra={"phase": phase, "progress": progress.describe()})
        await asyncio.sleep(_POLL_S)


_CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "CUDA_CACHE_PATH": "cuda",
}


@contextmanager
def _environment(settings: Settings, scratch: Path) -> Iterator[None]:
    """Set the variables that vLLM and its libraries read on import, here and in the processes that vLLM starts.

    Variables that the operator has set stay, except for the directory of vLLM's sockets and temporary files, which vLLM
    does not delete, and for the way in which processes start.
    """
    logging_config = scratch / "logging.json"
    logging_config.write_text(json.dumps(_logging(settings)))
    ours = {
        "TMPDIR": str(scratch),
        "VLLM_RPC_BASE_PATH": str(scratch),
        "VLLM_LOGGING_CONFIG_PATH": str(logging_config),
        # On CUDA vLLM forks by default. A forked engine keeps our listener and the connections of clients: a peer never
        # sees them close, a stopped service seems to accept, and the port cannot be bound again.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    defaults = {
        "DO_NOT_TRACK": "1",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "PYTHONWARNINGS": "ignore",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        # The minus sign is PyTorch's for errors alone: on a CPU these warn in each process of CUDA and Triton.
        "TORCH_LOGS": "-torch.utils.cpp_extension,-torch.utils.flop_counter,-torch._library.triton",
        "VLLM_NO_USAGE_STATS": "1",
    }
    # Kernels that vLLM, PyTorch, Triton, FlashInfer and the driver compile, below one directory, so that one volume
    # keeps them. By default some go to the directory for temporary files, which is removed when the engine stops.
    caches = cache_root(dict(os.environ))
    defaults |= {name: str(caches / place) for name, place in _CACHES.items()}
    if Path(settings.model).is_dir() and not _ANOTHER_MODEL & settings.engine_args.keys():
        defaults["HF_HUB_OFFLINE"] = "1"
    before = dict(os.environ)
    os.environ.update(defaults | before | ours)
    # The engine gets its settings by value. The service's variables, secrets among them, stay out of its processes.
    own = {name: os.environ.pop(name) for name in before if name.startswith("CAPTIONER_")}
    try:
        yield
    finally:
        os.environ.update(own)
        for name in {*ours, *defaults} - before.keys():
            del os.environ[name]
        os.environ.update({name: before[name] for name in ours.keys() & before.keys()})


def _logging(settings: Settings) -> dict[str, Any]:
    """Return the logging configuration of vLLM, in the service's format; for the embedded checkpoint, errors only."""
    level = "INFO" if settings.log_level == "debug" else "ERROR" if settings.is_embedded else "WARNING"
    formatter = (
        "serving.observability.logging.JsonFormatter"
        if settings.log_format == "json"
        else "serving.observability.logging.TextFormatter"
    )
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"service": {"()": formatter}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "service"}},
        "loggers": {"vllm": {"level": level, "handlers": ["stderr"], "propagate": False}},
    }
