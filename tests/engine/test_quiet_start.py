"""A normal start prints lines of the service alone."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from serving.config import Settings
from serving.engine.vllm.engine import _environment
from serving.engine.vllm.start_progress import PHASES

if TYPE_CHECKING:
    from pathlib import Path

_IMPORTS = "import torch.utils.cpp_extension, torch.utils.flop_counter, torch._library.triton"


def test_pytorch_does_not_warn_of_cuda_and_triton(tmp_path: Path) -> None:
    """On a machine without GPU PyTorch would warn in each process of the engine; an operator's own TORCH_LOGS stays."""
    with _environment(Settings(), tmp_path):
        environment = dict(os.environ)
    command = [sys.executable, "-c", _IMPORTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == ""
    os.environ["TORCH_LOGS"] = "recompiles"
    try:
        with _environment(Settings(), tmp_path):
            assert os.environ["TORCH_LOGS"] == "recompiles"
    finally:
        del os.environ["TORCH_LOGS"]


def test_phases_are_true_on_a_cpu() -> None:
    """No phase claims CUDA graphs where there is no GPU."""
    assert PHASES["graphs"] == "warming up vLLM, on GPUs with CUDA graphs"
