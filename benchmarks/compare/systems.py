"""Systems under comparison, each in its own process: this service, `vllm serve`, the offline engine.

Systems on Ray are in `ray_systems.py`. All but `ray.serve.llm` run the same vLLM with the same engine settings,
including those that the service chooses itself: the model in the engine process (as vLLM does with one GPU; on the CPU
the executor must be named, or vLLM starts another process), one thread for the model, no prefix or processor cache.
`vllm serve, defaults` keeps vLLM's own values of these.
"""

from __future__ import annotations

import json
import select
import sys
import tempfile
import time
from abc import abstractmethod
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar, Protocol

from benchmarks.load.checks import BadAnswerError
from benchmarks.load.closed_loop import Load, Target
from benchmarks.load.wire import MODEL_NAME
from benchmarks.managed_process import ManagedProcess
from benchmarks.processes import Snapshot, memory_mib
from benchmarks.program import CAPTIONER, module_environment
from benchmarks.servers import free_port

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.load.clips import Clip
    from benchmarks.load.wire import Answer
    from benchmarks.processes import Use

LIMITS = {"audio": 1, "image": 0, "video": 0}
EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
SERVICE_EXECUTOR = "serving.engine.vllm.executor.InProcessExecutor"
KEEPING_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@dataclass(frozen=True, slots=True)
class Setup:
    """Settings that all systems share."""

    model: Path
    max_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int = 2048
    max_model_len: int = 65_536
    dtype: str = "float32"
    kv_cache_gib: int = 1
    enforce_eager: bool = True

    @property
    def engine(self) -> dict[str, Any]:
        """Arguments of vLLM, without the executor."""
        return {
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "limit_mm_per_prompt": LIMITS,
            "enforce_eager": self.enforce_eager,
            "enable_prefix_caching": False,
            "mm_processor_cache_gb": 0,
        }

    @property
    def flags(self) -> list[str]:
        """Command-line options that this service and `vllm serve` have in common."""
        return [
            f"--served-model-name={MODEL_NAME}",
            f"--dtype={self.dtype}",
            f"--max-model-len={self.max_model_len}",
            f"--max-num-seqs={self.max_num_seqs}",
            f"--max-num-batched-tokens={self.max_num_batched_tokens}",
            "--enforce-eager" if self.enforce_eager else "--no-enforce-eager",
        ]


@dataclass(frozen=True, slots=True)
class Round:
    """Figures of one system for one set of clips."""

    requests: int
    audio_s: float
    answers: list[Answer]
    """Empty for the offline engine, which returns everything at the end."""
    wall_s: float
    use: Use
    memory_mib: dict[str, float]
    load_generator_cpu_s: float


class Job(Protocol):
    """Every clip once. Prepared beforehand, so that only `run` is measured."""

    def run(self) -> None:
        """Process the clips."""

    def answers(self) -> list[Answer]:
        """Return the answers. Raises `BadAnswerError`."""


class System(ManagedProcess):
    """A system under comparison. A context manager: the system runs inside."""

    start_timeout_s = 1800

    def __init__(self, setup: Setup, url: str = "") -> None:
        self._setup = setup
        self._temporary = tempfile.TemporaryDirectory(prefix="captioner-bench-")
        super().__init__(Path(self._temporary.name), url)

    def __exit__(self, *exc_info: object) -> None:
        super().__exit__(*exc_info)
        self._temporary.cleanup()

    def measure(self, clips: Sequence[Clip], concurrency: int) -> Round:
        """Run every clip once. Raises `BadAnswerError`."""
        job = self.job([clip.path for clip in clips], concurrency)
        before, began, own_cpu_s = Snapshot.of(self.family), time.perf_counter(), time.process_time()
        job.run()
        wall_s, own_cpu_s = time.perf_counter() - began, time.process_time() - own_cpu_s
        use = before.until(Snapshot.of(self.family))
        audio_s = sum(clip.duration_s for clip in clips)
        return Round(len(clips), audio_s, job.answers(), wall_s, use, memory_mib(self.family), own_cpu_s)

    def idle_cpu_s(self, wall_s: float) -> float:
        """Return the CPU-seconds per second without requests."""
        before = Snapshot.of(self.family)
        time.sleep(wall_s)
        return sum(before.until(Snapshot.of(self.family)).cpu_s.values()) / wall_s

    @property
    def environment(self) -> Mapping[str, str]:
        return {
            "VLLM_CPU_KVCACHE_SPACE": str(self._setup.kv_cache_gib),
            "VLLM_NO_USAGE_STATS": "1",
            # vLLM's server refuses more than ten minutes by default.
            "VLLM_MAX_AUDIO_DECODE_DURATION_S": "2400",
        }

    @abstractmethod
    def job(self, clips: Sequence[Path], concurrency: int) -> Job:
        """Prepare a job."""


class Server(System):
    """A system with an HTTP interface."""

    ready_path = "/health"

    def __init__(self, setup: Setup) -> None:
        self._port = free_port()
        super().__init__(setup, f"http://127.0.0.1:{self._port}")

    def job(self, clips: Sequence[Path], concurrency: int) -> Job:
        target = Target(f"{self.url}/v1/chat/completions", MODEL_NAME, self._setup.max_tokens)
        return Load(target, clips, concurrency)


