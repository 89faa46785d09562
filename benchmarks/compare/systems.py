"""Those that are compared, each as a process of its own: this service, `vllm serve`, the offline engine.

Those on Ray are in `ray_systems.py`. All but `ray.serve.llm` run the same vLLM, with the same engine settings, also
those that the service chooses by itself: the model in the engine process (as vLLM does with one GPU; on the CPU that
must be named, lest it starts a further one), one thread for it, no prefix or processor cache. `vllm serve, defaults`
leaves these as vLLM has them.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar, Protocol, Self

import psutil
from load import Load, Target
from processes import Family, Snapshot, memory_mib
from wire import BadAnswerError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clips import Clip
    from processes import Use
    from wire import Answer

START_TIMEOUT_S = 1800
MODEL_NAME = "qwen3-omni-30b-a3b-captioner"
LIMITS = {"audio": 1, "image": 0, "video": 0}
EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
OUR_EXECUTOR = "serving.engine.vllm.executor.SoloExecutor"
KEEPING_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@dataclass(frozen=True, slots=True)
class Setup:
    """What all have in common."""

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
        """Arguments for vLLM, but for the executor."""
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


@dataclass(frozen=True, slots=True)
class Round:
    """One system's figures for one set of clips."""

    requests: int
    audio_s: float
    answers: list[Answer]
    """Empty for the offline engine, which answers everything at the end."""
    wall_s: float
    use: Use
    memory_mib: dict[str, float]
    load_generator_cpu_s: float


class Job(Protocol):
    """Every clip once. Made beforehand, so that only `run` is measured."""

    def run(self) -> None:
        """Do it."""

    def answers(self) -> list[Answer]:
        """Check what came of it. Raises `BadAnswerError`."""


class System(ABC):
    """One of those compared. A context: it runs inside."""

    name: str
    stdout_is_log = True

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._directory = tempfile.TemporaryDirectory(prefix="captioner-bench-")
        self._scratch = Path(self._directory.name)
        self._log = self._scratch / "log"
        self._mark = f"CAPTIONER_BENCHMARK_MEMBER={uuid.uuid4()}"

    def __enter__(self) -> Self:
        began = time.perf_counter()
        with self._log.open("w") as log:
            self._child = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=log if self.stdout_is_log else subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | self.environment | dict([self._mark.split("=")]),
            )
        self.family = Family(psutil.Process(self._child.pid), self._mark)
        try:
            self._wait_until_ready(began + START_TIMEOUT_S)
        except BaseException:
            self.__exit__()
            raise
        self.start_s = time.perf_counter() - began
        return self

    def __exit__(self, *exc_info: object) -> None:
        members = self.family.members()
        self._child.terminate()
        for process in psutil.wait_procs(members, timeout=60)[1]:
            process.kill()
        self._child.wait()
        self._directory.cleanup()

    def measure(self, clips: Sequence[Clip], concurrency: int) -> Round:
        """Run every clip once. Raises `BadAnswerError`."""
        job = self._job([clip.path for clip in clips], concurrency)
        before, began, own_cpu_s = Snapshot.of(self.family), time.perf_counter(), time.process_time()
        job.run()
        wall_s, own_cpu_s = time.perf_counter() - began, time.process_time() - own_cpu_s
        use = before.until(Snapshot.of(self.family))
        audio_s = sum(clip.duration_s for clip in clips)
        return Round(len(clips), audio_s, job.answers(), wall_s, use, memory_mib(self.family), own_cpu_s)

    def idle_cpu_s(self, wall_s: float) -> float:
        """CPU-seconds per second while it has nothing to do."""
        before = Snapshot.of(self.family)
        time.sleep(wall_s)
        return sum(before.until(Snapshot.of(self.family)).cpu_s.values()) / wall_s

    def _wait_until_ready(self, deadline: float) -> None:
        while not self._is_ready():
            if self._child.poll() is not None or time.perf_counter() > deadline:
                raise RuntimeError(f"{self.name} did not start:\n{self._log.read_text()[-5000:]}")
            time.sleep(0.2)

    @property
    @abstractmethod
    def command(self) -> list[str]:
        """How it is started."""

    @property
    def environment(self) -> dict[str, str]:
        """Variables for it."""
        return {
            "VLLM_CPU_KVCACHE_SPACE": str(self._setup.kv_cache_gib),
            "VLLM_NO_USAGE_STATS": "1",
            # Its server refuses more than ten minutes otherwise.
            "VLLM_MAX_AUDIO_DECODE_DURATION_S": "2400",
        }

    @abstractmethod
    def _is_ready(self) -> bool: ...

    @abstractmethod
    def _job(self, clips: Sequence[Path], concurrency: int) -> Job: ...


class Server(System):
    """One that speaks HTTP."""

    ready_path = "/health"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + self.ready_path, timeout=5):  # noqa: S310 - our own address
                return True
        except OSError:
            return False

    def _job(self, clips: Sequence[Path], concurrency: int) -> Job:
        return Load(Target(f"{self.url}/v1/chat/completions", MODEL_NAME, self._setup.max_tokens), clips, concurrency)


