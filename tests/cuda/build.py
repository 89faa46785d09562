"""The CUDA build of vLLM, installed once under `.cache/cuda`, and programs that run in it.

The wheel (799 MB unpacked) is the one that `deploy/requirements/cuda.txt` locks, with its hashes; Python, PyTorch and
every other package are those of the tests. The CUDA build links `libcuda.so.1`, the driver's library, which a machine
without GPU does not have; a stub takes its place, in which every call fails with `CUDA_ERROR_NO_DEVICE`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.cuda.shape import QUANTIZED, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "deploy" / "requirements" / "cuda.txt"
CACHE = ROOT / ".cache" / "cuda"

ENGINE = ("vllm",)
FLASHINFER = ("flashinfer-python", "apache-tvm-ffi", "nvidia-ml-py", "nvidia-cudnn-frontend")
"""FlashInfer with what its import needs. vLLM uses it only with its compiled kernels or a CUDA toolkit: the official
image has them; an environment of the lock alone has not."""

_CUDA_ERROR_NO_DEVICE = 100
_DRIVER_FUNCTIONS = (
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuDeviceGetAttribute",
    "cuDevicePrimaryCtxRetain",
    "cuGetErrorString",
    "cuGetProcAddress_v2",
    "cuInit",
    "cuMemAddressFree",
    "cuMemAddressReserve",
    "cuMemCreate",
    "cuMemGetAllocationGranularity",
    "cuMemMap",
    "cuMemRelease",
    "cuMemSetAccess",
    "cuMemUnmap",
    "cuPointerGetAttribute",
    "cuTensorMapEncodeTiled",
)
"""Functions of the driver that the build's libraries resolve when they are loaded."""

_TIMEOUT_S = 500


class CudaBuild:
    """The installed build. Skips the test, with the reason, where the build cannot be had."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self.site = _installed("engine", ENGINE)
        self._driver = _stub_driver(scratch)
        self.checkpoint = write_checkpoint(scratch / "captioner-30b")
        self.quantized = {kind: write_checkpoint(scratch / f"captioner-30b-{kind}", kind) for kind in QUANTIZED}
        self._runs = 0

    def run(self, task: str, *, flashinfer: bool = False, interpret: bool = False, **arguments: Any) -> Any:
        """Return the result of a task of `tests/cuda/probe`, run in a process of the build.

        `interpret` runs Triton's kernels in its interpreter, on CPU tensors.
        """
        self._runs += 1
        result = self._scratch / f"result-{self._runs}.json"
        command = [sys.executable, "-m", "tests.cuda.probe", task, json.dumps(arguments), str(result)]
        environment = self.environment(flashinfer=flashinfer) | ({"TRITON_INTERPRET": "1"} if interpret else {})
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
        assert done.returncode == 0, f"{task}: {(done.stdout + done.stderr)[-6000:]}"
        return json.loads(result.read_text())

    def environment(self, *, flashinfer: bool = False) -> dict[str, str]:
        """Return the variables of a process that imports the CUDA build."""
        path = [self.site, _installed("flashinfer", FLASHINFER)] if flashinfer else [self.site]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("CAPTIONER_", "VLLM_"))}
        return kept | {
            "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT))),
            "LD_LIBRARY_PATH": str(self._driver),
            "HF_HUB_OFFLINE": "1",
            "VLLM_CACHE_ROOT": str(self._scratch / "vllm"),
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            # As Ray sets it in a process without GPU; vLLM keeps Triton on then.
            "CUDA_VISIBLE_DEVICES": "",
            "VLLM_HAS_FLASHINFER_CUBIN": str(int(flashinfer)),
        }


def requirements(packages: Sequence[str]) -> str:
    """Return the lines of the lock for the packages, with their hashes."""
    lines = []
    text = LOCK.read_text()
    for package in packages:
        found = re.search(rf"^{re.escape(package)}==(?:.*\\\n)+.*\n", text, re.MULTILINE)
        assert found, f"{package} is not in {LOCK}"
        lines.append(found[0])
    return "".join(lines)


def _installed(name: str, packages: Sequence[str]) -> Path:
    wanted = requirements(packages)
    digest = hashlib.blake2b((wanted + sys.version).encode(), digest_size=8).hexdigest()
    CACHE.mkdir(parents=True, exist_ok=True)
    home = CACHE / f"{name}-{digest}"
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if home.is_dir():
            return home
        print(f"\nDownloading {', '.join(packages)} (some 300 MB, once) into {home} …", file=sys.__stderr__, flush=True)
        partial = CACHE / f"{home.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        (partial / "requirements.txt").write_text(wanted)
        command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps", "--require-hashes"]
        command += ["--python", sys.executable, "--target", str(partial), "-r", str(partial / "requirements.txt")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            shutil.rmtree(partial)
            pytest.skip(f"{name} of the CUDA build cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
        partial.rename(home)
    return home


def _stub_driver(scratch: Path) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("a C compiler, for the stub of the driver's library, is not installed")
    home = scratch / "driver"
    home.mkdir()
    source = home / "libcuda.c"
    source.write_text("".join(f"int {name}(){{return {_CUDA_ERROR_NO_DEVICE};}}\n" for name in _DRIVER_FUNCTIONS))
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(home / "libcuda.so.1"), str(source)], check=True)
    return home