class Captioner(Server):
    """This service."""

    name = "captioner"
    subcommand = "serve"
    ready_path = "/readyz"
    extra: tuple[str, ...] = ()

    @property
    def command(self) -> Sequence[str]:
        return [
            str(CAPTIONER),
            self.subcommand,
            f"--port={self._port}",
            f"--model={self._setup.model}",
            *self._setup.flags,
            f"--cpu-kv-cache-gib={self._setup.kv_cache_gib}",
            "--allow-ignore-eos",
            "--no-auth",
            f"--download-dir={self.directory}",
            f"--data-dir={self.directory / 'data'}",
            f"--uploads-dir={self.directory / 'uploads'}",
            *self.extra,
        ]


class CaptionerWithoutKernels(Captioner):
    """This service on vLLM's own layers: what is left of the difference is the architecture's."""

    name = "captioner, no CPU kernels"
    extra = ("--no-cpu-kernels",)


class VllmServe(Server):
    """vLLM's own server, of the version that the service runs."""

    name = "vllm serve"
    extra: tuple[str, ...] = (
        f"--distributed-executor-backend={EXECUTOR}",
        "--no-enable-prefix-caching",
        "--mm-processor-cache-gb=0",
    )
    threads: ClassVar = ONE_THREAD

    @property
    def command(self) -> Sequence[str]:
        return [
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(self._setup.model)),
            *("--host=127.0.0.1", f"--port={self._port}"),
            *self._setup.flags,
            f"--limit-mm-per-prompt={json.dumps(LIMITS)}",
            *self.extra,
        ]

    @property
    def environment(self) -> Mapping[str, str]:
        path = {"PYTHONPATH": vllm_cpu_shim(self.directory, version("vllm-cpu"))}
        return {**super().environment, **self.threads, **path}


def vllm_cpu_shim(directory: Path, vllm_version: str) -> str:
    """Write the metadata by which vllm-cpu finds itself, and return the directory for PYTHONPATH.

    vLLM looks for a distribution named vllm, and recognises the CPU build by `+cpu`.
    """
    description = directory / "shim" / f"vllm-{vllm_version}+cpu.dist-info" / "METADATA"
    description.parent.mkdir(parents=True, exist_ok=True)
    description.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {vllm_version}+cpu\n")
    return str(directory / "shim")


class TunedVllmServe(VllmServe):
    """vLLM's own server with the memory allocator's setting of the service."""

    name = "vllm serve, allocator"
    threads: ClassVar = ONE_THREAD | KEEPING_MEMORY


class DefaultVllmServe(VllmServe):
    """vLLM's own server with its defaults."""

    name = "vllm serve, defaults"
    extra = ()
    threads: ClassVar = {}


class OfflineEngine(System):
    """`LLM.generate`: the service's engine without a server, on clips that are decoded beforehand.

    The executor and the memory allocator are those of the service on the CPU.
    """

    name = "offline engine"
    piped = True
    executor = SERVICE_EXECUTOR
    cpu_kernels = True
    allocator: ClassVar = KEEPING_MEMORY

    @property
    def command(self) -> Sequence[str]:
        setup = self._setup
        settings = {
            "model": str(setup.model),
            "max_tokens": setup.max_tokens,
            "engine": setup.engine
            | {"distributed_executor_backend": self.executor, "additional_config": {"cpu_kernels": self.cpu_kernels}},
        }
        return [sys.executable, "-m", "benchmarks.compare.offline", json.dumps(settings)]

    @property
    def environment(self) -> Mapping[str, str]:
        return {**super().environment, **ONE_THREAD, **self.allocator, **module_environment()}

    def ready(self) -> bool:
        """Return whether the process wrote its first line, {"ready": true}; lines are written at once."""
        return bool(select.select([self._pipes[1]], [], [], 0)[0] and self.receive())

    def job(self, clips: Sequence[Path], concurrency: int) -> Job:
        del concurrency  # the engine gets all clips at once, and runs `max_num_seqs` at a time
        return _Batch(self, clips, self._setup.max_tokens)

    @property
    def _pipes(self) -> tuple[IO[str], IO[str]]:
        if not (self.process.stdin and self.process.stdout):
            raise RuntimeError("the offline engine was started without pipes")
        return self.process.stdin, self.process.stdout

    def send(self, message: object) -> None:
        """Send one line of JSON to the process."""
        print(json.dumps(message), file=self._pipes[0], flush=True)

    def receive(self) -> Any:
        """Wait for one line of JSON from the process."""
        if line := self._pipes[1].readline():
            return json.loads(line)
        raise RuntimeError(f"the offline engine has ended:\n{self.log_end()}")


class StockOfflineEngine(OfflineEngine):
    """`LLM.generate` with vLLM's own executor and allocator."""

    name = "offline engine, stock"
    executor = EXECUTOR
    cpu_kernels = False
    allocator: ClassVar = {}


class _Batch:
    """One call of `LLM.generate`."""

    def __init__(self, engine: OfflineEngine, clips: Sequence[Path], max_tokens: int) -> None:
        self._engine = engine
        self._max_tokens = max_tokens
        self._tokens: list[int] = []
        engine.send([str(clip) for clip in clips])
        self._count = engine.receive()["decoded"]

    def run(self) -> None:
        self._engine.send({"go": True})
        self._tokens = self._engine.receive()["tokens"]

    def answers(self) -> list[Answer]:
        if self._tokens != [self._max_tokens] * self._count:
            raise BadAnswerError("cut", f"{self._tokens=}, expected {self._count} times {self._max_tokens}")
        return []