class Captioner(Server):
    """This service."""

    name = "captioner"
    subcommand = "serve"
    ready_path = "/readyz"

    @property
    def command(self) -> list[str]:
        setup = self._setup
        return [
            str(Path(sys.executable).with_name("captioner")),
            self.subcommand,
            f"--port={self._port}",
            f"--model={setup.model}",
            f"--served-model-name={MODEL_NAME}",
            f"--dtype={setup.dtype}",
            f"--max-model-len={setup.max_model_len}",
            f"--max-num-seqs={setup.max_num_seqs}",
            f"--max-num-batched-tokens={setup.max_num_batched_tokens}",
            f"--cpu-kv-cache-gib={setup.kv_cache_gib}",
            "--enforce-eager" if setup.enforce_eager else "--no-enforce-eager",
            "--allow-ignore-eos",
            "--no-auth",
            f"--download-dir={self._scratch}",
            f"--data-dir={self._scratch / 'data'}",
            f"--uploads-dir={self._scratch / 'uploads'}",
        ]


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
    def command(self) -> list[str]:
        setup = self._setup
        return [
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(setup.model)),
            *("--host=127.0.0.1", f"--port={self._port}", f"--served-model-name={MODEL_NAME}"),
            f"--dtype={setup.dtype}",
            f"--max-model-len={setup.max_model_len}",
            f"--max-num-seqs={setup.max_num_seqs}",
            f"--max-num-batched-tokens={setup.max_num_batched_tokens}",
            f"--limit-mm-per-prompt={json.dumps(LIMITS)}",
            "--enforce-eager" if setup.enforce_eager else "--no-enforce-eager",
            *self.extra,
        ]

    @property
    def environment(self) -> dict[str, str]:
        return super().environment | self.threads | {"PYTHONPATH": shim(self._scratch, version("vllm-cpu"))}


def shim(directory: Path, vllm_version: str) -> str:
    """Make what lets vllm-cpu find itself: it looks for a distribution named vllm, and knows the CPU by `+cpu`."""
    description = directory / "shim" / f"vllm-{vllm_version}+cpu.dist-info" / "METADATA"
    description.parent.mkdir(parents=True, exist_ok=True)
    description.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {vllm_version}+cpu\n")
    return str(directory / "shim")


class DefaultVllmServe(VllmServe):
    """The same, as it comes."""

    name = "vllm serve, defaults"
    extra = ()
    threads: ClassVar = {}


class OfflineEngine(System):
    """`LLM.generate`: the service's engine with nothing around it, on clips that are decoded beforehand.

    The same engine: with the model as the service runs it on the CPU, and its allocator.
    """

    name = "offline engine"
    stdout_is_log = False
    executor = OUR_EXECUTOR
    allocator: ClassVar = KEEPING_MEMORY

    @property
    def command(self) -> list[str]:
        setup = self._setup
        settings = {
            "model": str(setup.model),
            "max_tokens": setup.max_tokens,
            "engine": setup.engine | {"distributed_executor_backend": self.executor},
        }
        return [sys.executable, str(Path(__file__).with_name("offline.py")), json.dumps(settings)]

    @property
    def environment(self) -> dict[str, str]:
        return super().environment | ONE_THREAD | self.allocator

    def _is_ready(self) -> bool:
        # Its first line is {"ready": true}; a line that is there is whole.
        return bool(select.select([self._pipes[1]], [], [], 0)[0] and self.hear())

    def _job(self, clips: Sequence[Path], concurrency: int) -> Job:
        del concurrency  # it takes everything at once and runs `max_num_seqs` at a time
        return _Batch(self, clips, self._setup.max_tokens)

    @property
    def _pipes(self) -> tuple[IO[str], IO[str]]:
        if not (self._child.stdin and self._child.stdout):
            raise RuntimeError("the offline engine was started without pipes")
        return self._child.stdin, self._child.stdout

    def say(self, what: object) -> None:
        """Send one line to the process."""
        print(json.dumps(what), file=self._pipes[0], flush=True)

    def hear(self) -> Any:
        """Wait for one line of the process."""
        if line := self._pipes[1].readline():
            return json.loads(line)
        raise RuntimeError(f"the offline engine has ended:\n{self._log.read_text()[-5000:]}")


class StockOfflineEngine(OfflineEngine):
    """The same with vLLM as it is."""

    name = "offline engine, stock"
    executor = EXECUTOR
    allocator: ClassVar = {}


class _Batch:
    """One call of `LLM.generate`."""

    def __init__(self, engine: OfflineEngine, clips: Sequence[Path], max_tokens: int) -> None:
        self._engine = engine
        self._max_tokens = max_tokens
        self._tokens: list[int] = []
        engine.say([str(clip) for clip in clips])
        self._count = engine.hear()["decoded"]

    def run(self) -> None:
        self._engine.say({"go": True})
        self._tokens = self._engine.hear()["tokens"]

    def answers(self) -> list[Answer]:
        if self._tokens != [self._max_tokens] * self._count:
            raise BadAnswerError("cut", f"{self._tokens=}, expected {self._count} times {self._max_tokens}")
        return []
